"""MulT's `{mosi,mosei_senti,iemocap}_data[_noalign].pkl` (GloVe, COVAREP, Facet)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from fastmmkd.data.importers import pickled
from fastmmkd.data.importers.assemble import RawSplit, assemble, plain_array, require_scores, text_ids
from fastmmkd.data.store import EMOTIONS, SPLITS, Dataset
from fastmmkd.errors import UserError

SOURCE_EMOTIONS = ("neutral", "happy", "sad", "angry")


def load(source: Path) -> Dataset:
    """Import a MulT pickle.

    Per split: `text`, `audio`, `vision` `[N, T_m, d_m]`, padded on the left (detected all the same), optional `id`,
    and `labels`: `[N, 1, 1]` scores, or for IEMOCAP `[N, 4, 2]` one-hot pairs (no, yes) of neutral, happy, sad, angry,
    several of which may hold, or none: the report counts both.

    Raises:
        UserError: not such a file, or it is refused by the restricted unpickler.
    """
    content = pickled.load_splits(source, "labels")
    shapes = {plain_array(content[name]["labels"], f"{source}: {name} labels").shape[1:] for name in SPLITS}
    emotions = shapes == {(len(SOURCE_EMOTIONS), 2)}
    raw = {name: _raw_split(content[name], emotions, f"{source}: {name}") for name in SPLITS}
    ambiguous = _ambiguous(raw) if emotions else []
    dataset = assemble(
        raw,
        source=f"MulT {source.name}",
        importer="mult",
        label_kind="emotions" if emotions else "score",
    )
    dataset.report["notes"] += ambiguous
    return dataset


def _ambiguous(raw: dict[str, RawSplit]) -> list[str]:
    """One line per split in which samples hold no emotion, or several."""
    lines = []
    for name, split in raw.items():
        held = split.labels.sum(axis=1)
        none, several = int((held == 0).sum()), int((held > 1).sum())
        if none + several:
            lines.append(
                f"{name}: of {len(held)} samples {none} hold no emotion and {several} several; emotions-4way takes "
                "such data with data.ambiguous=drop alone, which leaves these samples out"
            )
    return lines


def _raw_split(split: dict[str, Any], emotions: bool, where: str) -> RawSplit:
    labels = np.asarray(split["labels"])
    return RawSplit(
        features=pickled.take_features(split, where),
        labels=_emotions(labels, where) if emotions else require_scores(labels, f"{where} labels"),
        ids=None if split.get("id") is None else text_ids(split["id"], f"{where} id"),
    )


def _emotions(pairs: np.ndarray, where: str) -> np.ndarray:
    """One-hot pairs `[N, 4, 2]` in the source's order -> indicators `[N, 4]` in the store's order."""
    if pairs.dtype.kind not in "iufb":
        raise UserError(f"{where} labels are {pairs.dtype} {list(pairs.shape)}, expected one-hot pairs [N, 4, 2]")
    one_hot = ((pairs == 0) | (pairs == 1)).all(-1) & (pairs.sum(-1) == 1)
    if not one_hot.all():
        i, e = np.argwhere(~one_hot)[0]
        raise UserError(f"{where} labels[{i}, {e}] is {pairs[i, e].tolist()}, expected a one-hot pair [1, 0] or [0, 1]")
    return pairs[:, [SOURCE_EMOTIONS.index(emotion) for emotion in EMOTIONS], 1]
