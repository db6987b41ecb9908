"""How long an operation takes, forward and backward, by every contender; each is held to the reference first."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from statistics import median
from typing import Any

import torch

from bench.choices import PRECISIONS
from bench.compilation import forget_compiled
from bench.kernel_cases import KernelCase, normal
from fastmmkd import ops
from fastmmkd.ops import reference, use_provider
from fastmmkd.ops.operation import operation
from fastmmkd.ops.providers import obstacle

RUNS, PER_GRAPH = 30, 10
OURS = ("triton", "cuda", "cpp")
SHORT = {dtype: name for name, dtype in PRECISIONS.items()}
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Against the reference in the same precision, relative to the largest value; the parity wall is far stricter."""
Outputs = list[torch.Tensor]


def measure(case: KernelCase, device: torch.device, dry: bool, compiled: bool) -> Iterator[dict[str, Any]]:
    """A record per contender; one that fails says so and does not stop the others."""
    leaves = [x.detach().requires_grad_() for x in case.leaves]
    with torch.no_grad():
        out = case.call(getattr(reference, case.op), *leaves)
    grad = normal(device, out.dtype, *out.shape, seed=8) if leaves else None
    expected = differentiate(case, getattr(reference, case.op), leaves, grad)
    for name, (provider, function) in contenders(case, device, compiled).items():
        record: dict[str, Any] = {"op": case.op, "size": case.size, "dtype": SHORT[case.dtype], "contender": name}
        step = partial(differentiate, case, function, leaves, grad)
        try:
            with use_provider(provider or "reference"):
                error = worst(step(), expected)
                if not error <= TOLERANCE[case.dtype]:
                    raise ValueError(f"differs from the reference by {error:.1e}")
                record["error"] = error
                record["eager_ms"] = eager(step, device, dry)
                record["replayed_ms"] = None if dry else replayed(step)
        except Exception as problem:
            lines = str(problem).splitlines() or [""]
            record["failed"] = f"{type(problem).__name__}: {lines[0]}"
            record["traceback"] = "".join(traceback.format_exception(problem))
        yield record


def differentiate(
    case: KernelCase, function: Callable[..., Any], leaves: Outputs, grad: torch.Tensor | None
) -> Outputs:
    """The result and the gradients of all leaves; the results where nothing has a gradient."""
    out = case.call(function, *leaves)
    if not leaves:
        return [x for tensors in out for x in tensors]
    return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def contenders(
    case: KernelCase, device: torch.device, compiled: bool
) -> dict[str, tuple[str | None, Callable[..., torch.Tensor]]]:
    """Name -> the provider to force, and the function; `compiled`: those of `torch.compile` too."""
    public = getattr(ops, case.op)
    functions: dict[str, tuple[str | None, Callable[..., torch.Tensor]]] = {}
    for provider in OURS:
        if not obstacle(provider, operation(case.op), device, [case.dtype]):
            functions[provider] = provider, public
    functions["reference"] = None, getattr(reference, case.op)
    if device.type == "cuda":
        functions |= {name: (None, function) for name, function in case.others.items()}
    if device.type == "cuda" and compiled:
        forget_compiled()
        functions["compiled reference"] = None, torch.compile(getattr(reference, case.op), dynamic=False)
        functions |= {name: (None, function) for name, function in case.compiled.items()}
    return functions


def worst(outputs: Outputs, expected: Outputs) -> float:
    """The largest error, relative to the largest value of its tensor; infinite where something is not finite."""
    errors = [
        (a.float() - b.float()).abs().max() / b.float().abs().max().clamp_min(1e-20)
        for a, b in zip(outputs, expected, strict=True)
    ]
    error = torch.stack(errors).max().item()
    return error if error == error else float("inf")


def eager(step: Callable[[], Outputs], device: torch.device, dry: bool) -> float:
    """Median milliseconds of a call, the host's work included."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    times = []
    for i in range(5 if dry else RUNS + 5):
        synchronize()
        started = time.perf_counter()
        step()
        synchronize()
        if i >= (2 if dry else 5):
            times.append(1e3 * (time.perf_counter() - started))
    return median(times)


def replayed(step: Callable[[], Outputs]) -> float:
    """Median milliseconds of a call within a CUDA graph of several."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(PER_GRAPH):
            step()
    times = []
    for _ in range(RUNS + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / PER_GRAPH)
    return median(times[3:])
