"""Vectors on a common scale."""

from __future__ import annotations

import torch

from fastmmkd.ops.precision import accumulation


def unit_length(x: torch.Tensor) -> torch.Tensor:
    """`x / |x|` along the last axis, `[..., d]` -> `[..., d]`; a zero vector stays zero, and its gradient is 0."""
    wide = accumulation(x)
    square = wide.square().sum(-1, keepdim=True)
    there = square > 0
    return (wide * torch.where(there, square, 1.0).rsqrt() * there).to(x.dtype)
