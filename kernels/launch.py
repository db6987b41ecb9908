"""How Triton kernels are launched: every launch goes through `launch`, so that launches can also be recorded.

A recording launches nothing, so it needs no GPU: `fastmmkd.kernels` functions called with tensors on the "meta" device
say which kernels they would launch, with which arguments. The offline compiler and the launch counts live on that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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


Watcher = Callable[[Any, tuple[int, ...], tuple[Any, ...], dict[str, Any]], object]

_recording: list[tuple[list[Launch], tuple[int, int]]] = []
_watching: list[tuple[Watcher, tuple[int, int]]] = []


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """`kernel[grid](*args, **options)`; nothing where the grid is empty."""
    if 0 in grid:
        return
    if _watching:
        _watching[-1][0](kernel, grid, args, options)
    if _recording:
        _recording[-1][0].append(Launch(kernel, grid, args, options))
    elif not _watching:
        kernel[grid](*args, **options)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability that kernels are launched for: the device's, or that of the recording."""
    return next((target for _, target in (*_watching[-1:], *_recording[-1:])), None) or providers.capability(device)


def tensor_cores(device: torch.device) -> bool:
    """Whether `tl.dot` of half-precision tiles has tensor cores: from compute capability 8.0 on, and interpreted."""
    return providers.INTERPRETED or capability(device) >= (8, 0)


@contextmanager
def watched(watcher: Watcher, target: tuple[int, int]) -> Iterator[None]:
    """Inside the block `watcher(kernel, grid, args, options)` is called in place of launches, beside recordings too, as
    for a device of that compute capability."""
    _watching.append((watcher, target))
    try:
        yield
    finally:
        _watching.pop()


@contextmanager
def recorded(target: tuple[int, int] = (8, 0)) -> Iterator[list[Launch]]:
    """Inside the block kernels are not launched but listed, as for a device of that compute capability."""
    launches: list[Launch] = []
    _recording.append((launches, target))
    try:
        yield launches
    finally:
        _recording.pop()
