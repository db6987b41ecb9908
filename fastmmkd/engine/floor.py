"""The least that a training step could take on this device: its bytes at a copy's rate, its products at full speed.

    bytes      = 10 * parameters + 2 * saved
    operations = those of the matrix products, forward and backward
    floor      = max(bytes / copy rate, operations / product rate)

`parameters` are read in the forward and in the backward pass and their gradients written; Adam reads parameter,
gradient and two moments, and writes all but the gradient: ten times their bytes. `saved` is what autograd keeps for the
backward pass: written once, read once. Bytes are counted on the step as it runs, operations on the reference.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastmmkd.ops import use_provider

PARAMETER_PASSES, SAVED_PASSES = 10, 2
COPIED = 1 << 26
"""Bytes of the copy that is timed."""
SIDE = 1024
"""Of the matrices that are multiplied."""
REPEATS = 5


@dataclass(frozen=True)
class Floor:
    """What a step has to move and compute, and how fast the device does."""

    parameter_bytes: int
    saved_bytes: int
    operations: int
    bytes_per_second: float
    operations_per_second: float

    @property
    def bytes(self) -> int:
        """That a step moves at least."""
        return PARAMETER_PASSES * self.parameter_bytes + SAVED_PASSES * self.saved_bytes

    @property
    def seconds(self) -> float:
        """What a step takes at least."""
        return max(self.bytes / self.bytes_per_second, self.operations / self.operations_per_second)


def floor(loss: Callable[[], torch.Tensor], module: torch.nn.Module, device: torch.device, dtype: torch.dtype) -> Floor:
    """Count a step's bytes and operations, and time the device.

    Args:
        loss: of the step; it is called twice and differentiated once.
        module: whose parameters learn.
        device, dtype: where and in which precision.
    """
    parameters = sum(p.numel() * p.element_size() for p in module.parameters() if p.requires_grad)
    saved = saved_bytes(loss, module)
    with use_provider("reference"), FlopCounterMode(display=False) as counter:
        loss().backward()
    module.zero_grad()
    x = torch.zeros(COPIED // dtype.itemsize, dtype=dtype, device=device)
    a = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    y = torch.empty_like(x)
    copies = 2 * COPIED / fastest(lambda: y.copy_(x), device)
    products = 2 * SIDE**3 / fastest(lambda: a @ a, device)
    return Floor(parameters, saved, counter.get_total_flops(), copies, products)


def saved_bytes(loss: Callable[[], torch.Tensor], module: torch.nn.Module) -> int:
    """Bytes that autograd keeps for the backward pass, each storage once, parameters left out."""
    storages: dict[int, torch.UntypedStorage] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        graph = loss()
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept = sum(storage.nbytes() for at, storage in storages.items() if at not in own)
    del graph
    return kept


def fastest(run: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of a few runs."""
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times)
