"""Inputs of the parity tests of `LN(x + r)`, and the names of what comes out."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastmmkd.testing.parity import DEVICE

NAMES = ("out", "grad x", "grad residual", "grad weight", "grad bias")


def draw(
    shape: Sequence[int],
    dtype: torch.dtype = torch.float32,
    residual_dtype: torch.dtype | None = None,
    parameter_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """x, residual, weight and bias, and the gradient of the output; dtypes are x's unless given."""
    generator = torch.Generator().manual_seed(seed)
    x, residual, grad = (torch.randn(shape, generator=generator) * 3 + 1 for _ in range(3))
    weight, bias = (torch.randn(shape[0], shape[-1], generator=generator) for _ in range(2))
    dtypes = (dtype, residual_dtype or dtype, parameter_dtype or dtype, parameter_dtype or dtype, dtype)
    *inputs, grad = (x.to(DEVICE, t) for x, t in zip((x, residual, weight, bias, grad), dtypes, strict=True))
    return inputs, grad
