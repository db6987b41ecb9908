"""What the systems share that the papers compare their own with: their task losses, and means over what is there.

Shape legend: S models, B samples of a batch, O outputs, P problems.
"""

from __future__ import annotations

from typing import Literal

import torch

from fastmmkd.blocks import Block
from fastmmkd.distributed import gather_rows, world_size
from fastmmkd.ops.layout import Layout
from fastmmkd.ops.precision import accumulation
from fastmmkd.tasks import Task

TaskLoss = Literal["own", "project"]


class BaselineLoss(Block):
    """What every such system's block has."""

    task: TaskLoss = "own"
    """The system's own loss of the task: L1 or MSE of scores, as its code has it, and cross-entropy summed over the
    four emotions (decision); or the project's, `Task.loss`: MSE, and their mean."""


def task_errors(
    task: Task, logits: torch.Tensor, targets: torch.Tensor, reading: TaskLoss, own: Literal["L1", "MSE"]
) -> torch.Tensor:
    """The task loss of every sample, `[S, B]`; its mean is that of the batch.

    Args:
        logits: `[S, B, O]`; computed in float32 or better.
        targets: `[S, B]` scores, or `[S, B, P]` int64 classes.
        reading: see `BaselineLoss.task`.
        own: the system's own error of a score.
    """
    logits = accumulation(logits)
    if task.is_regression:
        difference = logits.squeeze(-1) - targets.to(logits.dtype)
        return difference.abs() if (reading, own) == ("own", "L1") else difference.square()
    surprise = -task.split_problems(logits).log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return surprise.sum(-1) if reading == "own" else surprise.mean(-1)


def mean_where(x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Mean over the samples, or rows, that count, of all processes: `[S, B, ...]` and such a bool -> `[S, ...]`, 0
    where none does.

    What several processes find, averaged as the engine does, is what one finds with the whole batch.
    """
    total = gather_rows(counts.sum(1, keepdim=True)).sum(1).clamp_min(1)
    return (x * counts).sum(1) * world_size() / total


def of_rows(has: torch.Tensor, layout: Layout) -> torch.Tensor:
    """What is so of a sample, of each of its rows: `[S, B]` bool -> `[S, R]`, False in rows of nobody."""
    return has.gather(1, layout.sample.clamp_max(layout.batch - 1)) & layout.is_somebodys
