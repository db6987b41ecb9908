"""`LN(x + r)`, the join of every residual block."""

import torch

from fastmmkd.ops.registry import implementation


def residual_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    """Layer normalisation of `x + residual` over the last axis, with one affine map per group.

    Args:
        x, residual: `[G, ..., d]`, the same shape; the sum is taken in fp32 or better.
        weight, bias: `[G, d]`.

    Returns:
        `[G, ..., d]` in x's dtype.
    """
    if x.shape != residual.shape:
        raise ValueError(f"x is {tuple(x.shape)}, residual is {tuple(residual.shape)}; expected the same shape")
    if weight.shape != (x.shape[0], x.shape[-1]):
        raise ValueError(f"weight is {tuple(weight.shape)}; expected {(x.shape[0], x.shape[-1])}")
    return implementation("residual_layer_norm", x, residual, weight, bias)(x, residual, weight, bias, eps)
