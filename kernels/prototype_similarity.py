"""Category-guided prototype distillation (CorrKD eqs. 2 to 4); see `fastmmkd.ops.prototype_similarity`.

The work is linear in the rows, and each of its three passes needs the one before of all rows: a program takes a whole
group. The passes sum the classes, compare rows with prototypes, and store the gradients.

Shape legend: G groups, N rows, K classes, D features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastmmkd.kernels.launch import launch
from fastmmkd.kernels.parameters import parameters, power_of_two
from fastmmkd.kernels.rows import gradient_of, load_rows, store_rows
from fastmmkd.ops.providers import INTERPRETED

TILE = 2**16 if INTERPRETED else 2048
"""Elements of a tile of rows by prototypes by features, which is in registers; interpreted, larger is faster."""

CANDIDATES = [{"BN": rows, "num_warps": warps} for rows in (1, 2, 4, 8, 16) for warps in (1, 2, 4, 8)]


def prototype_similarity(
    student: torch.Tensor, teacher: torch.Tensor, classes: torch.Tensor, count: int, wanted: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss and the gradients of student and teacher, see `fastmmkd.ops.library_losses`."""
    student, teacher, classes = student.contiguous(), teacher.contiguous(), classes.contiguous()
    groups, n, width = student.shape
    loss = student.new_empty(groups, dtype=torch.float32)
    grads = [gradient_of(x, w) for x, w in zip((student, teacher), wanted, strict=True)]
    blocks = {"BK": power_of_two(count), "BD": power_of_two(width)}
    default = {"BN": min(power_of_two(n), max(1, TILE // blocks["BK"] // blocks["BD"])), "num_warps": 2}
    tuned = parameters("prototype_similarity", default, student.device, n=n, classes=count, width=width)
    flags = {"GRAD_STUDENT": wanted[0], "GRAD_TEACHER": wanted[1]}
    launch(_compare, (groups,), student, teacher, classes, loss, *grads, n, count, width, **flags, **blocks, **tuned)
    return loss, grads[0], grads[1]


@triton.jit
def _compare(
    student,
    teacher,
    classes,
    loss,
    grad_student,
    grad_teacher,
    N,
    K,
    D,
    GRAD_STUDENT: tl.constexpr,
    GRAD_TEACHER: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    group = tl.program_id(0).to(tl.int64)
    b_student, b_teacher = tl.zeros([BK, BD], tl.float32), tl.zeros([BK, BD], tl.float32)
    b_members = tl.zeros([BK], tl.float32)
    for first in range(0, N, BN):
        row = first + tl.arange(0, BN)  # [BN]
        member = _members(classes, group, row, N, K, BK)
        b_student += _class_sums(load_rows(student, group, row, row < N, N, D, BD), member)
        b_teacher += _class_sums(load_rows(teacher, group, row, row < N, N, D, BD), member)
        b_members += tl.sum(member.to(tl.float32), 0)
    b_pairs = tl.maximum(tl.sum((b_members > 0.0).to(tl.float32), 0) * N, 1.0)
    b_members = tl.maximum(b_members, 1.0)[:, None]
    b_student, b_length_student, b_unit_student = _direction(b_student / b_members)  # the prototypes'
    b_teacher, b_length_teacher, b_unit_teacher = _direction(b_teacher / b_members)

    b_pull_student, b_pull_teacher = tl.zeros([BK, BD], tl.float32), tl.zeros([BK, BD], tl.float32)
    b_loss = tl.zeros([BN], tl.float32)
    for first in range(0, N, BN):
        row = first + tl.arange(0, BN)  # [BN]
        b_students, _, _ = _direction(load_rows(student, group, row, row < N, N, D, BD))  # [BN, BD]
        b_teachers, _, _ = _direction(load_rows(teacher, group, row, row < N, N, D, BD))
        b_more = _similarity(b_students, b_student) - _similarity(b_teachers, b_teacher)  # [BN, BK]
        b_loss += tl.sum(b_more * b_more, 1)
        b_slope = b_more * (2.0 / b_pairs)
        b_pull_student += tl.sum(b_slope[:, :, None] * b_students[:, None, :], 0)
        b_pull_teacher -= tl.sum(b_slope[:, :, None] * b_teachers[:, None, :], 0)
    tl.store(loss + group, tl.sum(b_loss, 0) / b_pairs)

    if GRAD_STUDENT or GRAD_TEACHER:
        b_pull_student = _through_length(b_pull_student, b_student, b_length_student, b_unit_student) / b_members
        b_pull_teacher = _through_length(b_pull_teacher, b_teacher, b_length_teacher, b_unit_teacher) / b_members
        for first in range(0, N, BN):
            row = first + tl.arange(0, BN)  # [BN]
            member = _members(classes, group, row, N, K, BK)
            b_students, b_length_students, b_unit_students = _direction(
                load_rows(student, group, row, row < N, N, D, BD)
            )
            b_teachers, b_length_teachers, b_unit_teachers = _direction(
                load_rows(teacher, group, row, row < N, N, D, BD)
            )
            b_more = _similarity(b_students, b_student) - _similarity(b_teachers, b_teacher)
            b_slope = b_more * (2.0 / b_pairs)
            if GRAD_STUDENT:
                b_grad = tl.sum(b_slope[:, :, None] * b_student, 1)
                b_grad = _through_length(b_grad, b_students, b_length_students, b_unit_students)
                b_grad += _of_class(b_pull_student, member)
                store_rows(grad_student, b_grad, group, row, row < N, N, D, BD)
            if GRAD_TEACHER:
                b_grad = tl.sum(-b_slope[:, :, None] * b_teacher, 1)
                b_grad = _through_length(b_grad, b_teachers, b_length_teachers, b_unit_teachers)
                b_grad += _of_class(b_pull_teacher, member)
                store_rows(grad_teacher, b_grad, group, row, row < N, N, D, BD)


@triton.jit
def _members(classes, group, row, N, K, BK: tl.constexpr):
    """Whether a row is of a class, `[BN, BK]`; no row is where its class is none of 0 .. K - 1."""
    b_class = tl.load(classes + group * N + row, row < N, -1)
    column = tl.arange(0, BK)
    return (b_class[:, None] == column) & (column < K)


@triton.jit
def _class_sums(b_rows, member):
    """`[BK, BD]` of rows `[BN, BD]`; a NaN stays in its row's class."""
    return tl.sum(tl.where(member[:, :, None], b_rows[:, None, :], 0.0), 0)


@triton.jit
def _of_class(b_of_classes, member):
    """What `[BK, BD]` has for the class of each row, `[BN, BD]`; 0 for rows without a class."""
    return tl.sum(tl.where(member[:, :, None], b_of_classes[None], 0.0), 1)


@triton.jit
def _similarity(b_rows, b_prototypes):
    """Products of directions `[BN, BD]` and `[BK, BD]`: `[BN, BK]`."""
    return tl.sum(b_rows[:, None, :] * b_prototypes, 2)


@triton.jit
def _direction(b_x):
    """`x / |x|` of each row, and |x| as two factors, whose product may be out of range; 0 and infinity of a zero row.

    Dividing by the largest element first keeps the squares in range.
    """
    tiny = 1.17549435e-38
    zero = tl.max(tl.where(tl.abs(b_x) < tiny, 0, 1), 1) == 0  # a NaN is no zero
    b_unit = tl.where(zero, 1.0, tl.max(tl.abs(b_x), 1))[:, None]
    b_scaled = tl.div_rn(b_x, b_unit)
    b_length = tl.where(zero, float("inf"), tl.sqrt_rn(tl.sum(b_scaled * b_scaled, 1)))[:, None]
    return b_scaled / b_length, b_length, b_unit


@triton.jit
def _through_length(b_grad, b_direction, b_length, b_unit):
    """The gradient in a vector from that in its direction: the part across the direction, divided by the length."""
    b_along = tl.sum(b_grad * b_direction, 1)[:, None]
    return tl.div_rn((b_grad - b_along * b_direction) / b_length, b_unit)
