"""What MMSA and MulT pickles have in common: a dict of three splits, each a dict of arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastmmkd.data.importers import restricted_pickle
from fastmmkd.data.importers.assemble import numeric
from fastmmkd.data.packing import Sliceable
from fastmmkd.data.store import SPLITS
from fastmmkd.errors import UserError

KEYS = {"language": "text", "audio": "audio", "visual": "vision"}
"""Modality -> key in a split."""


def load_splits(source: Path, label_key: str) -> dict[str, dict[str, Any]]:
    """The dict of `train`, `valid` and `test`, each a dict that has `label_key`.

    Raises:
        UserError: what `restricted_pickle.load` raises, or another structure.
    """
    content = restricted_pickle.load(source)
    if not isinstance(content, dict):
        raise UserError(f"{source}: holds a {type(content).__name__}, expected a dict of {', '.join(SPLITS)}")
    for name in SPLITS:
        if not isinstance(content.get(name), dict):
            raise UserError(f"{source}: no split {name!r}, found {_names(content)}")
        if label_key not in content[name]:
            raise UserError(f"{source}: {name} has no {label_key!r}, found {_names(content[name])}")
    return content


def take_features(split: dict[str, Any], where: str) -> dict[str, Sliceable]:
    """Modality -> `[N, T_m, d_m]`, those the split has; taken out of it, so that nothing else holds them."""
    return {m: numeric(split.pop(key), f"{where} {key}") for m, key in KEYS.items() if split.get(key) is not None}


def _names(mapping: dict[Any, Any]) -> str:
    return ", ".join(sorted(map(str, mapping))) or "nothing"
