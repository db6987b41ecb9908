"""How Triton kernels are launched: every launch goes through `launch`, so that launches can also be recorded.

A recording launches nothing, so it needs no GPU: `fastmmkd.kernels` functions called with tensors on the "meta" device
say which kernels they would launch, with which arguments. The offline compiler and the launch counts live on that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from fastmmkd.ops import providers


class Launch(NamedTuple):
    """One launch of a kernel."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]
    """Compile-time constants, num_warps and num_stages."""


_recording: list[tuple[list[Launch], tuple[int, int]]] = []


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`; nothing where the grid is empty."""
    if 0 in grid:
        return
    if _recording:
        _recording[-1][0].append(Launch(kernel, grid, args, options))
    else:
        kernel[grid](*args, **options)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability that kernels are launched for: the device's, or that of the recording."""
    return _recording[-1][1] if _recording else providers.capability(device)


def tensor_cores(device: torch.device) -> bool:
    """Whether `tl.dot` of half-precision tiles has tensor cores: from compute capability 8.0 on, and interpreted."""
    return providers.INTERPRETED or capability(device) >= (8, 0)


@contextmanager
def recorded(target: tuple[int, int] = (8, 0)) -> Iterator[list[Launch]]:
    """Inside the block kernels are not launched but listed, as for a device of that compute capability."""
    launches: list[Launch] = []
    _recording.append((launches, target))
    try:
        yield launches
    finally:
        _recording.pop()
