"""Sample-level contrastive distillation (CorrKD eq. 1); see `fastmmkd.ops.pairwise_contrastive`.

A program takes blocks of the rows of one side, the student's or (for the teacher's gradient) the teacher's, and goes
through the rows of the other side. Distances are norms of differences: products of rows would cancel.

Shape legend: G groups, N rows of a side, M rows of the other side, D features, P programs of a group.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastmmkd.kernels.launch import launch
from fastmmkd.kernels.pairs import PAIR_CANDIDATES, load_split, pair_parameters, store_split, sum_features, sum_others
from fastmmkd.kernels.rows import add_up, divide, gradient_of, partial_sums

CANDIDATES = PAIR_CANDIDATES


def pairwise_contrastive(
    student: torch.Tensor, teacher: torch.Tensor, eta: float, offset: int, mean: bool, wanted: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss and the gradients of student and teacher, see `fastmmkd.ops.declaration.declare_loss`."""
    student, teacher = student.contiguous(), teacher.contiguous()
    groups, n, width = student.shape
    rows = teacher.shape[1]
    scale = 1.0 / max(n * (rows - 1), 1) if mean else 1.0
    grads = [gradient_of(x, w) for x, w in zip((student, teacher), wanted, strict=True)]
    tuned = pair_parameters("pairwise_contrastive", student, n, rows)
    programs, shares = divide(groups, max(n, rows * wanted[1]), tuned["BN"], rows, tuned["BM"])
    loss = student.new_empty(groups, dtype=torch.float32)
    partial, parts = partial_sums(loss, programs * shares), [partial_sums(grad, shares) for grad in grads]
    args = (student, teacher, partial, *parts, n, rows, width, offset, eta, scale, shares)
    flags = {"GRAD_STUDENT": wanted[0], "GRAD_TEACHER": wanted[1]}
    launch(_contrast, (programs, groups, (1 + wanted[1]) * shares), *args, **flags, **tuned)
    add_up((partial, loss), *zip(parts, grads, strict=True))
    return loss, grads[0], grads[1]


@triton.jit(do_not_specialize=["n", "rows", "D", "offset", "shares"])
def _contrast(
    student,
    teacher,
    partial,
    grad_student,
    grad_teacher,
    n,
    rows,
    D,
    offset,
    eta,
    scale,
    shares,
    GRAD_STUDENT: tl.constexpr,
    GRAD_TEACHER: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BE: tl.constexpr,
):
    share, own_weight = tl.program_id(2) % shares, rows - 1
    if tl.program_id(2) < shares:
        b_loss = _rows(
            student, teacher, grad_student, n, rows, D, offset, eta, own_weight, scale, share, shares,
            GRAD_STUDENT, BN, BM, BE,
        )  # fmt: skip
        to = (tl.program_id(1).to(tl.int64) * shares + share) * tl.num_programs(0) + tl.program_id(0)
        tl.store(partial + to, b_loss)
    elif GRAD_TEACHER:
        _rows(
            teacher, student, grad_teacher, rows, n, D, -offset, eta, own_weight, scale, share, shares,
            GRAD_TEACHER, BN, BM, BE,
        )  # fmt: skip


@triton.jit
def _rows(
    x,
    others,
    grad,
    N,
    M,
    D,
    shift,
    eta,
    own_weight,
    scale,
    share,
    shares,
    GRAD: tl.constexpr,
    BN: tl.constexpr,
    BM: tl.constexpr,
    BE: tl.constexpr,
):
    """The loss of this program's rows and its share of the others; row i's own among the others is i + shift."""
    group = tl.program_id(1).to(tl.int64)
    b_loss = tl.zeros([BN], tl.float32)
    for first in range(tl.program_id(0) * BN, N, tl.num_programs(0) * BN):
        row = first + tl.arange(0, BN)  # [BN]
        b_x = load_split(x, group, row, row < N, N, D, BE)
        b_grad = tl.zeros_like(b_x)
        for start in range(share * BM, M, shares * BM):
            other = start + tl.arange(0, BM)  # [BM]
            b_apart = b_x[:, None] - load_split(others, group, other, other < M, M, D, BE)[:, :, None]
            b_squared = sum_features(b_apart * b_apart)  # [BM, BN]
            b_distance = tl.sqrt_rn(b_squared)
            b_margin = eta - b_distance
            b_margin = tl.where(b_margin < 0.0, 0.0, b_margin)  # a NaN stays
            inside = (other < M)[:, None] & (row < N)
            own = other[:, None] == row + shift
            b_terms = tl.where(own, own_weight * b_squared, b_margin * b_margin)
            b_loss += tl.sum(tl.where(inside, b_terms, 0.0), 0)
            if GRAD:
                b_pull = tl.where(b_squared == 0.0, 0.0, -b_margin / b_distance)
                b_pull = tl.where(inside, tl.where(own, own_weight, b_pull), 0.0)
                b_grad += sum_others(b_pull, b_apart)
        if GRAD:
            store_split(grad, b_grad * (2.0 * scale), group * shares + share, row, row < N, N, D, BE)
    return tl.sum(b_loss, 0) * scale
