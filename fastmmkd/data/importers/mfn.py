"""MFN's `{text,audio,video}_{train,valid,test}[_emb].h5` and `y_*.h5` (ICT-MMMO, MOSI, YouTube)."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import h5py
import numpy as np

from fastmmkd.data.checked_hdf5 import in_one_line, member, refuse_elsewhere
from fastmmkd.data.importers.assemble import RawSplit, assemble, require_scores
from fastmmkd.data.packing import Sliceable
from fastmmkd.data.store import SPLITS, Dataset
from fastmmkd.errors import UserError
from fastmmkd.files import read_json

PREFIXES = {"language": "text", "audio": "audio", "visual": "video"}
DATASET_NAMES = ("d1", "data")
IDS = '{"train": ["video_clip", ...], "valid": [...], "test": [...]}'
STAR_CENTRE = 3.0
"""ICT-MMMO's reviews have 1 to 5 stars; 3 is neutral."""


def load(source: Path) -> Dataset:
    """Import a folder of MFN files.

    Each file has one data set, `d1` or `data`: features `[N, T, d]`, labels `[N]`. `text_train_emb.h5` wins over
    `text_train.h5`. A modality whose file a split lacks is absent in that split. `ids.json`, where it is there, has a
    list of ids per split, in the order of rows.

    Labels: when no label of any split is below 1 or above 5 and one is above 3, they are stars, stored as `label - 3`;
    otherwise they are kept.

    Raises:
        UserError: not such a folder, a split without labels or without any features.
    """
    if not source.is_dir():
        raise UserError(
            f"{source}: {'is a file' if source.exists() else 'no such folder'}, expected a folder of .h5 files"
        )
    with in_one_line(source), ExitStack() as opened:
        raw = {name: _raw_split(source, name, opened) for name in SPLITS}
        if (ids := source / "ids.json").exists():
            _take_ids(raw, ids)
        label_map = _map_labels(raw)
        return assemble(raw, source=f"MFN {source.resolve().name}", importer="mfn", label_map=label_map)


def _raw_split(folder: Path, name: str, opened: ExitStack) -> RawSplit:
    labels_file = folder / f"y_{name}.h5"
    if not labels_file.is_file():
        raise UserError(f"{labels_file}: no such file, expected the labels of {name}")
    files = {modality: _feature_file(folder, prefix, name) for modality, prefix in PREFIXES.items()}
    features = {modality: _features(file, opened) for modality, file in files.items() if file is not None}
    if not features:
        wanted = ", ".join(f"{prefix}_{name}.h5" for prefix in PREFIXES.values())
        raise UserError(f"{folder}: no features for {name}, expected at least one of {wanted} (or with _emb)")
    labels = require_scores(_only_dataset(labels_file, opened)[()], f"{labels_file}: labels")
    return RawSplit(features=features, labels=labels)


def _take_ids(raw: dict[str, RawSplit], path: Path) -> None:
    lists = read_json(path, IDS)
    for name, split in raw.items():
        ids = lists.get(name) if isinstance(lists, dict) else None
        if not isinstance(ids, list) or not all(isinstance(entry, str) for entry in ids):
            raise UserError(f"{path}: has no list of strings for {name}, expected {IDS}")
        if len(ids) != len(split.labels):
            raise UserError(f"{path}: has {len(ids)} ids for {name}, expected {len(split.labels)}, one for each label")
        split.ids = ids


def _feature_file(folder: Path, prefix: str, name: str) -> Path | None:
    candidates = (folder / f"{prefix}_{name}_emb.h5", folder / f"{prefix}_{name}.h5")
    found = next((file for file in candidates if file.exists()), None)
    if found is not None and not found.is_file():
        raise UserError(f"{found}: not a file, expected features of {name}")
    return found


def _features(file: Path, opened: ExitStack) -> Sliceable:
    x = _only_dataset(file, opened)
    if x.ndim != 3 or x.dtype.kind not in "iuf":
        raise UserError(
            f"{file}: holds {x.dtype} {list(x.shape)}, expected features [N, T, d] (word vectors, not indices)"
        )
    return x


def _only_dataset(file: Path, opened: ExitStack) -> h5py.Dataset:
    """The array of a file, not read yet; the file is open until `opened` is closed."""
    with in_one_line(file):
        h5 = opened.enter_context(h5py.File(file, "r"))
        for name in DATASET_NAMES:
            if name in h5 and isinstance(dataset := member(h5, name), h5py.Dataset):
                if dataset.shape is None:
                    raise UserError(f"{name} holds nothing, expected an array")
                refuse_elsewhere(h5, name, dataset)
                return dataset
        raise UserError(f"no data set {' or '.join(DATASET_NAMES)}, found {', '.join(h5) or 'nothing'}")


def _map_labels(raw: dict[str, RawSplit]) -> str:
    labels = np.concatenate([split.labels for split in raw.values()])
    low, high = labels.min(), labels.max()
    if low >= 1 and 3 < high <= 5:
        for split in raw.values():
            split.labels = split.labels - STAR_CENTRE
        return "label - 3"
    return "identity"
