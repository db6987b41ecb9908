"""Which implementation of an operation runs, and why.

Every operation has a reference (plain PyTorch, any device). Other providers register themselves for a device type;
the first one that fits a tensor's device runs. `FASTMMKD_PROVIDER=<name>` or `use_provider(<name>)` forces one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from fastmmkd.errors import UserError
from fastmmkd.ops import reference

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


@dataclass(frozen=True)
class Choice:
    """The provider that an operation would use, and the reason in words."""

    op: str
    provider: str
    reason: str


_implementations: dict[str, dict[str, Callable[..., Any]]] = {
    op: {"reference": getattr(reference, op)} for op in OPERATIONS
}
_forced: list[str] = []


def explain(op: str, device: torch.device | str = "cpu") -> Choice:
    """Which implementation of `op` runs for tensors on `device`.

    Raises:
        UserError: a forced provider does not exist, or has no implementation of `op`.
    """
    available = _implementations[op]
    forced = _forced[-1] if _forced else os.environ.get("FASTMMKD_PROVIDER", "")
    if forced:
        source = "use_provider" if _forced else "FASTMMKD_PROVIDER"
        if forced not in PROVIDERS:
            raise UserError(f"{source}={forced}: not a provider; expected one of {', '.join(PROVIDERS)}")
        if forced not in available:
            raise UserError(f"{source}={forced}: {op} has no such implementation here; it has {', '.join(available)}")
        return Choice(op, forced, f"forced by {source}")
    return Choice(op, "reference", f"the only implementation for {torch.device(device).type} in this installation")


def implementation(op: str, device: torch.device) -> Callable[..., Any]:
    """The function that runs `op` for tensors on `device`."""
    return _implementations[op][explain(op, device).provider]


@contextmanager
def use_provider(name: str) -> Iterator[None]:
    """Force a provider inside a `with` block; an operation that lacks it raises `UserError`."""
    if name not in PROVIDERS:
        raise UserError(f"use_provider({name!r}): not a provider; expected one of {', '.join(PROVIDERS)}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()
