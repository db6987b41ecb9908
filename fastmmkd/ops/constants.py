"""Tensors that depend on nothing but sizes: made once for each device and dtype, no part of a module's state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_made: dict[tuple[Any, ...], torch.Tensor] = {}


def constant(
    make: Callable[..., torch.Tensor], *sizes: Any, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """`make(*sizes, device)` in a dtype; the same tensor every time, so nobody may write to it.

    A compiler traces `make` itself. A capture of a CUDA graph uses what its warm-up has made; a tensor made inside a
    capture would lie in the graph's memory, and is not kept.
    """
    if torch.compiler.is_compiling():
        return make(*sizes, device).to(dtype)
    key = (make, *sizes, device, dtype)
    if key in _made:
        return _made[key]
    with torch.inference_mode(False), torch.no_grad():
        made = make(*sizes, device).to(dtype)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if type(made) is torch.Tensor and not capturing:  # not the stand-in of a tracer
        _made[key] = made
    return made
