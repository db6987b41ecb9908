"""Inputs of the parity tests of `LN(x + r)`, and the names of what comes out."""

import torch

NAMES = ("out", "grad x", "grad residual", "grad weight", "grad bias")


def draw(shape, dtype=torch.float32, residual_dtype=None, parameter_dtype=None, seed=0):
    """x, residual, weight and bias, and the gradient of the output; dtypes are x's unless given."""
    generator = torch.Generator().manual_seed(seed)
    x, residual, grad = (torch.randn(shape, generator=generator) * 3 + 1 for _ in range(3))
    weight, bias = (torch.randn(shape[0], shape[-1], generator=generator) for _ in range(2))
    inputs = [x.to(dtype), residual.to(residual_dtype or dtype)]
    return [*inputs, *(p.to(parameter_dtype or dtype) for p in (weight, bias))], grad.to(dtype)
