"""What a step does besides taking time: operator calls, kernel launches, and the most memory it holds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from fastmmkd.ops import OPERATIONS

Run = Callable[[], object]


class OperatorCalls(TorchDispatchMode):
    """Counts the calls of operators that reach a backend, those of the backward pass included, views among them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


TWO_LAUNCHES = ("aten::baddbmm", "aten::select_backward", "aten::slice_backward")
"""A copy of the bias and a product; zeros and a copy into them."""


class PredictedLaunches(OperatorCalls):
    """Counts what the operators that are called, on whatever device, would launch on a GPU.

    A view and an allocation launch nothing, other operators of PyTorch one kernel (two: `TWO_LAUNCHES`), and those of
    this package what their Triton kernels record. What cuBLAS splits into several kernels is not known.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.launches += self._of(func, args)
        return super().__torch_dispatch__(func, types, args, kwargs)

    def _of(self, func: Any, args: Any) -> int:
        library, name = func.name().split("::")
        if library == "fastmmkd":
            (op,) = (op.name for op in OPERATIONS.values() if name in op.functions)
            kernel = getattr(import_module(f"fastmmkd.kernels.{op}"), name)
            from fastmmkd.kernels.launch import recorded

            with recorded() as launches, PredictedLaunches() as copies:
                kernel(*tree_map_only(torch.Tensor, _without_data, args))
            return len(launches) + copies.launches
        aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if func.is_view or aliases or "empty" in name or name == "detach":
            return 0
        return 2 if func.name().split(".")[0] in TWO_LAUNCHES else 1


def _without_data(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


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
