"""One step of gradient descent as a part of a loss: the inner step of model-agnostic meta-learning (Finn et al. 2017).

`theta' = theta - alpha g`, `g = grad inner(theta)`, and what is minimised is `inner(theta) + outer(theta')`.

Second order is that as it stands. First order takes g as a constant, so that `theta'` moves as `theta` does: the
gradient of the outer loss in `theta` is its gradient at `theta'`, exactly, and autograd finds it by itself. The
gradient of the inner loss is known by then, it is g: no second pass over its graph is needed. It comes in by
`s - const(s)`, `s = sum g theta`, whose value is 0 and whose gradient is g. So one backward pass from one number, which
is what an engine wants, gives `g + grad outer(theta')`.

Shape legend: S models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch

from fastmmkd.distributed import gather_rows

Gradients = Sequence[torch.Tensor | None]

Order = Literal[1, 2]


class InnerStep(NamedTuple):
    """What an inner step leaves behind."""

    adapted: dict[str, torch.Tensor]
    """theta', by the names of theta."""
    loss: torch.Tensor
    """`[S]`, the inner loss, to be added to the outer one; its gradient comes with it."""


def inner_step(
    loss: torch.Tensor,
    adapted: Mapping[str, torch.Tensor],
    others: Sequence[torch.Tensor],
    rate: torch.Tensor,
    order: Order,
) -> InnerStep:
    """Take the step.

    In first order the step is that of the rows of all processes; in second order there has to be one.

    Args:
        loss: inner, `[S]`: a loss of each model, which share nothing.
        adapted: theta, `[S, ...]` each.
        others: what the inner loss is a function of besides, `[S, ...]` each: it trains them, but the step leaves them
            as they are.
        rate: alpha, `[S]`.
        order: 2 needs operations whose gradients can be differentiated.
    """
    theta = list(adapted.values())
    with torch.enable_grad():
        if order == 2:
            gradients = torch.autograd.grad(loss.sum(), theta, create_graph=True, allow_unused=True)
            return InnerStep(_descended(adapted, gradients, rate), loss)
        every = [*theta, *others]
        gradients = torch.autograd.grad(loss.sum(), every, retain_graph=True, allow_unused=True)
        pulls = [(p * g).reshape(len(p), -1).sum(1) for p, g in zip(every, gradients, strict=True) if g is not None]
        pull = torch.stack(pulls).sum(0)
        step = _descended(adapted, _of_all_processes(gradients[: len(theta)]), rate)
        return InnerStep(step, loss.detach() + (pull - pull.detach()))


def _descended(
    parameters: Mapping[str, torch.Tensor], gradients: Gradients, rate: torch.Tensor
) -> dict[str, torch.Tensor]:
    """`theta - alpha g`; what the loss is no function of stays as it is."""
    pairs = zip(parameters.items(), gradients, strict=True)
    return {
        name: p if g is None else p - rate.view(-1, *(1,) * (p.dim() - 1)).to(p.dtype) * g for (name, p), g in pairs
    }


def _of_all_processes(gradients: Gradients) -> Gradients:
    """Means over the processes, each of which has those of its own rows."""
    own = [g for g in gradients if g is not None]
    joined = gather_rows(torch.cat([g.reshape(len(g), -1) for g in own], dim=1).unsqueeze(1)).mean(1)
    parts = iter(joined.split([g[0].numel() for g in own], dim=1))
    return [None if g is None else next(parts).view_as(g) for g in gradients]
