"""Processes that train one model together."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def world_size() -> int:
    """Number of processes; 1 when nothing was initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's index; 0 when nothing was initialised."""
    return dist.get_rank() if world_size() > 1 else 0


def barrier() -> None:
    """Wait for every process."""
    if world_size() > 1:
        dist.barrier()


def gather_objects(own: Any) -> list[Any]:
    """An object of every process, in rank order; each of them asks, and waits for the others."""
    if world_size() == 1:
        return [own]
    objects: list[Any] = [None] * world_size()
    dist.all_gather_object(objects, own)
    return objects


def everywhere(holds: bool, device: torch.device) -> bool:
    """Whether something holds in every process; each of them asks, and waits for the others."""
    if world_size() == 1:
        return holds
    flag = torch.tensor(int(holds), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MIN)
    return bool(flag.item())


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.rows = x.shape[1]
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        # Every process computes the whole loss and sends gradient to its own rows; the engine then averages over
        # processes, so that the factor restores the gradient of the one global loss.
        return grad[:, rank() * ctx.rows : (rank() + 1) * ctx.rows] * world_size()


def gather_rows(x: torch.Tensor) -> torch.Tensor:
    """Join the rows of every process: `[G, N, d]` -> `[G, world * N, d]`, in rank order, differentiable.

    A loss of the joined rows then has the value and the gradient it would have in one process with the global batch.
    """
    return x if world_size() == 1 else _GatherRows.apply(x)
