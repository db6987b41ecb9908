"""MMSA's `aligned_50.pkl` and `unaligned_50.pkl` (BERT features; MOSI, MOSEI, SIMS)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fastmmkd.data.importers import pickled
from fastmmkd.data.importers.assemble import RawSplit, assemble, plain_array, require_scores, text_ids
from fastmmkd.data.store import SPLITS, Dataset
from fastmmkd.errors import UserError

LABELS = "regression_labels"
LENGTHS = tuple(f"{pickled.KEYS[modality]}_lengths" for modality in ("audio", "visual"))
TOKEN_MASK_ROW = 1
"""`text_bert` holds token ids, mask and segment ids, in this order."""


def load(source: Path) -> Dataset:
    """Import an MMSA pickle.

    Per split: `text [N, T, 768]`, `audio [N, T_a, d_a]`, `vision [N, T_v, d_v]`, `regression_labels [N]`,
    `id` (`video$_$clip`); optional `text_bert [N, 3, T]`, whose mask tells the real tokens; the unaligned files add
    `audio_lengths` and `vision_lengths`. MMSA pads on the right; the side is detected all the same.

    Raises:
        UserError: not such a file, or it is refused by the restricted unpickler.
    """
    content = pickled.load_splits(source, LABELS)
    raw = {name: _raw_split(content[name], f"{source}: {name}") for name in SPLITS}
    return assemble(raw, source=f"MMSA {source.name}", importer="mmsa")


def _raw_split(split: dict[str, Any], where: str) -> RawSplit:
    labels = require_scores(split[LABELS], f"{where} {LABELS}")
    raw = RawSplit(features=pickled.take_features(split, where), labels=labels)
    if split.get("id") is not None:
        raw.ids = text_ids(split["id"], f"{where} id")
    tell_lengths(raw, split, where)
    return raw


def tell_lengths(raw: RawSplit, split: Mapping[str, Any], where: str) -> None:
    """Take what a split says of how many frames are real: the tokens of language, the lengths of audio and visual.

    Raises:
        UserError: it does not fit the features.
    """
    for modality, key in zip(("audio", "visual"), LENGTHS, strict=True):
        if split.get(key) is not None and modality in raw.features:
            raw.lengths[modality] = _per_sample(split[key], len(raw.labels), f"{where} {key}")
    if split.get("text_bert") is not None and "language" in raw.features:
        raw.tokens = _token_mask(split["text_bert"], raw.features["language"].shape[:2], f"{where} text_bert")


def _per_sample(values: Any, samples: int, where: str) -> np.ndarray:
    lengths = plain_array(values, where).reshape(-1)
    if len(lengths) != samples or lengths.dtype.kind not in "iuf":
        raise UserError(f"{where} has {len(lengths)} entries, expected one number for each of the {samples} samples")
    if not (good := (lengths >= 0) & (lengths < np.iinfo(np.int32).max)).all():
        i = int(np.argmin(good))
        raise UserError(f"{where}[{i}] is {lengths[i]:g}, expected a number of frames")
    return lengths.astype(np.int64)


def _token_mask(text_bert: Any, expected: tuple[int, ...], where: str) -> np.ndarray:
    array, wanted = plain_array(text_bert, where), (*expected[:1], 3, *expected[1:])
    if array.shape != wanted:
        raise UserError(f"{where} is {list(array.shape)}, expected {list(wanted)} beside that text")
    return array[:, TOKEN_MASK_ROW] != 0
