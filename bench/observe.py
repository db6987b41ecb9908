"""What a step does besides taking time: operator calls, kernel launches, and the most memory it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

Run = Callable[[], object]


class OperatorCalls(TorchDispatchMode):
    """Counts the calls of operators that reach a backend, those of the backward pass included, views among them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def operator_calls(run: Run) -> int:
    """How many operators a step calls, `aten::` and `fastmmkd::` alike; not what is inside a compiled graph."""
    with OperatorCalls() as counter:
        run()
    return counter.calls.total()


def launches(run: Run) -> int:
    """How many kernels, copies and fills a step puts on the CUDA device."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiler.events())


def peak_memory(run: Run, device: torch.device) -> dict[str, Any]:
    """The most bytes that tensors hold at once in a step beyond what was there before, and how that is known.

    On CUDA as the caching allocator counts them, on a CPU from the allocations that the profiler sees, compiled
    kernels' scratch included.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize()
        return {"bytes": torch.cuda.max_memory_allocated(device) - before, "of": "torch.cuda.max_memory_allocated"}
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    results = profiler.profiler.kineto_results if profiler.profiler else None
    changes = [e for e in results.events() if e.name() == "[memory]"] if results else []
    live = peak = 0
    for event in sorted(changes, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return {"bytes": peak, "of": "the profiler's allocations"}
