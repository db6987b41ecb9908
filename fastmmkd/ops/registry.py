"""Which implementation of an operation runs, and why: see `fastmmkd.ops.providers`.

Every operation has a reference: plain PyTorch, any device, any dtype. The other providers are behind the compiled
operations of `fastmmkd.ops.library*`, which PyTorch's dispatcher hands to the C++ kernels for CPU tensors and, for
CUDA tensors, to what this module registers: the Triton or the CUDA kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch

from fastmmkd.errors import UserError
from fastmmkd.ops import library, library_draw, library_losses, reference
from fastmmkd.ops.providers import INTERPRETED, forcing, not_meant, obstacle, preferred

OPERATIONS = (
    "cross_attention",
    "residual_layer_norm",
    "gaussian_mmd",
    "js_divergence",
    "pairwise_contrastive",
    "prototype_similarity",
    "jsd_mutual_information",
    "missing_draw",
)
BACKWARD = "_backward"
"""What the name of an operation's gradient ends in; losses have none, they compute it in the forward pass."""


@dataclass(frozen=True)
class Choice:
    """The provider that an operation would use, and the reason in words."""

    op: str
    provider: str
    reason: str


_compiled: dict[str, Callable[..., Any]] = {
    op: getattr(module, op)
    for op in OPERATIONS
    for module in (library, library_draw, library_losses)
    if hasattr(module, op)
}


def explain(op: str, *example: torch.Tensor | torch.device | str) -> Choice:
    """Which implementation of `op` runs for tensors like the examples, or for tensors on a device.

    Raises:
        UserError: a forced provider does not exist, or cannot run `op` here.
    """
    first = example[0] if example else "cpu"
    device = first.device if isinstance(first, torch.Tensor) else torch.device(first)
    dtypes = [x.dtype for x in example if isinstance(x, torch.Tensor)]
    forced, source = forcing()
    if forced:
        _require(forced, source, op, device, dtypes)
        return Choice(op, forced, f"forced by {source}")
    provider = preferred(op, device, dtypes)
    if provider != "reference":
        return Choice(op, provider, f"compiled kernels for {device.type} tensors")
    candidates = ("triton", "cuda") if device.type == "cuda" or INTERPRETED else ("cpp",)
    reasons = (obstacle(c, op, device, dtypes) or not_meant(c, device) for c in candidates)
    return Choice(op, provider, "; ".join(dict.fromkeys(reasons)))


def implementation(op: str, *tensors: torch.Tensor) -> Callable[..., Any]:
    """The function that runs `op` on these tensors, which are on one device."""
    provider = _provider(op, tensors[0].device, [x.dtype for x in tensors])
    return getattr(reference, op) if provider == "reference" else _compiled[op]


def _provider(op: str, device: torch.device, dtypes: list[torch.dtype]) -> str:
    forced, source = forcing()
    if not forced:
        return preferred(op, device, dtypes)
    _require(forced, source, op, device, dtypes)
    return forced


def _require(provider: str, source: str, op: str, device: torch.device, dtypes: list[torch.dtype]) -> None:
    reason = obstacle(provider, op, device, dtypes)
    if reason:
        raise UserError(f"{source}={provider}: {op} cannot run: {reason}")


def _launch(name: str, *args: Any) -> Any:
    """Run a compiled operation, or the gradient of one, on the device that its first tensor is on."""
    x = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
    op = name.removesuffix(BACKWARD)
    provider = _provider(op, x.device, [])
    if provider == "reference":  # it was called by itself, or forced between an operation and its gradient
        provider = "triton" if obstacle("cuda", op, x.device, []) else "cuda"
    kernel = _kernel(provider, name)
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            return kernel(*args)
    return kernel(*args)


@cache
def _kernel(provider: str, name: str) -> Callable[..., Any]:
    if provider == "cuda":
        return getattr(torch.ops.fastmmkd_cuda, name).default
    return getattr(import_module(f"fastmmkd.kernels.{name.removesuffix(BACKWARD)}"), name)


for _name in (*OPERATIONS, *(f"{op}{BACKWARD}" for op in ("cross_attention", "residual_layer_norm"))):
    library.LIBRARY.impl(_name, partial(_launch, _name), "CPU" if INTERPRETED else "CUDA")
