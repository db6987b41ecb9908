"""Jensen-Shannon lower bound of a mutual information (CorrKD eq. 6); see `fastmmkd.ops.jsd_mutual_information`.

A program takes blocks of the rows of one side, the left or (for the right side's gradient) the right, and goes through
the rows of the other side.

Shape legend: G groups, N rows, H hidden units, P programs of a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastmmkd.kernels.elementary import log_one_plus
from fastmmkd.kernels.launch import launch
from fastmmkd.kernels.pairs import (
    LANES,
    PAIR_CANDIDATES,
    load_split,
    pair_parameters,
    store_split,
    sum_features,
    sum_others,
)
from fastmmkd.kernels.rows import add_up, divide, gradient_of, partial_sums

CANDIDATES = PAIR_CANDIDATES


def jsd_mutual_information(
    left: torch.Tensor, right: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, wanted: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The bound and the gradients of all inputs, see `fastmmkd.ops.declaration.declare_loss`."""
    inputs = left, right, weight, bias = tuple(x.contiguous() for x in (left, right, weight, bias))
    groups, n, hidden = left.shape
    grads = [gradient_of(x, w) for x, w in zip(inputs, wanted, strict=True)]
    loss = left.new_empty(groups, dtype=torch.float32)
    tuned = pair_parameters("jsd_mutual_information", left, n, n)
    programs, shares = divide(groups, n, tuned["BN"], n, tuned["BM"])
    sums = loss, grads[2], grads[3], grads[0], grads[1]
    parts = [*(partial_sums(x, programs * shares) for x in sums[:3]), *(partial_sums(x, shares) for x in sums[3:])]
    args = (left, right, weight, bias, *parts, n, hidden)
    scales = (1.0 / n if n else float("nan"), 1.0 / max(n - 1, 1))
    flags = {f"GRAD_{name}": w for name, w in zip(("LEFT", "RIGHT", "WEIGHT", "BIAS"), wanted, strict=True)}
    launch(_bound, (programs, groups, (1 + wanted[1]) * shares), *args, *scales, shares, **flags, **tuned)
    add_up(*zip(parts, sums, strict=True))
    return loss, *grads


@triton.jit(do_not_specialize=["N", "H", "shares"])
def _bound(
    left,
    right,
    weight,
    bias,
    loss,
    grad_weight,
    grad_bias,
    grad_left,
    grad_right,
    N,
    H,
    scale,
    other_scale,
    shares,
    GRAD_LEFT: tl.constexpr,
    GRAD_RIGHT: tl.constexpr,
    GRAD_WEIGHT: tl.constexpr,
    GRAD_BIAS: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BE: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    unit = (tl.arange(0, BE) * LANES)[:, None] + tl.arange(0, LANES)  # [BE, LANES]
    b_weight = tl.load(weight + group * H + unit, unit < H, 0.0).to(tl.float32)
    b_bias = tl.load(bias + group).to(tl.float32)
    share = tl.program_id(2) % shares
    if tl.program_id(2) < shares:
        b_loss, b_grad_weight, b_grad_bias = _rows(
            left, right, grad_left, b_weight, b_bias, N, H, scale, other_scale, share, shares,
            GRAD_LEFT, GRAD_WEIGHT, BN, BM, BE,
        )  # fmt: skip
        to = (group * shares + share) * tl.num_programs(0) + tl.program_id(0)
        tl.store(loss + to, b_loss)
        if GRAD_WEIGHT:
            tl.store(grad_weight + to * H + unit, b_grad_weight, unit < H)
        if GRAD_BIAS:
            tl.store(grad_bias + to, b_grad_bias)
    elif GRAD_RIGHT:
        _rows(
            right, left, grad_right, b_weight, b_bias, N, H, scale, other_scale, share, shares,
            GRAD_RIGHT, False, BN, BM, BE,
        )  # fmt: skip


@triton.jit
def _rows(
    x,
    others,
    grad,
    b_weight,
    b_bias,
    N,
    H,
    scale,
    other_scale,
    share,
    shares,
    GRAD: tl.constexpr,
    GRAD_WEIGHT: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BE: tl.constexpr,
):
    """The bound of this program's rows and its share of the others, and its gradients in weight `[BE, LANES]` and bias.

    Pairs of different rows are weighted by other_scale, 1 / (N - 1).
    """
    group = tl.program_id(1).to(tl.int64)
    b_loss, b_grad_bias = tl.zeros([BN], tl.float32), tl.zeros([BN], tl.float32)
    b_grad_weight = tl.zeros([BE, BN, LANES], tl.float32)
    for first in range(tl.program_id(0) * BN, N, tl.num_programs(0) * BN):
        row = first + tl.arange(0, BN)  # [BN]
        b_x = load_split(x, group, row, row < N, N, H, BE)
        b_grad = tl.zeros_like(b_x)
        for start in range(share * BM, N, shares * BM):
            other = start + tl.arange(0, BM)  # [BM]
            b_before = b_x[:, None] + load_split(others, group, other, other < N, N, H, BE)[:, :, None]
            b_hidden = tl.where(b_before < 0.0, 0.0, b_before)  # a NaN stays
            b_score = sum_features(b_hidden * b_weight[:, None, None]) + b_bias  # [BM, BN]
            b_joint, b_joint_slope = _log_sigmoid(b_score)
            b_marginal, b_marginal_slope = _log_sigmoid(-b_score)
            inside = (other < N)[:, None] & (row < N)
            own = other[:, None] == row
            b_loss += tl.sum(tl.where(inside, tl.where(own, b_joint, b_marginal * other_scale), 0.0), 0)
            b_slope = tl.where(own, b_joint_slope, -b_marginal_slope * other_scale) * scale
            b_slope = tl.where(inside, b_slope, 0.0)
            b_grad_bias += tl.sum(b_slope, 0)
            if GRAD:
                b_grad += tl.sum(tl.where(b_before > 0.0, b_slope[None, :, :, None], 0.0), 1)
            if GRAD_WEIGHT:
                b_grad_weight += sum_others(b_slope, b_hidden)
        if GRAD:
            store_split(grad, b_grad * b_weight[:, None], group * shares + share, row, row < N, N, H, BE)
    return tl.sum(b_loss, 0) * scale, tl.sum(b_grad_weight, 1), tl.sum(b_grad_bias, 0)


@triton.jit
def _log_sigmoid(x):
    """`-softplus(-x)` and its slope `sigmoid(-x)`."""
    tail = tl.exp(-tl.abs(x))
    slope = tl.where(x < 0.0, 1.0, tail) / (1.0 + tail)
    return tl.where(x < 0.0, x, 0.0) - log_one_plus(tail), slope
