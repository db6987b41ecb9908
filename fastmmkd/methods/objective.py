"""What a method's forward pass returns: one scalar for the optimiser, and the parts of the loss for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from fastmmkd.ops.precision import accumulation

Parts = dict[str, torch.Tensor]
Term = tuple[str, float, Callable[[], torch.Tensor]]
"""A loss: its name, its weight, and how it is computed, `[S]`; weight 0 leaves it out ("w/o")."""


class Losses(NamedTuple):
    """A method's losses on a batch, with their graph."""

    total: torch.Tensor
    """`[S]`, the weighted sum."""
    parts: Parts
    """`[S]` each, unweighted."""
    joint: torch.Tensor
    """`[S, ...]`, the representation that the parts are functions of: H, for HRLF the Z_m that H is made of."""


def gradient_sizes(losses: Losses) -> Parts:
    """`|dL_part / dH|` per part, `[S]` each, unweighted; 0 where a part does not reach H. The graph stays."""
    sizes = {}
    for name, part in losses.parts.items():
        (grad,) = torch.autograd.grad(part.sum(), losses.joint, retain_graph=True, allow_unused=True)
        sizes[name] = torch.zeros_like(part) if grad is None else accumulation(grad).flatten(1).norm(dim=1)
    return sizes


def weighted(total: torch.Tensor, parts: Parts, terms: Iterable[Term]) -> tuple[torch.Tensor, Parts]:
    """Add terms to a sum `[S]` of losses whose parts are known: the new sum and all parts."""
    parts = dict(parts)
    for name, weight, loss in terms:
        if weight:
            parts[name] = loss()
            total = total.add(parts[name], alpha=weight)
    return total, parts


def objective(total: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, Parts]:
    """The scalar to minimise (summed over the S models, which share nothing) and the parts, detached, `[S]` each."""
    return total.sum(), {"loss": total.detach()} | {name: part.detach() for name, part in parts.items()}
