"""What is to be predicted: any file that has samples, in however many splits, with labels or without.

`fastmmkd predict` reads such files as they are; `fastmmkd data import --format samples` makes a store of them.

A store (`.h5`); a folder of `.csd` files (`importers.csd.load_samples`); a pickle in the layout of MMSA or MulT, of
some splits or of one, or what MMSA's toolkit makes of a clip (`text [T, d]`, `audio`, `vision`, `id`); or `.npz` with

    language, audio, visual     [N, T_m, d_m] (one sample: [T_m, d_m]), zeros before or after the frames; absent where
                                a modality is missing
    language_lengths, ...       [N], optional: how many frames are real
    ids                         [N] text, optional
    labels                      [N] scores, optional
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastmmkd.data import store
from fastmmkd.data.dataset import SPLITS, Dataset
from fastmmkd.data.importers import csd, mmsa, restricted_pickle
from fastmmkd.data.importers.assemble import RawSplit, assemble, numeric, plain_array, require_scores, text_ids
from fastmmkd.data.importers.pickled import KEYS, MIDDLE
from fastmmkd.errors import UserError
from fastmmkd.modalities import MODALITIES

LABELS = ("regression_labels", "labels")
"""Keys of scores in a pickle."""
EXPECTED = "a store (.h5), .npz, .pkl or a folder of .csd files"


def load(path: Path) -> Dataset:
    """Every sample of a file, whatever it is.

    Returns:
        Splits by name ("samples" where the file has none). Where the file has no labels, `label_kind` is "" and labels
        are 0.

    Raises:
        UserError: no such file, of no known kind, or one that its kind's importer refuses.
    """
    if path.is_dir():
        return csd.load_samples(path)
    if path.suffix in (".h5", ".hdf5"):
        return store.read_samples(path)
    if not path.exists():
        raise UserError(f"{path}: no such file, expected {EXPECTED}")
    if path.suffix == ".npz":
        return _from_arrays(path)
    if path.suffix in (".pkl", ".pickle"):
        return _from_pickle(path)
    raise UserError(f"{path}: a file of this name cannot be told apart, expected {EXPECTED}")


def _from_arrays(path: Path) -> Dataset:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, NotImplementedError, MemoryError) as error:
        raise UserError(f"{path}: not a .npz file of plain arrays ({error})") from None
    known = {*MODALITIES, *(f"{m}_lengths" for m in MODALITIES), "ids", "labels"}
    if unknown := sorted(set(arrays) - known):
        raise UserError(f"{path}: has {', '.join(unknown)}, expected some of {', '.join(sorted(known))}")
    raw = _raw(str(path), {m: arrays[m] for m in MODALITIES if m in arrays}, arrays.get("ids"), arrays.get("labels"))
    for modality in raw.features:
        if (lengths := arrays.get(f"{modality}_lengths")) is not None:
            samples = len(raw.labels)
            if lengths.shape != (samples,) or lengths.dtype.kind not in "iu" or (lengths < 0).any():
                raise UserError(f"{path}: {modality}_lengths is not {samples} numbers of frames")
            raw.lengths[modality] = lengths.astype(np.int64)
    return _one(raw, str(path), "labels" in arrays)


def _from_pickle(path: Path) -> Dataset:
    content = restricted_pickle.load(path)
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds a {type(content).__name__}, expected a dict of arrays or of splits")
    names = [name for name in (*SPLITS, *MIDDLE) if isinstance(content.get(name), dict)]
    parts: Mapping[str, Any] = {name: content[name] for name in names} or {csd.SAMPLES: content}
    raw, labelled = {}, True
    for name, part in parts.items():
        where = f"{path}: {name}" if names else str(path)
        features = {m: numeric(part[key], f"{where} {key}") for m, key in KEYS.items() if part.get(key) is not None}
        labels = _scores_in(part, where, next((x.shape[0] for x in features.values() if len(x.shape) == 3), 1))
        raw[name] = _raw(where, features, part.get("id"), labels)
        of_clip = all(len(x.shape) == 2 for x in features.values())
        mmsa.tell_lengths(raw[name], _as_split(part) if of_clip else part, where)
        labelled &= labels is not None
    return assemble(raw, source=str(path), importer="mmsa", label_kind="score" if labelled else "")


def _as_split(clip: Mapping[str, Any]) -> dict[str, Any]:
    """What MMSA says of a single clip's frames, as of a split of one."""
    told = {key: value for key, value in clip.items() if key == "text_bert" or key in mmsa.LENGTHS}
    return {key: np.asarray(value)[None] for key, value in told.items() if value is not None}


def _scores_in(part: Mapping[str, Any], where: str, samples: int) -> Any:
    """A split's scores, if what it has are scores, one a sample."""
    for key in LABELS:
        if part.get(key) is not None and plain_array(part[key], f"{where} {key}").size == samples:
            return part[key]
    return None


def _raw(where: str, features: Mapping[str, Any], ids: Any, labels: Any) -> RawSplit:
    """Arrays as a split; a single clip's become a split of one."""
    if not features:
        raise UserError(
            f"{where}: has no features, expected some of {', '.join(dict.fromkeys([*MODALITIES, *KEYS.values()]))}"
        )
    if all(len(x.shape) == 2 for x in features.values()):
        features = {m: np.asarray(x)[None] for m, x in features.items()}
        ids = [ids] if ids is not None and np.ndim(ids) == 0 else ids
        labels = None if labels is None else np.reshape(plain_array(labels, f"{where} labels"), -1)
    samples = next(iter(features.values())).shape[0]
    scores = np.zeros(samples) if labels is None else require_scores(plain_array(labels, f"{where} labels"), where)
    return RawSplit(dict(features), scores, None if ids is None else text_ids(ids, f"{where} ids"))


def _one(raw: RawSplit, source: str, labelled: bool) -> Dataset:
    kind = "score" if labelled else ""
    return assemble({csd.SAMPLES: raw}, source=source, importer="npz", label_kind=kind)
