"""Which implementation of an operation runs, and why: see `fastmmkd.ops.providers`.

Every operation has a definition in plain PyTorch, any device, any dtype, see `fastmmkd.ops.reference`. The other
providers are behind the compiled operations that an operation's own module declares. PyTorch's dispatcher hands them
to the C++ kernels for CPU tensors and, for CUDA tensors, to `launch`: the Triton or the CUDA kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any

import torch

from fastmmkd.errors import UserError
from fastmmkd.ops import reference
from fastmmkd.ops.operation import Op, operation
from fastmmkd.ops.providers import COMPOSED, INTERPRETED, forcing, not_meant, obstacle, preferred


@dataclass(frozen=True)
class Choice:
    """The provider that an operation would use, and the reason in words."""

    op: str
    provider: str
    reason: str


def explain(name: str, *example: torch.Tensor | torch.device | str) -> Choice:
    """Which implementation of an operation runs for tensors like the examples, or for tensors on a device.

    Raises:
        UserError: there is no such operation; a forced provider does not exist, or cannot run it here.
    """
    op = operation(name)
    first = example[0] if example else "cpu"
    device = first.device if isinstance(first, torch.Tensor) else torch.device(first)
    dtypes = [x.dtype for x in example if isinstance(x, torch.Tensor)]
    forced, source = forcing()
    if forced:
        provider = _provider(op, device, dtypes)
        return Choice(name, provider, f"forced by {source}")
    provider = preferred(op, device, dtypes)
    if provider not in ("reference", COMPOSED):
        return Choice(name, provider, f"compiled kernels for {device.type} tensors")
    candidates = ("triton", "cuda") if device.type == "cuda" or INTERPRETED else ("cpp",)
    reasons = (obstacle(c, op, device, dtypes) or not_meant(c, device) for c in candidates)
    return Choice(name, provider, "; ".join(dict.fromkeys(reasons)))


def implementation(op: Op, *tensors: torch.Tensor) -> Callable[..., Any]:
    """The function that runs `op` on these tensors, which are on one device.

    Args:
        op: the operation.
        tensors: the first of its arguments, which must be numbers with a fraction.

    Raises:
        ValueError: one is no tensor, or of integers; it is named.
    """
    for i, x in enumerate(tensors):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            raise ValueError(_not_numbers(op, i, x))
    provider = _provider(op, tensors[0].device, [x.dtype for x in tensors])
    if op.composed and provider == COMPOSED:
        return op.composed
    if op.compiled is None or provider == "reference":
        return getattr(reference, op.name)
    return op.compiled


def _not_numbers(op: Op, i: int, x: object) -> str:
    name, first = f"tensor {i}", list(signature(op.definition).parameters.values())
    if i < len(first) and "Tensor" in str(first[i].annotation):
        name = first[i].name
    found = f"of {_short(x.dtype)}" if isinstance(x, torch.Tensor) else f"a {type(x).__name__}"
    return f"{op.name}: {name} is {found}; expected a tensor of float32, float16, bfloat16 or float64"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _provider(op: Op, device: torch.device, dtypes: list[torch.dtype]) -> str:
    forced, source = forcing()
    if not forced or (forced == COMPOSED and not op.composed):
        return preferred(op, device, dtypes)
    if op.composed and forced not in (*op.kernels, "reference"):
        return COMPOSED
    _require(forced, source, op, device, dtypes)
    return forced


def _require(provider: str, source: str, op: Op, device: torch.device, dtypes: list[torch.dtype]) -> None:
    reason = obstacle(provider, op, device, dtypes)
    if reason:
        raise UserError(f"{source}={provider}: {op.name} cannot run: {reason}")


def launch(name: str, function: str, *args: Any) -> Any:
    """Run a function of the operation `name` (itself, or its gradient) on the device that its first tensor is on."""
    op = operation(name)
    x = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
    provider = _provider(op, x.device, [])
    if provider == "reference":  # it was called by itself, or forced between an operation and its gradient
        provider = "triton" if obstacle("cuda", op, x.device, []) else "cuda"
    kernel = _kernel(provider, name, function)
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return kernel(*args)
    return kernel(*args)


@cache
def _kernel(provider: str, name: str, function: str) -> Callable[..., Any]:
    if provider == "cuda":
        return getattr(torch.ops.fastmmkd_cuda, function).default
    return getattr(import_module(f"fastmmkd.kernels.{name}"), function)
