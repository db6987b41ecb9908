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
MIDDLE = ("dev", "val", "validation")
"""Other names of `valid`."""
LONGEST_LIST = 400
"""Characters."""


def load_splits(source: Path, label_key: str) -> dict[str, dict[str, Any]]:
    """The dict of `train`, `valid` and `test`, each a dict that has `label_key`.

    Raises:
        UserError: what `restricted_pickle.load` raises, or another structure.
    """
    content = restricted_pickle.load(source)
    if not isinstance(content, dict):
        raise UserError(f"{source}: holds a {type(content).__name__}, expected a dict of {', '.join(SPLITS)}")
    middle = [name for name in MIDDLE if name in content]
    if "valid" not in content and len(middle) == 1:
        content["valid"] = content.pop(middle[0])
    for name in SPLITS:
        if name not in content:
            raise UserError(f"{source}: no split {name!r}, found {_names(content)}, expected {', '.join(SPLITS)}")
        if not isinstance(content[name], dict):
            raise UserError(f"{source}: {name} is a {type(content[name]).__name__}, expected a dict of arrays")
        if label_key not in content[name]:
            wanted = ", ".join([label_key, *KEYS.values()])
            raise UserError(f"{source}: {name} has no {label_key!r}, found {_names(content[name])}, expected {wanted}")
    return content


def take_features(split: dict[str, Any], where: str) -> dict[str, Sliceable]:
    """Modality -> `[N, T_m, d_m]`, those the split has; taken out of it, so that nothing else holds them.

    Raises:
        UserError: it has none, or one is no array of numbers.
    """
    features = {m: numeric(split.pop(key), f"{where} {key}") for m, key in KEYS.items() if split.get(key) is not None}
    if not features:
        raise UserError(f"{where} has no features, found {_names(split)}, expected {', '.join(KEYS.values())}")
    return features


def _names(mapping: dict[Any, Any]) -> str:
    names = ", ".join(sorted(repr(key)[1:-1] if isinstance(key, str) else repr(key) for key in mapping)) or "nothing"
    return names if len(names) <= LONGEST_LIST else f"{names[:LONGEST_LIST]}..."
