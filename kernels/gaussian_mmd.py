"""Squared maximum mean discrepancy (UMDF eqs. 1 to 3); see `fastmmkd.ops.gaussian_mmd`.

A program takes blocks of the 2N joined rows, those of x and then those of y, and compares each row with pairs of an x
and a y, so that equal halves give exactly 0. The bandwidth costs little, linear in N: every program finds it anew.
With 128 samples and BN = 16, BM = 2 that makes 16 x 8 programs of 8 steps each.

Shape legend: G groups, N samples, D features, P programs of a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastmmkd.kernels.launch import launch
from fastmmkd.kernels.pairs import PAIR_CANDIDATES, load_split, pair_parameters, store_split, sum_features, sum_others
from fastmmkd.kernels.parameters import power_of_two
from fastmmkd.kernels.rows import add_up, divide, gradient_of, load_rows, partial_sums

CANDIDATES = PAIR_CANDIDATES


def gaussian_mmd(
    x: torch.Tensor, y: torch.Tensor, wanted: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss and the gradients of x and y, see `fastmmkd.ops.declaration.declare_loss`."""
    x, y = x.contiguous(), y.contiguous()
    groups, n, width = x.shape
    grads = [gradient_of(sample, w) for sample, w in zip((x, y), wanted, strict=True)]
    tuned = pair_parameters("gaussian_mmd", x, 2 * n, n)
    programs, shares = divide(groups, 2 * n, tuned["BN"], n, tuned["BM"])
    loss = x.new_empty(groups, dtype=torch.float32)
    partial, parts = partial_sums(loss, programs * shares), [partial_sums(grad, shares) for grad in grads]
    scale = n**-2 if n else float("nan")
    flags = {"GRAD_X": wanted[0], "GRAD_Y": wanted[1]}
    args = (x, y, partial, *parts, n, width, scale)
    # With FMAs, which the compiler chooses for x as it likes and otherwise for y, equal halves would differ.
    flags["enable_fp_fusion"] = False
    launch(_discrepancy, (programs, groups, shares), *args, **flags, BD=power_of_two(width), **tuned)
    add_up((partial, loss), *zip(parts, grads, strict=True))
    return loss, grads[0], grads[1]


@triton.jit(do_not_specialize=["N", "D"])
def _discrepancy(
    x,
    y,
    partial,
    grad_x,
    grad_y,
    N,
    D,
    scale,
    GRAD_X: tl.constexpr,
    GRAD_Y: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BE: tl.constexpr,
    BD: tl.constexpr,
):
    program, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    share, shares = tl.program_id(2), tl.num_programs(2)
    sigma = _mean_squared_distance(x, y, group, N, D, BN, BD)
    b_loss = tl.zeros([BN], tl.float32)
    for first in range(program * BN, 2 * N, tl.num_programs(0) * BN):
        row = first + tl.arange(0, BN)  # [BN]
        of_x, of_y = row < N, (row >= N) & (row < 2 * N)
        b_rows = load_split(x, group, row, of_x, N, D, BE) + load_split(y, group, row - N, of_y, N, D, BE)
        b_sign = tl.where(of_x, 1.0, tl.where(of_y, -1.0, 0.0))
        b_grad = tl.zeros_like(b_rows)
        for start in range(share * BM, N, shares * BM):
            other = start + tl.arange(0, BM)  # [BM]
            b_to_x = b_rows[:, None] - load_split(x, group, other, other < N, N, D, BE)[:, :, None]
            b_to_y = b_rows[:, None] - load_split(y, group, other, other < N, N, D, BE)[:, :, None]
            b_kernel_x, b_pull_x = _kernel(b_to_x, sigma)  # [BM, BN]
            b_kernel_y, b_pull_y = _kernel(b_to_y, sigma)
            inside = (other < N)[:, None]
            b_loss += b_sign * tl.sum(tl.where(inside, b_kernel_x - b_kernel_y, 0.0), 0)
            if GRAD_X or GRAD_Y:
                b_pull_x = tl.where(inside, b_pull_x, 0.0)
                b_pull_y = tl.where(inside, b_pull_y, 0.0)
                b_grad += sum_others(b_pull_x, b_to_x) - sum_others(b_pull_y, b_to_y)
        b_grad *= -b_sign[:, None] * scale / sigma
        if GRAD_X:
            store_split(grad_x, b_grad, group * shares + share, row, of_x, N, D, BE)
        if GRAD_Y:
            store_split(grad_y, b_grad, group * shares + share, row - N, of_y, N, D, BE)
    to = (group * shares + share) * tl.num_programs(0) + program
    tl.store(partial + to, tl.sum(b_loss, 0) * scale)


@triton.jit
def _kernel(b_apart, sigma):
    """Of differences `[BE, BM, BN, LANES]`: `sum_u k_u` for u = 1/4 .. 4 and `4 sum_u k_u / u`, `[BM, BN]` each."""
    b_four = tl.exp(sum_features(b_apart * b_apart) / (-4.0 * sigma))
    b_two = b_four * b_four
    b_one = b_two * b_two
    b_half = b_one * b_one
    b_quarter = b_half * b_half
    b_pull = 16.0 * b_quarter + 8.0 * b_half + 4.0 * b_one + 2.0 * b_two + b_four
    return b_quarter + b_half + b_one + b_two + b_four, b_pull


@triton.jit
def _mean_squared_distance(x, y, group, N, D, BN: tl.constexpr, BD: tl.constexpr):
    """Over all pairs of different rows of the joined 2N: `2 / (2N - 1)` times the sum of squared deviations.

    Deviations are from a mean found relative to the first row, and corrected for that mean's error.
    """
    column = tl.arange(0, BD)
    b_first = tl.load(x + group * N * D + column, (column < D) & (N > 0), 0.0).to(tl.float32)  # [BD]
    b_mean = tl.zeros([BD], tl.float32)
    for start in range(0, N, BN):
        b_x, b_y = _deviations(x, y, b_first, group, start, N, D, BN, BD)
        b_mean += tl.sum(b_x, 0) + tl.sum(b_y, 0)
    b_mean = b_first + b_mean / (2.0 * N)
    b_rest, b_squares = tl.zeros([BD], tl.float32), tl.zeros([BD], tl.float32)
    for start in range(0, N, BN):
        b_x, b_y = _deviations(x, y, b_mean, group, start, N, D, BN, BD)
        b_rest += tl.sum(b_x, 0) + tl.sum(b_y, 0)
        b_squares += tl.sum(b_x * b_x, 0) + tl.sum(b_y * b_y, 0)
    sigma = 2.0 * tl.sum(b_squares - b_rest * (b_rest / (2.0 * N)), 0) / (2.0 * N - 1.0)
    return tl.where(sigma < 1.17549435e-38, 1.17549435e-38, sigma)  # all rows identical; a NaN stays


@triton.jit
def _deviations(x, y, b_centre, group, start, N, D, BN: tl.constexpr, BD: tl.constexpr):
    row = start + tl.arange(0, BN)  # [BN]
    b_x = load_rows(x, group, row, row < N, N, D, BD) - b_centre
    b_y = load_rows(y, group, row, row < N, N, D, BD) - b_centre
    return tl.where((row < N)[:, None], b_x, 0.0), tl.where((row < N)[:, None], b_y, 0.0)
