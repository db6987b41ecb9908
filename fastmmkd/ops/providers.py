"""Who can run an operation: the Triton kernels, the CUDA and C++ kernels of the extension, or the reference.

`FASTMMKD_PROVIDER=<name>` or `use_provider(<name>)` forces one; otherwise the first that can run and is meant for the
device does. Triton is meant for compute capability 8.0 and later, csrc/cuda for 7.0 and 7.5, where Triton has no path
to the tensor cores; `TRITON_INTERPRET=1` runs the Triton kernels on CPU tensors, slowly, for tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import torch
from torch.torch_version import TorchVersion

from fastmmkd.errors import UserError
from fastmmkd.ops import extension
from fastmmkd.ops.operation import Op

PROVIDERS = ("triton", "cuda", "cpp", "reference")
"""All providers, the preferred first."""
COMPOSED = "composed"
"""Other operations, each run by the provider that it has by itself: what runs an operation that is composed of others
and has no kernels here. Forced, it leaves everything else as it is."""

HAS_TRITON = find_spec("triton") is not None
TRITON = version("triton") if HAS_TRITON else ""
OLDEST_TRITON = "3.6"
"""The first that has what the kernels use, such as `constexpr_function`."""
TRITON_IS_OLD = HAS_TRITON and TorchVersion(TRITON) < OLDEST_TRITON
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DTYPES = {
    "triton": (torch.float32, torch.float16, torch.bfloat16),
    "cuda": (torch.float32, torch.float16, torch.bfloat16),
    "cpp": (torch.float32, torch.bfloat16),
}
MEANT_FOR = {"triton": (8, 0), "cuda": (7, 0)}
"""The least compute capability at which a provider runs without being forced."""

_forced: list[str] = []
_capabilities: dict[torch.device, tuple[int, int]] = {}


@contextmanager
def use_provider(name: str) -> Iterator[None]:
    """Force a provider inside a `with` block; an operation that it cannot run raises `UserError`."""
    if name not in (*PROVIDERS, COMPOSED):
        raise UserError(f"use_provider({name!r}): not a provider; expected one of {', '.join((*PROVIDERS, COMPOSED))}")
    _forced.append(name)
    try:
        yield
    finally:
        _forced.pop()


def forcing() -> tuple[str, str]:
    """The forced provider, or nothing, and what forces it.

    Raises:
        UserError: there is no such provider.
    """
    name, source = (
        (_forced[-1], "use_provider") if _forced else (os.environ.get("FASTMMKD_PROVIDER", ""), "FASTMMKD_PROVIDER")
    )
    if name and name not in (*PROVIDERS, COMPOSED):
        raise UserError(f"{source}={name}: not a provider; expected one of {', '.join((*PROVIDERS, COMPOSED))}")
    return name, source


def preferred(op: Op, device: torch.device, dtypes: Sequence[torch.dtype]) -> str:
    """The provider that runs `op` unless one is forced."""
    last = COMPOSED if op.composed else "reference"
    if device.type == "cpu" and not INTERPRETED:
        return last if obstacle("cpp", op, device, dtypes) else "cpp"
    for provider in ("triton", "cuda"):
        if not (obstacle(provider, op, device, dtypes) or not_meant(provider, device)):
            return provider
    return last


def not_meant(provider: str, device: torch.device) -> str:
    """Why "triton" or "cuda" does not run on a device unless it is forced, or nothing."""
    if INTERPRETED or capability(device) >= MEANT_FOR[provider]:
        return ""
    return f"{provider} is not meant for compute capability {'.'.join(map(str, capability(device)))}"


def obstacle(provider: str, op: Op, device: torch.device, dtypes: Sequence[torch.dtype]) -> str:
    """Why a provider cannot run `op`, or nothing. Runs on every call, so it formats only what it returns."""
    if provider == "reference":
        return ""
    if not op.kernels:
        return f"{op.name} has no kernels"
    unavailable = _UNAVAILABLE[provider](device)
    if unavailable:
        return unavailable
    if provider not in op.kernels:
        return f"{op.name} has no {provider} kernels"
    half = device.type == "cuda" and capability(device) < (8, 0)
    for dtype in dtypes:
        if dtype not in DTYPES[provider] or (dtype == torch.bfloat16 and (half or INTERPRETED)):
            names = [x for x in DTYPES[provider] if x != torch.bfloat16 or not (half or INTERPRETED)]
            return f"{provider} computes in {' and '.join(map(_name, names))} here, not in {_name(dtype)}"
    return ""


def _cpp(device: torch.device) -> str:
    if device.type != "cpu":
        return f"cpp has no kernels for {device.type}"
    return extension.missing


def _cuda(device: torch.device) -> str:
    if device.type != "cuda":
        return f"cuda has no kernels for {device.type}"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return extension.missing or ("" if extension.has_cuda else "the extension was built without CUDA")


def _triton(device: torch.device) -> str:
    if not HAS_TRITON:
        return "triton is not installed"
    if TRITON_IS_OLD:
        return f"triton {TRITON} is too old for the kernels, which need {OLDEST_TRITON} (torch 2.10)"
    if device.type == "cpu" and INTERPRETED:
        return _interpreter_obstacle()
    if device.type != "cuda":
        return f"triton has no kernels for {device.type} (TRITON_INTERPRET=1 interprets them)"
    return "" if torch.cuda.is_available() else "there is no CUDA device"


@cache
def _interpreter_obstacle() -> str:
    """Why the Triton that is here does not interpret, or nothing.

    Before 3.7.1 it turns arrays of one element into numbers, which NumPy no longer does from 2.4 on: a TypeError "only
    0-dimensional arrays can be converted to Python scalars" somewhere inside a kernel.
    """
    if TorchVersion(TRITON) >= "3.7.1" or TorchVersion(np.__version__) < "2.4":
        return ""
    return (
        f"triton {TRITON} does not interpret (TRITON_INTERPRET=1) with numpy {np.__version__}; "
        "install triton >= 3.7.1 or numpy < 2.4"
    )


_UNAVAILABLE = {"cpp": _cpp, "cuda": _cuda, "triton": _triton}
"""Why a provider has no kernels for a device, whatever the operation, or nothing."""


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; (0, 0) where there is none."""
    if device not in _capabilities:
        _capabilities[device] = torch.cuda.get_device_capability(device) if torch.cuda.is_available() else (0, 0)
    return _capabilities[device]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
