"""Linear maps of groups, bias and relu included; see `fastmmkd.ops.grouped_linear`.

Sizes are small: on a large GPU a product takes about as long as a launch, so the forward pass is one launch, and so is
the backward pass: some of its programs own a tile of x's gradient, the others one of the weight's, and with it a part
of the bias'. The gradient of relu is taken where the gradient is read.

Sizes and strides come in units of U, a power of two: what is known to be a multiple of 8 is loaded 16 bytes at a time,
and Triton's own specialisation only sees multiples of 16, which widths such as 40 are not.

Shape legend: G groups, R rows of a group, N features of x, M of the result; P parts that the rows of a group are
divided into for the weight's gradient; BR, BN, BM sizes of blocks, BK of the rows that are added up at a time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fastmmkd.kernels.launch import launch, tensor_cores
from fastmmkd.kernels.parameters import parameters, power_of_two
from fastmmkd.kernels.rows import add_up, partial_sums

CANDIDATES = [
    {"BR": rows, "BK": added, "BN": features, "BM": features, "num_warps": warps}
    for rows, added, warps in (
        (32, 64, 2),
        (32, 64, 4),
        (64, 64, 2),
        (64, 64, 4),
        (64, 128, 4),
        (128, 128, 4),
        (16, 64, 2),
    )
    for features in (32, 64)
]
ROWS_OF_A_PART = 1024
"""More are divided among programs, whose sums another launch adds up."""
LEAST_OF_A_DOT = 16
LARGEST_UNIT = 8


def grouped_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool) -> torch.Tensor:
    """`[..., M]` for x's `[..., N]`, contiguous, in x's dtype."""
    out = x.new_empty((*x.shape[:-1], weight.shape[-1]))
    rows, weights = _rows(x, weight), _matrices(weight)
    groups, count, n = rows.shape
    m = weight.shape[-1]
    biases = weight if bias is None else bias.contiguous()
    sizes = _sizes("grouped_linear", x, count, n, m)
    del sizes["BK"]
    grid = (triton.cdiv(count, sizes["BR"]) * triton.cdiv(m, sizes["BM"]), groups)
    unit, views = _in_units([n, m], rows, weights)
    args = (*views, biases, out, count, n // unit, m // unit)
    launch(_forward, grid, *args, BIASED=bias is not None, RELU=relu, U=unit, **sizes)
    return out


def grouped_linear_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, relu: bool, wanted: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of x, weight and bias, contiguous; empty where none is wanted, but for the bias' with relu."""
    rows, weights, grads = _rows(x, weight), _matrices(weight), _rows(grad, weight)
    groups, count, n = rows.shape
    m = weight.shape[-1]
    of_x, of_weight, of_bias = wanted[0], wanted[1], relu or wanted[2]
    grad_x = x.new_empty(x.shape if of_x else (0,))
    grad_weight = weight.new_empty(weight.shape if of_weight else (0,))
    grad_bias = weight.new_empty((*weight.shape[:-2], m) if of_bias else (0,))
    sizes = _sizes("grouped_linear_backward", x, count, n, m)
    parts = max(1, triton.cdiv(count, ROWS_OF_A_PART))
    x_tiles = triton.cdiv(count, sizes["BR"]) * triton.cdiv(n, sizes["BN"]) if of_x else 0
    weight_tiles = triton.cdiv(n, sizes["BN"]) * triton.cdiv(m, sizes["BM"]) if of_weight else 0
    tiles = x_tiles + parts * (weight_tiles or triton.cdiv(m, sizes["BM"]) * of_bias)
    totals = grad_weight.view(-1, n * m), grad_bias.view(-1, m)
    sums = [partial_sums(total, parts) for total in totals]
    unit, views = _in_units([n, m], grads, rows, weights)
    args = (*views, out, grad_x, *sums, count, n // unit, m // unit, x_tiles, parts)
    flags = {"RELU": relu, "OF_WEIGHT": of_weight, "OF_BIAS": of_bias, "U": unit}
    launch(_backward, (tiles, groups), *args, **flags, **sizes)
    add_up(*zip(sums, totals, strict=True))
    return grad_x, grad_weight, grad_bias


def _rows(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`[G, R, ...]`, whose last stride is 1."""
    groups = math.prod(weight.shape[:-2])
    if x.dim() != 3 or len(x) != groups:
        x = x.reshape(groups, math.prod(x.shape[:-1]) // groups, x.shape[-1])
    return x if x.stride(2) == 1 else x.contiguous()


def _matrices(weight: torch.Tensor) -> torch.Tensor:
    """`[G, N, M]`, whose last stride is 1."""
    if weight.dim() > 3:
        weight = weight.flatten(0, -3)
    return weight if weight.stride(2) == 1 else weight.contiguous()


def _in_units(sizes: Sequence[int], *views: torch.Tensor) -> tuple[int, list[Any]]:
    """The largest unit that sizes and strides, of groups and of rows, are multiples of; views with theirs in units."""
    strides = [stride for x in views for stride in x.stride()[:2]]
    unit = math.gcd(LARGEST_UNIT, *sizes, *strides)
    return unit, [of_x for x in views for of_x in (x, x.stride(0) // unit, x.stride(1) // unit)]


def _sizes(kernel: str, x: torch.Tensor, rows: int, n: int, m: int) -> dict[str, Any]:
    """Sizes of blocks, num_warps and num_stages."""
    half = x.element_size() == 2 and tensor_cores(x.device)
    most, added = (64, 64) if half else (32, 32)
    own = 64 if half and rows > 256 else 32
    default = {"BR": own, "BK": added, "BN": most, "BM": most, "num_warps": 4, "num_stages": 3 if half else 2}
    tuned = parameters(kernel, default, x.device, R=rows, N=n, M=m)
    return tuned | {"BN": _block(n, tuned["BN"]), "BM": _block(m, tuned["BM"])}


def _block(size: int, most: int) -> int:
    return max(LEAST_OF_A_DOT, min(most, power_of_two(size)))


@triton.jit(do_not_specialize=["R"])
def _forward(
    x,
    x_group,
    x_row,
    weight,
    w_group,
    w_row,
    bias,
    out,
    R,
    N,
    M,
    BIASED: tl.constexpr,
    RELU: tl.constexpr,
    U: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    N, M, x_row, w_row = N * U, M * U, x_row * U, w_row * U
    group = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(M, BM)
    row, m = tl.program_id(0) // across * BR, tl.program_id(0) % across * BM
    x += group * x_group * U
    weight += group * w_group * U
    b_out = tl.zeros([BR, BM], tl.float32)
    for n in range(0, N, BN):
        b_x = _tile(x, x_row, row, n, R, N, BR, BN)
        b_out = tl.dot(b_x, _tile(weight, w_row, n, m, N, M, BN, BM), b_out, input_precision="ieee")
    if BIASED:
        column = m + tl.arange(0, BM)
        b_out += tl.load(bias + group * M + column, column < M, 0.0).to(tl.float32)
    if RELU:
        b_out = tl.maximum(b_out, 0.0)
    _store_tile(out + group * R * M, row, m, R, M, b_out)


@triton.jit(do_not_specialize=["R", "x_tiles", "P"])
def _backward(
    grad,
    g_group,
    g_row,
    x,
    x_group,
    x_row,
    weight,
    w_group,
    w_row,
    out,
    grad_x,
    grad_weight,
    grad_bias,
    R,
    N,
    M,
    x_tiles,
    P,
    RELU: tl.constexpr,
    OF_WEIGHT: tl.constexpr,
    OF_BIAS: tl.constexpr,
    U: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
):
    N, M, g_row, x_row, w_row = N * U, M * U, g_row * U, x_row * U, w_row * U
    group = tl.program_id(1).to(tl.int64)
    tile = tl.program_id(0)
    grad += group * g_group * U
    out += group * R * M
    if tile < x_tiles:
        across = tl.cdiv(N, BN)
        row, n = tile // across * BR, tile % across * BN
        weight += group * w_group * U
        b_grad_x = tl.zeros([BR, BN], tl.float32)
        for m in range(0, M, BM):
            b_grad = _gradient(grad, g_row, out, row, m, R, M, RELU, BR, BM)
            b_weight = _tile(weight, w_row, n, m, N, M, BN, BM)
            b_grad_x = tl.dot(b_grad, tl.trans(b_weight), b_grad_x, input_precision="ieee")
        _store_tile(grad_x + group * R * N, row, n, R, N, b_grad_x)
    else:
        part, own = (tile - x_tiles) % P, (tile - x_tiles) // P
        across = tl.cdiv(M, BM)
        n, m = own // across * BN, own % across * BM
        x += group * x_group * U
        share = tl.cdiv(tl.cdiv(R, P), BK) * BK
        b_grad_weight = tl.zeros([BN, BM], tl.float32)
        b_grad_bias = tl.zeros([BM], tl.float32)
        for row in range(part * share, tl.minimum(part * share + share, R), BK):
            b_grad = _gradient(grad, g_row, out, row, m, R, M, RELU, BK, BM)
            if OF_WEIGHT:
                b_x = _tile(x, x_row, row, n, R, N, BK, BN)
                b_grad_weight = tl.dot(tl.trans(b_x), b_grad, b_grad_weight, input_precision="ieee")
            if OF_BIAS:
                b_grad_bias += tl.sum(b_grad.to(tl.float32), 0)
        at = group * P + part
        if OF_WEIGHT:
            _store_tile(grad_weight + at * N * M, n, m, N, M, b_grad_weight)
        if OF_BIAS:
            column = m + tl.arange(0, BM)
            to = grad_bias + at * M + column
            tl.store(to, b_grad_bias.to(grad_bias.dtype.element_ty), (column < M) & (own < across))


@triton.jit
def _wide(x):
    """int64, also of what the interpreter has as a number of Python's."""
    return x + tl.zeros([], tl.int64)


@triton.jit
def _tile(matrix, stride, row, column, R, C, BR: tl.constexpr, BC: tl.constexpr):
    """`[BR, BC]` of a matrix `[R, C]` from (row, column) on, 0 beyond it."""
    rows, columns = tl.arange(0, BR)[:, None], tl.arange(0, BC)
    inside = (row + rows < R) & (column + columns < C)
    return tl.load(matrix + _wide(row) * stride + column + rows * stride + columns, inside, 0.0)


@triton.jit
def _gradient(grad, stride, out, row, m, R, M, RELU: tl.constexpr, BR: tl.constexpr, BM: tl.constexpr):
    """The same of the result's gradient, before relu."""
    b_grad = _tile(grad, stride, row, m, R, M, BR, BM)
    if RELU:
        b_grad = tl.where(_tile(out, M, row, m, R, M, BR, BM) > 0, b_grad, 0.0)
    return b_grad


@triton.jit
def _store_tile(matrix, row, column, R, C, b_tile):
    """Into a contiguous matrix `[R, C]` from (row, column) on."""
    rows, columns = tl.arange(0, b_tile.shape[0])[:, None], tl.arange(0, b_tile.shape[1])
    to = matrix + _wide(row) * C + column + rows * C + columns
    tl.store(to, b_tile.to(to.dtype.element_ty), (row + rows < R) & (column + columns < C))
