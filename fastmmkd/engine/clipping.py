"""Gradient clipping of independent models that are trained at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch


def clip_models(
    parameters: Iterable[torch.nn.Parameter], limit: float, models: int, stopped: Sequence[int] = ()
) -> None:
    """Scale each model's gradients down to a norm of `limit`, as DeepSpeed does for a model alone.

    Args:
        parameters: `[S, ...]` each; those without a gradient are passed over.
        limit: largest Euclidean norm of all gradients of a model; 0 = none.
        models: S; with one model a parameter needs no axis for it.
        stopped: models that are trained no more; they get gradient 0, whatever they have.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    if limit:
        norms = [torch.linalg.vector_norm(g.reshape(models, -1), dim=1, dtype=torch.float32) for g in gradients]
        factor = (limit / (torch.linalg.vector_norm(torch.stack(norms), dim=0) + 1e-6)).clamp(max=1)
        for g in gradients:
            g.mul_(factor.to(g.dtype).view(-1, *[1] * (g.dim() - 1)))
    for g in gradients:
        for model in stopped:
            g[model].zero_()
