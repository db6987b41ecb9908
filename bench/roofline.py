"""How close a kernel comes to what its device can do: the shares of a device's ceilings that its work reaches.

The work of an operation is `Op.work` and `Op.backward_work`, see `fastmmkd.ops.work`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from fastmmkd.ops.work import Work


class Ceilings(NamedTuple):
    """What a device reaches: bytes per second of a copy, operations per second of a matrix product."""

    bandwidth: float
    arithmetic: float


def fraction(work: Work, seconds: float, ceilings: Ceilings) -> Ceilings:
    """Shares of the two ceilings that doing the work in `seconds` reaches; the larger says what bounds it."""
    return Ceilings(work.bytes / seconds / ceilings.bandwidth, work.operations / seconds / ceilings.arithmetic)


def measure_ceilings(
    device: torch.device, dtype: torch.dtype, copied: int = 2**28, side: int = 4096, repeats: int = 10
) -> Ceilings:
    """The best of `repeats` copies of `copied` bytes, and of as many products of square matrices of `side`."""
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    product = torch.empty_like(matrix)
    copying = _best(device, repeats, lambda: target.copy_(source))
    multiplying = _best(device, repeats, lambda: torch.mm(matrix, matrix, out=product))
    return Ceilings(2 * copied / copying, 2 * side**3 / multiplying)


def _best(device: torch.device, repeats: int, run: Callable[[], object]) -> float:
    """Seconds of the fastest run after one that warms up."""
    run()
    return min(_timed(device, run) for _ in range(repeats))


def _timed(device: torch.device, run: Callable[[], object]) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3
