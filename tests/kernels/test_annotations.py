"""Functions of kernels/ that Python runs are annotated; of those that Triton compiles only the constants can be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "kernels"


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)]


def is_compiled(function: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator).startswith("triton.") for decorator in function.decorator_list)


def arguments(function: ast.FunctionDef) -> list[ast.arg]:
    signature = function.args
    rest = [argument for argument in (signature.vararg, signature.kwarg) if argument]
    return [*signature.posonlyargs, *signature.args, *signature.kwonlyargs, *rest]


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_annotations(path: Path) -> None:
    for function in functions(path):
        for argument in arguments(function):
            said = argument.annotation and ast.unparse(argument.annotation)
            where = f"{path.name}: {function.name}({argument.arg})"
            if is_compiled(function):
                assert said in (None, "tl.constexpr"), where
            else:
                assert said or argument.arg in ("self", "cls"), where
        assert is_compiled(function) or function.returns, f"{path.name}: {function.name} -> ?"


def test_both_kinds_are_there() -> None:
    kinds = {is_compiled(function) for path in FOLDER.glob("*.py") for function in functions(path)}
    assert kinds == {True, False}
