"""The tables of docs/fidelity.md: the keys in which a method's `_literal` configs differ from the shipped ones."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastmmkd.config import load_config
from fastmmkd.evaluation import tables
from fastmmkd.methods import METHODS

CONFIGS = Path(__file__).parents[1] / "configs"
SUFFIX = "_literal"
MISSING = object()
"""The value of a key that is not there."""


def names(configs: Path = CONFIGS) -> tuple[str, ...]:
    """`literal_<method>` of the methods that have literal configs."""
    return tuple(f"literal_{method}" for method in METHODS if literals(method, configs))


def literals(method: str, configs: Path = CONFIGS) -> list[Path]:
    """A method's literal configs."""
    return sorted(configs.glob(f"{method}_*{SUFFIX}.json"))


def parts(configs: Path = CONFIGS) -> dict[str, str]:
    """`literal_<method>` -> its table: a row per key and pair of values, with the data sets where they hold."""
    return {name: literal_table(name.removeprefix("literal_"), configs) for name in names(configs)}


def literal_table(method: str, configs: Path = CONFIGS) -> str:
    """Markdown: the keys in which a method's literal configs differ from the shipped ones."""
    data_of: dict[tuple[str, str, str], list[str]] = {}
    for literal in literals(method, configs):
        shipped = literal.with_name(literal.name.replace(SUFFIX, ""))
        for difference in differences(shipped, literal):
            data_of.setdefault(difference, []).append(shipped.stem.removeprefix(f"{method}_"))
    rows = [[f"`{key}`", ours, literal, ", ".join(data)] for (key, ours, literal), data in sorted(data_of.items())]
    return tables.markdown_table(["key", "shipped", "literal", "of"], rows)


def differences(shipped: Path, literal: Path) -> list[tuple[str, str, str]]:
    """Key, shipped value and literal value of every key that differs; defaults count as what they are."""
    ours, theirs = (load_config(path).model_dump(mode="json") for path in (shipped, literal))
    return list(_differences(ours, theirs))


def _differences(ours: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    for key in ours | theirs:
        a, b = ours.get(key, MISSING), theirs.get(key, MISSING)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{prefix}{key}.")
        elif a != b:
            yield prefix + key, _shown(a), _shown(b)


def _shown(value: Any) -> str:
    """As JSON; of a block, such as a scheduler's, what type it is of."""
    if value is MISSING:
        return tables.NONE
    return json.dumps(value.get("type", "...") if isinstance(value, dict) else value)
