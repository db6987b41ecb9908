"""What a method's forward pass returns: one scalar for the optimiser, and the parts of the loss for people."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

Parts = dict[str, torch.Tensor]
Term = tuple[str, float, Callable[[], torch.Tensor]]
"""A loss: its name, its weight, and how it is computed, `[S]`; weight 0 leaves it out ("w/o")."""


def weighted(total: torch.Tensor, parts: Parts, terms: Iterable[Term]) -> tuple[torch.Tensor, Parts]:
    """Add terms to a sum `[S]` of losses whose parts are known: the new sum and all parts."""
    parts = dict(parts)
    for name, weight, loss in terms:
        if weight:
            parts[name] = loss()
            total = total + weight * parts[name]
    return total, parts


def objective(total: torch.Tensor, parts: Parts) -> tuple[torch.Tensor, Parts]:
    """The scalar to minimise (summed over the S models, which share nothing) and the parts, detached, `[S]` each."""
    return total.sum(), {"loss": total.detach()} | {name: part.detach() for name, part in parts.items()}
