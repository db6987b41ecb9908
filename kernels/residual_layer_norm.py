"""`LN(x + r)`: a program normalises a block of rows of one group; see `fastmmkd.ops.residual_layer_norm`.

Shape legend: G groups, R rows of a group, D features, P programs of a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastmmkd.kernels.launch import launch
from fastmmkd.kernels.parameters import parameters, power_of_two
from fastmmkd.kernels.rows import add_up

CANDIDATES = [{"BR": rows, "num_warps": warps} for rows in (2, 4, 8, 16, 32) for warps in (1, 2, 4, 8)]
PARTIAL_BLOCKS = 128
"""Programs of a group in the backward pass, each with a partial sum of the affine map's gradient."""


def residual_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """out in x's dtype and layout of a contiguous tensor; mean and 1 / deviation `[G, ...]` in float32."""
    x, residual, weight, bias = (t.contiguous() for t in (x, residual, weight, bias))
    groups, rows, width = _sizes(x)
    out = torch.empty_like(x)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    tuned = _parameters("residual_layer_norm", x, rows, width)
    grid = (triton.cdiv(rows, tuned["BR"]), groups)
    args = (x, residual, weight, bias, out, mean, rstd, rows, width, eps)
    launch(_forward, grid, *args, BD=power_of_two(width), **tuned)
    return out, mean, rstd


def residual_layer_norm_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradient of `x + residual`, and of weight and bias `[G, D]` in the weight's dtype."""
    grad, x, residual, weight = (t.contiguous() for t in (grad, x, residual, weight))
    groups, rows, width = _sizes(x)
    grad_sum = torch.empty_like(x, dtype=torch.promote_types(x.dtype, residual.dtype))
    tuned = _parameters("residual_layer_norm_backward", x, rows, width)
    programs = min(PARTIAL_BLOCKS, triton.cdiv(rows, tuned["BR"]))
    grad_weight, grad_bias = (torch.empty_like(weight) for _ in range(2))
    partial = x.new_empty((2, groups, programs, width), dtype=torch.float32)
    args = (grad, x, residual, weight, mean, rstd, grad_sum, partial, rows, width, programs)
    launch(_backward, (programs, groups), *args, BD=power_of_two(width), **tuned)
    add_up((partial[0], grad_weight), (partial[1], grad_bias))
    return grad_sum, grad_weight, grad_bias


def _sizes(x: torch.Tensor) -> tuple[int, int, int]:
    groups, width = x.shape[0], x.shape[-1]
    return groups, x[0, ..., 0].numel() if groups else 0, width


def _parameters(kernel: str, x: torch.Tensor, rows: int, width: int) -> dict[str, int]:
    default = {"BR": max(1, min(16, 2048 // power_of_two(width))), "num_warps": 4}
    return parameters(kernel, default, x.device, rows=rows, width=width)


@triton.jit
def _forward(x, residual, weight, bias, out, mean, rstd, R, D, eps, BR: tl.constexpr, BD: tl.constexpr):
    group = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * BR + tl.arange(0, BR)  # [BR]
    column = tl.arange(0, BD)  # [BD]
    at = (group * R + row)[:, None] * D + column  # [BR, BD]
    inside = (row < R)[:, None] & (column < D)
    b_sum = tl.load(x + at, inside, 0.0).to(tl.float32) + tl.load(residual + at, inside, 0.0).to(tl.float32)
    b_mean = tl.sum(b_sum, 1) / D  # [BR]
    b_centred = tl.where(inside, b_sum - b_mean[:, None], 0.0)
    b_rstd = 1.0 / tl.sqrt(tl.sum(b_centred * b_centred, 1) / D + eps)
    b_weight = tl.load(weight + group * D + column, column < D, 0.0).to(tl.float32)
    b_bias = tl.load(bias + group * D + column, column < D, 0.0).to(tl.float32)
    b_out = b_centred * b_rstd[:, None] * b_weight + b_bias
    tl.store(out + at, b_out.to(out.dtype.element_ty), inside)
    tl.store(mean + group * R + row, b_mean, row < R)
    tl.store(rstd + group * R + row, b_rstd, row < R)


@triton.jit(do_not_specialize=["P"])
def _backward(grad, x, residual, weight, mean, rstd, grad_sum, partial, R, D, P, BR: tl.constexpr, BD: tl.constexpr):
    program, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    groups = tl.num_programs(1)
    column = tl.arange(0, BD)  # [BD]
    b_weight = tl.load(weight + group * D + column, column < D, 0.0).to(tl.float32)
    b_grad_weight, b_grad_bias = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    for first in range(program * BR, R, P * BR):
        row = first + tl.arange(0, BR)  # [BR]
        at = (group * R + row)[:, None] * D + column  # [BR, BD]
        inside = (row < R)[:, None] & (column < D)
        b_sum = tl.load(x + at, inside, 0.0).to(tl.float32) + tl.load(residual + at, inside, 0.0).to(tl.float32)
        b_mean = tl.load(mean + group * R + row, row < R, 0.0)
        b_rstd = tl.load(rstd + group * R + row, row < R, 0.0)
        b_normed = tl.where(inside, (b_sum - b_mean[:, None]) * b_rstd[:, None], 0.0)
        b_grad = tl.load(grad + at, inside, 0.0).to(tl.float32)
        b_grad_weight += tl.sum(b_grad * b_normed, 0)
        b_grad_bias += tl.sum(b_grad, 0)
        b_grad *= b_weight
        b_along = tl.sum(b_grad * b_normed, 1) / D  # [BR]
        b_grad_sum = (b_grad - tl.sum(b_grad, 1)[:, None] / D - b_normed * b_along[:, None]) * b_rstd[:, None]
        tl.store(grad_sum + at, b_grad_sum.to(grad_sum.dtype.element_ty), inside)
    to = (group * P + program) * D + column
    tl.store(partial + to, b_grad_weight, column < D)
    tl.store(partial + groups * P * D + to, b_grad_bias, column < D)
