"""What a task with one label of four makes of samples that hold none of the emotions, or several."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from fastmmkd.data.dataset import Dataset, Split
from fastmmkd.errors import UserError
from fastmmkd.tasks import Task

Ambiguous = Literal["refuse", "drop"]


def single_labelled(dataset: Dataset, task: Task, ambiguous: Ambiguous) -> Dataset:
    """The data set as a task takes it: itself, but for `emotions-4way`, which is for samples that hold one emotion.

    With `"drop"` the others are left out of every split, and the new data set's `source` says how many; its
    `content_hash` and `normalisation` stay those of the file.

    Raises:
        UserError: there are such samples and `ambiguous` is `"refuse"`, or nothing is left of a split.
    """
    if task.name != "emotions-4way" or dataset.label_kind != "emotions":
        return dataset
    held = {name: emotions_held(split) for name, split in dataset.splits.items()}
    everywhere = np.concatenate(list(held.values()))
    samples, none, several = len(everywhere), int((everywhere == 0).sum()), int((everywhere > 1).sum())
    if not none + several:
        return dataset
    if ambiguous == "refuse":
        by_split = ", ".join(f"{name} {(counts != 1).sum()}" for name, counts in held.items())
        raise UserError(
            f"train.task: {task.name} is for samples that hold one emotion; of {samples} samples in {dataset.path} "
            f"{none} hold none and {several} several ({by_split}); expected emotions-binary, or data.ambiguous=drop"
        )
    splits = {name: split.take(held[name] == 1) for name, split in dataset.splits.items()}
    for name, split in splits.items():
        if not len(split):
            raise UserError(f"data.ambiguous: drop leaves nothing of split {name} in {dataset.path}")
    source = f"{dataset.source}, without {none + several} of {samples} samples that hold no or several emotions"
    return replace(dataset, splits=splits, source=source)


def emotions_held(split: Split) -> np.ndarray:
    """`[N]` int64, how many emotions each sample holds."""
    return (split.labels > 0.5).sum(axis=1)
