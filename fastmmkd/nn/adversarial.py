"""Adversarial alignment in one backward pass: gradient reversal and discriminators."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastmmkd.nn.grouped import GroupedLinear
from fastmmkd.ops.constants import constant
from fastmmkd.ops.precision import accumulation


class _Reversal(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return -grad


def reverse_gradient(x: torch.Tensor) -> torch.Tensor:
    """x itself, whose gradient changes sign on the way back (Ganin and Lempitsky 2015)."""
    return _Reversal.apply(x)


class Discriminator(nn.Module):
    """Tells teacher from student representations of one scale: fully-connected, one hidden layer (decision)."""

    def __init__(self, models: int, d: int, hidden: int) -> None:
        super().__init__()
        self.hidden = GroupedLinear((models,), d, hidden)
        self.score = GroupedLinear((models,), hidden, 1)

    def forward(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        """Binary cross-entropy `-log D(E^t) - log(1 - D(E^s))`, a mean over rows: `[S, N, d]` twice -> `[S]`.

        Minimising it trains the discriminator; the reversed gradient makes the student maximise it, which is to
        minimise `log(1 - D(E^s))`.
        """
        logit = self.logit(torch.cat((teacher, reverse_gradient(student)), dim=1))
        of = teacher.shape[1], student.shape[1]
        side, weight = (constant(make, *of, device=logit.device, dtype=logit.dtype) for make in (_sides, _means))
        return (F.softplus(logit * side) * weight).sum(1)

    def logit(self, x: torch.Tensor) -> torch.Tensor:
        """`[S, N, d]` -> `[S, N]`, in float32 or better."""
        return accumulation(self.score(self.hidden(x, relu=True))).squeeze(-1)


def _sides(teacher: int, student: int, device: torch.device) -> torch.Tensor:
    """-1 for the rows of the teacher, then 1 for those of the student."""
    return torch.cat((-torch.ones(teacher, device=device), torch.ones(student, device=device)))


def _means(teacher: int, student: int, device: torch.device) -> torch.Tensor:
    """What makes a sum the sum of both their means."""
    of_teacher, of_student = (
        torch.full((n,), 1 / max(n, 1), device=device, dtype=torch.float64) for n in (teacher, student)
    )
    return torch.cat((of_teacher, of_student))
