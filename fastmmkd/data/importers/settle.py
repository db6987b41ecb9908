"""Which scores a data set has: sentiment in [-3, 3], or in [-1, 1] as CH-SIMS; and what is done with those beyond."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from fastmmkd.data.store import Dataset
from fastmmkd.errors import UserError
from fastmmkd.labels import SCORE_LIMITS

Scores = Literal["score", "sims"]


def with_settled_labels(dataset: Dataset, source: Path | str, scores: Scores | None, clip: bool) -> Dataset:
    """The data set with its kind of scores settled, none of them beyond its limits.

    Args:
        dataset: as an importer loads it, scores of any size.
        source: names it in an error message.
        scores: what they are; None: sentiment in [-3, 3], if they do not look like those of CH-SIMS.
        clip: scores beyond the limits are set to them and counted, not refused.

    Raises:
        UserError: a score lies beyond the limits; fractions all lie in [-1, 1] and `scores` is None; something was said
            about scores where there are none.
    """
    if dataset.label_kind in ("", "emotions"):
        if scores is not None or clip:
            option = "--clip-labels" if clip else f"--labels {scores}"
            has = "its labels are emotions" if dataset.label_kind else "it has no labels"
            raise UserError(f"{source}: {has}, expected no {option}")
        return dataset
    kind = scores or "score"
    limit = SCORE_LIMITS[kind]
    labels = np.concatenate([split.labels for split in dataset.splits.values()])
    beyond = np.abs(labels) > limit
    farthest = labels[np.argmax(np.abs(labels))]
    if beyond.any() and not clip:
        which = [f"{name} label {i}" for name, split in dataset.splits.items() for i in range(len(split))]
        first = int(np.argmax(beyond))
        stars = " or 1 to 5 stars" if dataset.importer == "mfn" and kind == "score" else ""
        raise UserError(
            f"{source}: {which[first]} is {labels[first]:g}, expected a score in [{-limit:g}, {limit:g}]{stars}; "
            f"{beyond.sum()} of {len(labels)} lie beyond, up to {farthest:g} (--clip-labels sets them to the limits)"
        )
    if scores is None and (np.abs(labels) <= 1).all() and (labels != np.round(labels)).any():
        raise UserError(
            f"{source}: all scores lie in [-1, 1], as those of CH-SIMS; expected --labels sims, which has its metrics, "
            "or --labels score where they are sentiment in [-3, 3]"
        )
    if not beyond.any():
        return replace(dataset, label_kind=kind)
    dataset.report["notes"].append(
        f"{beyond.sum()} of {len(labels)} labels lay beyond +-{limit:g}, up to {farthest:g}: set to the limits"
    )
    splits = {name: replace(split, labels=split.labels.clip(-limit, limit)) for name, split in dataset.splits.items()}
    clipped = f"clipped to +-{limit:g}"
    label_map = clipped if dataset.label_map == "identity" else f"{dataset.label_map}, {clipped}"
    return replace(dataset, splits=splits, label_kind=kind, label_map=label_map)
