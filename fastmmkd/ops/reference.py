"""The definition of every operation, in plain PyTorch, under its name. Fast implementations are held to these.

`reference.gaussian_mmd` is the `definition` of the entry in `fastmmkd/ops/gaussian_mmd.py`. Definitions run on any
device in any dtype: half precision is computed in float32 and returned in the input's dtype; float64 stays float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastmmkd.ops.operation import OPERATIONS


def __getattr__(name: str) -> Callable[..., Any]:
    if name in OPERATIONS:
        return OPERATIONS[name].definition
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
