"""Nothing flows backwards: which part of the package may import which, at its head, in a function, or for types alone.

A part is a folder of the package or a module beside them. Data flow from configs through data, methods and engine to
evaluation; a method brings its own part of the config, so reading one comes after the methods; the trainer validates by
the protocol and the metrics of evaluation, and so imports run

    blocks -> data -> methods (on nn and ops) -> config -> evaluation -> predictor -> engine -> cli

where every part knows those before it, as far as it is allowed here, and none that comes after. One edge is not seen:
`ops.dispatch` loads the Triton kernels by name when they are first called, and they in turn use `ops.providers`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fastmmkd.methods import METHODS

ROOT = Path(__file__).parents[1]

BASE = {"errors", "files", "labels", "modalities"}
"""What says one thing about the world and is known to all that come after."""

MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "modalities": set(),
    "labels": set(),
    "files": {"errors"},
    "provenance": set(),
    "building": set(),
    "run_folder": {"errors", "files"},
    "ops": {"errors", "files", "building"},
    "kernels": {"errors", "ops"},
    "distributed": set(),
    "tasks": {"labels", "ops"},
    "deepspeed_block": {"errors"},
    "blocks": {"deepspeed_block", "errors", "tasks"},
    "data": {*BASE, "blocks", "ops", "tasks"},
    "nn": {"data", "ops"},
    "methods": {"blocks", "data", "distributed", "errors", "labels", "modalities", "nn", "ops", "tasks"},
    "config": {"blocks", "errors", "files", "methods"},
    "evaluation": {*BASE, "blocks", "data", "distributed", "run_folder", "tasks"},
    "model_file": {*BASE, "data", "distributed", "run_folder"},
    "predictor": {
        *BASE,
        "blocks",
        "config",
        "data",
        "evaluation",
        "methods",
        "model_file",
        "nn",
        "ops",
        "run_folder",
        "tasks",
    },
    "run_results": {*BASE, "data", "evaluation", "predictor", "run_folder"},
    "environment": {"errors", "ops", "provenance"},
    "engine": {
        *BASE,
        *(
            "blocks",
            "config",
            "data",
            "deepspeed_block",
            "distributed",
            "environment",
            "evaluation",
            "methods",
            "model_file",
        ),
        *("nn", "ops", "predictor", "provenance", "run_folder", "run_results", "tasks"),
    },
    "testing": {"blocks", "config", "data", "kernels", "ops"},
    "cli": {
        "config",
        "data",
        "engine",
        "environment",
        "errors",
        "evaluation",
        "files",
        "ops",
        "predictor",
        "run_folder",
        "run_results",
    },
}
"""Part -> the parts it may import, which all come before it."""


def imported(source: str) -> Iterator[str]:
    """The parts of the package that a module imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "fastmmkd" else [module]
        for name in names:
            package, _, rest = name.partition(".")
            if package == "fastmmkd":
                yield rest.partition(".")[0]


def parts() -> dict[str, list[Path]]:
    """Part -> its modules. The package's own `__init__` and `__main__` are none."""
    package = ROOT / "fastmmkd"
    paths = {path.stem: [path] for path in package.glob("*.py") if not path.stem.startswith("__")}
    paths |= {path.parent.name: sorted(path.parent.rglob("*.py")) for path in package.glob("*/__init__.py")}
    return paths | {"kernels": sorted((ROOT / "kernels").rglob("*.py"))}


def test_every_part_has_its_place() -> None:
    assert set(MAY_IMPORT) == set(parts())


@pytest.mark.parametrize("part", MAY_IMPORT)
def test_a_part_knows_only_what_comes_before_it(part: str) -> None:
    before = list(MAY_IMPORT)[: list(MAY_IMPORT).index(part)]
    assert MAY_IMPORT[part] <= set(before)
    for path in parts()[part]:
        names = set(imported(path.read_text(encoding="utf-8"))) - {part, "_C", "__version__"}
        assert names <= MAY_IMPORT[part], f"{path.relative_to(ROOT)} imports {sorted(names - MAY_IMPORT[part])}"


def test_tests_and_benchmarks_meet_in_the_package_alone() -> None:
    """In `fastmmkd.testing`; benchmarks do not import tests."""
    for path in (ROOT / "bench").rglob("*.py"):
        assert "tests" not in {name.partition(".")[0] for name in modules(path)}, path


def modules(path: Path) -> Iterator[str]:
    """What a module imports, by full names."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""


@pytest.mark.parametrize("folder", ["fastmmkd", "kernels"])
def test_the_package_needs_neither_its_tests_nor_its_benchmarks(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        assert not {name.partition(".")[0] for name in modules(path)} & {"bench", "tests", "conftest"}, path


@pytest.mark.parametrize("folder", ["fastmmkd", "kernels", "bench"])
def test_only_a_methods_own_file_names_it(folder: str) -> None:
    """In code; words for people may. `bench.plain_umdf` is one method written in another way."""
    for path in (ROOT / folder).rglob("*.py"):
        if path != ROOT / "bench" / "plain_umdf.py" and not (path.parent.name == "methods" and path.stem in METHODS):
            assert not named(path.read_text(encoding="utf-8")) & set(METHODS), path


def named(source: str) -> set[str]:
    """The identifiers and strings of a module, in small letters: all strings but the docstrings."""
    tree = ast.parse(source)
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    words: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            words |= set(re.findall(r"\w+", node.value))
        else:
            keys = ("id", "attr", "name", "module", "arg")
            words |= {str(getattr(node, key, None)).rpartition(".")[2] for key in keys}
    return {word.lower() for word in words}


def test_names_are_seen_wherever_they_stand() -> None:
    for line in (
        "METHODS['umdf']",
        "from fastmmkd.methods.umdf import X",
        "isinstance(x, UMDF)",
        "f(umdf=1, x=a.umdf)",
    ):
        assert "umdf" in named(line), line
    assert "umdf" not in named('"""UMDF\'s."""\nf("configs/umdf_mosi.json")')


def test_no_import_escapes() -> None:
    source = """
import fastmmkd.engine.run as run
from fastmmkd import predictor, ops
if TYPE_CHECKING:
    from fastmmkd.methods.umdf import UMDF
def late():
    from fastmmkd.evaluation import metrics
    import numpy, fastmmkd.cli
"""
    assert sorted(imported(source)) == ["cli", "engine", "evaluation", "methods", "ops", "predictor"]
