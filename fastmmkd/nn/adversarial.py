"""Adversarial alignment in one backward pass: gradient reversal and discriminators."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastmmkd.nn.grouped import GroupedLinear
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
        real, fake = self.logit(torch.cat((teacher, reverse_gradient(student)), dim=1)).chunk(2, dim=1)
        return F.softplus(-real).mean(1) + F.softplus(fake).mean(1)

    def logit(self, x: torch.Tensor) -> torch.Tensor:
        """`[S, N, d]` -> `[S, N]`, in float32 or better."""
        return accumulation(self.score(self.hidden(x).relu())).squeeze(-1)
