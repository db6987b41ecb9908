"""Jensen-Shannon divergence of softmax distributions (UMDF eqs. 4 and 5); see `fastmmkd.ops.js_divergence`.

Shape legend: G groups, N samples, K classes, P programs of a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastmmkd.kernels.elementary import log_ratio
from fastmmkd.kernels.launch import launch
from fastmmkd.kernels.parameters import parameters, power_of_two
from fastmmkd.kernels.rows import add_up, divide, gradient_of, load_rows, partial_sums, store_rows

CANDIDATES = [{"BN": rows, "num_warps": warps} for rows in (16, 32, 64, 128) for warps in (1, 2, 4, 8)]


def js_divergence(
    logits_a: torch.Tensor, logits_b: torch.Tensor, wanted: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss and the gradients of both logits, see `fastmmkd.ops.declaration.declare_loss`."""
    logits_a, logits_b = logits_a.contiguous(), logits_b.contiguous()
    groups, n, classes = logits_a.shape
    grads = [gradient_of(x, w) for x, w in zip((logits_a, logits_b), wanted, strict=True)]
    block = min(power_of_two(n), max(1, 2048 // power_of_two(classes)))
    tuned = parameters("js_divergence", {"BN": block, "num_warps": 4}, logits_a.device, n=n, classes=classes)
    programs, _ = divide(groups, n, tuned["BN"])
    loss = logits_a.new_empty(groups, dtype=torch.float32)
    partial = partial_sums(loss, programs)
    scale = 0.5 / n if n else float("nan")
    args = (logits_a, logits_b, partial, *grads, n, classes, scale)
    flags = {"GRAD_A": wanted[0], "GRAD_B": wanted[1]}
    launch(_diverge, (programs, groups), *args, **flags, BK=power_of_two(classes), **tuned)
    add_up((partial, loss))
    return loss, grads[0], grads[1]


@triton.jit(do_not_specialize=["N", "K"])
def _diverge(
    logits_a,
    logits_b,
    partial,
    grad_a,
    grad_b,
    N,
    K,
    scale,
    GRAD_A: tl.constexpr,
    GRAD_B: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    program, group = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b_loss = tl.zeros([BN], tl.float32)
    for first in range(program * BN, N, tl.num_programs(0) * BN):
        row = first + tl.arange(0, BN)  # [BN]
        inside = (row < N)[:, None] & (tl.arange(0, BK) < K)
        b_log_a = _log_softmax(load_rows(logits_a, group, row, row < N, N, K, BK), K, BK)  # [BN, BK]
        b_log_b = _log_softmax(load_rows(logits_b, group, row, row < N, N, K, BK), K, BK)
        # p the larger and q the smaller probability: ln(p/m) = ln(2 / (1 + q/p)), and ln(q/m) = ln(p/m) + ln(q/p).
        b_apart = tl.where(b_log_a < b_log_b, b_log_a - b_log_b, b_log_b - b_log_a)
        b_ratio = tl.exp(b_apart)
        b_of_larger = log_ratio((1.0 - b_ratio) / (3.0 + b_ratio))
        b_of_smaller = b_of_larger + b_apart
        b_over_a = tl.where(b_log_a < b_log_b, b_of_smaller, b_of_larger)
        b_over_b = tl.where(b_log_a < b_log_b, b_of_larger, b_of_smaller)
        b_p_a, b_p_b = tl.exp(b_log_a), tl.exp(b_log_b)
        b_from_a = tl.sum(tl.where(inside, b_p_a * b_over_a, 0.0), 1)  # [BN]
        b_from_b = tl.sum(tl.where(inside, b_p_b * b_over_b, 0.0), 1)
        b_loss += b_from_a + b_from_b
        if GRAD_A:
            b_grad = b_p_a * (b_over_a - b_from_a[:, None]) * scale
            store_rows(grad_a, b_grad, group, row, row < N, N, K, BK)
        if GRAD_B:
            b_grad = b_p_b * (b_over_b - b_from_b[:, None]) * scale
            store_rows(grad_b, b_grad, group, row, row < N, N, K, BK)
    tl.store(partial + group * tl.num_programs(0) + program, tl.sum(b_loss, 0) * scale)


@triton.jit
def _log_softmax(b_logits, K, BK: tl.constexpr):
    """`[BN, BK]`, of the first K of a row; a row with a NaN is NaN."""
    inside = tl.arange(0, BK) < K
    b_shifted = b_logits - tl.max(tl.where(inside, b_logits, float("-inf")), 1)[:, None]
    return b_shifted - tl.log(tl.sum(tl.where(inside, tl.exp(b_shifted), 0.0), 1))[:, None]
