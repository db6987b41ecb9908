"""Which implementation of an operation runs, and why.

Every operation has a reference: plain PyTorch, any device, any dtype. "cpp", the compiled extension, has kernels for
CPU tensors in float32 and bfloat16. The first provider that can run does; `FASTMMKD_PROVIDER=<name>` or
`use_provider(<name>)` forces one, which fails where it cannot run.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fastmmkd.errors import UserError
from fastmmkd.ops import extension, library, library_draw, library_losses, reference

PROVIDERS = ("triton", "cuda", "cpp", "reference")
"""All providers, the preferred first."""

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

CPP_DTYPES = (torch.float32, torch.bfloat16)


@dataclass(frozen=True)
class Choice:
    """The provider that an operation would use, and the reason in words."""

    op: str
    provider: str
    reason: str


_implementations: dict[str, dict[str, Callable[..., Any]]] = {
    op: {
        name: getattr(module, op)
        for name, module in (
            ("cpp", library),
            ("cpp", library_draw),
            ("cpp", library_losses),
            ("reference", reference),
        )
        if hasattr(module, op)
    }
    for op in OPERATIONS
}
_forced: list[str] = []


def explain(op: str, *example: torch.Tensor | torch.device | str) -> Choice:
    """Which implementation of `op` runs for tensors like the examples, or for tensors on a device.

    Raises:
        UserError: a forced provider does not exist, or cannot run `op` here.
    """
    device = example[0] if example else "cpu"
    tensors = tuple(x for x in example if isinstance(x, torch.Tensor))
    kind = device.device.type if isinstance(device, torch.Tensor) else torch.device(device).type
    obstacle = _cpp_obstacle(op, kind, tensors)
    forced, source = _forcing()
    if not forced:
        return (
            Choice(op, "reference", obstacle) if obstacle else Choice(op, "cpp", f"compiled kernels for {kind} tensors")
        )
    if forced not in PROVIDERS:
        raise UserError(f"{source}={forced}: not a provider; expected one of {', '.join(PROVIDERS)}")
    if forced not in _implementations[op]:
        names = ", ".join(_implementations[op])
        raise UserError(f"{source}={forced}: {op} has no such implementation here; it has {names}")
    if forced == "cpp" and obstacle:
        raise UserError(f"{source}={forced}: {op} cannot run: {obstacle}")
    return Choice(op, forced, f"forced by {source}")


def implementation(op: str, *tensors: torch.Tensor) -> Callable[..., Any]:
    """The function that runs `op` on these tensors, which are on one device."""
    if _forcing()[0]:
        return _implementations[op][explain(op, *tensors).provider]
    return _implementations[op]["reference" if _cpp_obstacle(op, tensors[0].device.type, tensors) else "cpp"]


def _forcing() -> tuple[str, str]:
    """The forced provider, or nothing, and what forces it."""
    return (_forced[-1], "use_provider") if _forced else (os.environ.get("FASTMMKD_PROVIDER", ""), "FASTMMKD_PROVIDER")


def _cpp_obstacle(op: str, device: str, tensors: tuple[torch.Tensor, ...]) -> str:
    """Why the extension cannot run `op`, or nothing. Runs on every call, so it formats only what it returns."""
    if device != "cpu":
        return f"the extension has no kernels for {device}"
    if "cpp" not in _implementations[op]:
        return f"the extension has no {op}"
    if extension.missing:
        return extension.missing
    for x in tensors:
        if x.dtype not in CPP_DTYPES:
            return f"the extension computes in float32 and bfloat16, not in {str(x.dtype).removeprefix('torch.')}"
    return ""


@contextmanager
def use_provider(name: str) -> Iterator[None]:
    """Force a provider inside a `with` block; an operation that it cannot run raises `UserError`."""
    if name not in PROVIDERS:
        raise UserError(f"use_provider({name!r}): not a provider; expected one of {', '.join(PROVIDERS)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
