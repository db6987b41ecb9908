"""What frozen networks make of the training samples: asked once when a phase begins, then looked up by row.

A teacher sees complete samples and has no dropout, so that its answer on a sample never changes.

Shape legend: S models, N samples of the split, B of a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map

from fastmmkd.data.batches import ResidentSplit
from fastmmkd.methods.method import Trainable

ASKED_AT_ONCE = 256
"""Samples."""


class Taught:
    """The answers to all training samples, a table on their device.

    Args:
        module: its `teach` is asked.
        split: the training samples.
        models: S.
    """

    @torch.no_grad()
    def __init__(self, module: Trainable, split: ResidentSplit, models: int) -> None:
        self.models = models
        samples = torch.arange(split.size, device=split.present.device)
        answers = [module.teach(split.complete(rows[None]).of_models(models)) for rows in samples.split(ASKED_AT_ONCE)]
        self.table: Any = tree_map(lambda *parts: torch.cat(parts, dim=1), *answers)

    @property
    def bytes(self) -> int:
        """What the table takes of its device."""
        return sum(answer.nbytes for answer in tree_leaves(self.table))

    def of(self, rows: torch.Tensor) -> Any:
        """The answers to a batch: `[S, B]` int64 rows of the split -> as `Trainable.teach` gives them."""
        if self.models == 1:
            (of_model,) = rows
            return tree_map(lambda answers: answers.index_select(1, of_model), self.table)
        model = torch.arange(self.models, device=rows.device)[:, None]
        return tree_map(lambda answers: answers[model, rows], self.table)
