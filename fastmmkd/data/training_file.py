"""The data file of a run: a store in which every split has samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from fastmmkd.data import store
from fastmmkd.data.dataset import Dataset
from fastmmkd.data.store import Header
from fastmmkd.errors import UserError


def read_data(path: Path) -> Dataset:
    """Read a config's data file.

    Raises:
        UserError: it is not there, with the two ways to get it; it cannot be read; a split is empty.
    """
    _refuse_missing(path)
    dataset = store.read(path)
    _refuse_empty(path, {name: len(split) for name, split in dataset.splits.items()})
    return dataset


def read_data_header(path: Path) -> Header:
    """What the file says about itself, in milliseconds. Raises what `read_data` raises."""
    _refuse_missing(path)
    header = store.read_header(path)
    _refuse_empty(path, header.samples)
    return header


def _refuse_missing(path: Path) -> None:
    if not path.exists():
        like = next((name for name in ("mosei", "iemocap", "mosi") if name in path.name.lower()), "mosi")
        raise UserError(
            f"{path}: no such data file; import the real features with `fastmmkd data import --format mult SRC --out "
            f"{path}` (see the README), or make a synthetic stand-in with `fastmmkd data synth --like {like} "
            f"--fraction 1.0 --seed 1 --out {path}`"
        )


def _refuse_empty(path: Path, samples: Mapping[str, int]) -> None:
    for name in store.SPLITS:
        if not samples.get(name):
            raise UserError(f"{path}: split {name} is empty; training needs train, valid and test samples")
