"""Category-guided prototype distillation (CorrKD eqs. 2 to 4); see `fastmmkd.ops.prototype_similarity`.

The work is linear in the rows, and each of its three passes needs the one before of all rows: the passes sum the
classes, compare rows with prototypes, and store the gradients. A group of few rows has one program, which does all
three. A group of many has up to 32 programs and a launch for each pass, which hands partial sums on to the next.

Shape legend: G groups, N rows, K classes, D features, P programs of a group; BN, BK, BD, BP blocks of them.
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
MANY_TILE = 2**12 if INTERPRETED else 8192
"""The same for one of many programs, each of `MANY_WARPS`."""
MANY_WARPS = 8
ONE_PROGRAM = 1 if INTERPRETED else 4
"""Blocks of rows up to which one program does it all. Each costs three times about a microsecond, pass after pass, and
two more launches cost five: with five blocks and more, several programs should be faster. Estimated, not measured."""
PROGRAMS = 32
"""Of a group at most. Every program reads what all left: with 7 classes of 120 features 7 KB each, 215 KB or 2 us."""

CANDIDATES = [{"BN": rows, "num_warps": warps} for rows in (1, 2, 4, 8, 16) for warps in (1, 2, 4, 8)]


def prototype_similarity(
    student: torch.Tensor, teacher: torch.Tensor, classes: torch.Tensor, count: int, wanted: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The loss and the gradients of student and teacher, see `fastmmkd.ops.declaration.declare_loss`."""
    student, teacher, classes = student.contiguous(), teacher.contiguous(), classes.contiguous()
    groups, n, width = student.shape
    loss = student.new_empty(groups, dtype=torch.float32)
    grads = [gradient_of(x, w) for x, w in zip((student, teacher), wanted, strict=True)]
    blocks = {"BK": power_of_two(count), "BD": power_of_two(width)}
    of_prototypes = blocks["BK"] * blocks["BD"]
    rows = max(1, TILE // of_prototypes)
    many = n > ONE_PROGRAM * rows
    default = {"BN": min(power_of_two(n), rows), "num_warps": 2}
    if many:
        default = {"BN": max(1, MANY_TILE // (max(blocks["BK"], 8) * blocks["BD"])), "num_warps": MANY_WARPS}
    tuned = parameters("prototype_similarity", default, student.device, n=n, classes=count, width=width)
    flags = {"GRAD_STUDENT": wanted[0], "GRAD_TEACHER": wanted[1]}
    inputs, options = (student, teacher, classes, n, count, width), {**blocks, **tuned}
    if not many:
        launch(_compare, (1, groups), *inputs, loss, *grads, **flags, **options)
        return loss, grads[0], grads[1]
    programs = min(PROGRAMS, triton.cdiv(n, tuned["BN"]))
    sums, pulls = (student.new_empty((groups, programs, 2, count, width), dtype=torch.float32) for _ in range(2))
    members = student.new_empty((groups, programs, count), dtype=torch.float32)
    losses = student.new_empty((groups, programs), dtype=torch.float32)
    tile = {"BP": min(power_of_two(programs), max(1, MANY_TILE // of_prototypes))}
    launch(_sum, (programs, groups), *inputs, sums, members, **options)
    launch(_pull, (programs, groups), *inputs, sums, members, pulls, losses, **tile, **options)
    args = (*inputs, sums, members, pulls, losses, loss, *grads)
    launch(_finish, (programs, groups), *args, **flags, **tile, **options)
    return loss, grads[0], grads[1]


@triton.jit(do_not_specialize=["N", "K", "D"])
def _compare(
    student, teacher, classes, N, K, D, loss, grad_student, grad_teacher,
    GRAD_STUDENT: tl.constexpr, GRAD_TEACHER: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """All three passes, by the one program of a group."""
    b_student, b_teacher, b_members = _sums(student, teacher, classes, N, K, D, BN, BK, BD)
    b_loss, b_pull_student, b_pull_teacher = _pulls(student, teacher, b_student, b_teacher, b_members, N, D, BN, BD)
    tl.store(loss + tl.program_id(1), b_loss)
    _gradients(
        student, teacher, classes, b_student, b_teacher, b_members, b_pull_student, b_pull_teacher,
        grad_student, grad_teacher, N, K, D, GRAD_STUDENT, GRAD_TEACHER, BN, BK, BD,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "K", "D"])
def _sum(
    student, teacher, classes, N, K, D, sums, members, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr
):  # fmt: skip
    """The first pass of one of many programs."""
    b_student, b_teacher, b_members = _sums(student, teacher, classes, N, K, D, BN, BK, BD)
    _leave(sums, b_student, b_teacher, K, D, BK, BD)
    column = tl.arange(0, BK)
    to = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * K
    tl.store(members + to + column, b_members, column < K)


@triton.jit(do_not_specialize=["N", "K", "D"])
def _pull(
    student, teacher, classes, N, K, D, sums, members, pulls, losses,
    BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The second pass of one of many programs."""
    b_student, b_teacher, b_members = _found(sums, members, K, D, BP, BK, BD)
    b_loss, b_pull_student, b_pull_teacher = _pulls(student, teacher, b_student, b_teacher, b_members, N, D, BN, BD)
    _leave(pulls, b_pull_student, b_pull_teacher, K, D, BK, BD)
    tl.store(losses + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0), b_loss)


@triton.jit(do_not_specialize=["N", "K", "D"])
def _finish(
    student, teacher, classes, N, K, D, sums, members, pulls, losses, loss, grad_student, grad_teacher,
    GRAD_STUDENT: tl.constexpr, GRAD_TEACHER: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """The third pass of one of many programs."""
    if tl.program_id(0) == 0:
        total = 0.0
        for program in range(tl.num_programs(0)):
            total += tl.load(losses + tl.program_id(1).to(tl.int64) * tl.num_programs(0) + program)
        tl.store(loss + tl.program_id(1), total)
    if GRAD_STUDENT or GRAD_TEACHER:
        b_student, b_teacher, b_members = _found(sums, members, K, D, BP, BK, BD)
        b_pull_student = _added(pulls, 0, K, D, BP, BK, BD)
        b_pull_teacher = _added(pulls, 1, K, D, BP, BK, BD)
        _gradients(
            student, teacher, classes, b_student, b_teacher, b_members, b_pull_student, b_pull_teacher,
            grad_student, grad_teacher, N, K, D, GRAD_STUDENT, GRAD_TEACHER, BN, BK, BD,
        )  # fmt: skip


@triton.jit
def _sums(student, teacher, classes, N, K, D, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    """This program's rows by class: their sums `[BK, BD]` in both networks, and how many they are `[BK]`."""
    group = tl.program_id(1).to(tl.int64)
    b_student, b_teacher = tl.zeros([BK, BD], tl.float32), tl.zeros([BK, BD], tl.float32)
    b_members = tl.zeros([BK], tl.float32)
    for first in range(tl.program_id(0) * BN, N, tl.num_programs(0) * BN):
        row = first + tl.arange(0, BN)  # [BN]
        member = _members(classes, group, row, N, K, BK)
        b_student += _class_sums(load_rows(student, group, row, row < N, N, D, BD), member)
        b_teacher += _class_sums(load_rows(teacher, group, row, row < N, N, D, BD), member)
        b_members += tl.sum(member.to(tl.float32), 0)
    return b_student, b_teacher, b_members


@triton.jit
def _pulls(student, teacher, b_student, b_teacher, b_members, N, D, BN: tl.constexpr, BD: tl.constexpr):
    """This program's part of the loss, and of its gradients in the directions of the prototypes, `[BK, BD]`."""
    group = tl.program_id(1).to(tl.int64)
    b_student = _direction(b_student / _counted(b_members))[0]
    b_teacher = _direction(b_teacher / _counted(b_members))[0]
    b_pull_student, b_pull_teacher = tl.zeros_like(b_student), tl.zeros_like(b_teacher)
    b_loss = tl.zeros([BN], tl.float32)
    pairs = _pairs(b_members, N)
    for first in range(tl.program_id(0) * BN, N, tl.num_programs(0) * BN):
        row = first + tl.arange(0, BN)  # [BN]
        b_students = _direction(load_rows(student, group, row, row < N, N, D, BD))[0]  # [BN, BD]
        b_teachers = _direction(load_rows(teacher, group, row, row < N, N, D, BD))[0]
        b_more = _similarity(b_students, b_student) - _similarity(b_teachers, b_teacher)  # [BN, BK]
        b_loss += tl.sum(b_more * b_more, 1)
        b_slope = b_more * (2.0 / pairs)
        b_pull_student += tl.sum(b_slope[:, :, None] * b_students[:, None, :], 0)
        b_pull_teacher -= tl.sum(b_slope[:, :, None] * b_teachers[:, None, :], 0)
    return tl.sum(b_loss, 0) / pairs, b_pull_student, b_pull_teacher


@triton.jit
def _gradients(
    student, teacher, classes, b_student, b_teacher, b_members, b_pull_student, b_pull_teacher,
    grad_student, grad_teacher, N, K, D,
    GRAD_STUDENT: tl.constexpr, GRAD_TEACHER: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Store the gradients of this program's rows: as rows, and through their prototypes."""
    if GRAD_STUDENT or GRAD_TEACHER:
        group = tl.program_id(1).to(tl.int64)
        b_counted, pairs = _counted(b_members), _pairs(b_members, N)
        b_student, b_length_student, b_unit_student = _direction(b_student / b_counted)
        b_teacher, b_length_teacher, b_unit_teacher = _direction(b_teacher / b_counted)
        b_pull_student = _through_length(b_pull_student, b_student, b_length_student, b_unit_student) / b_counted
        b_pull_teacher = _through_length(b_pull_teacher, b_teacher, b_length_teacher, b_unit_teacher) / b_counted
        for first in range(tl.program_id(0) * BN, N, tl.num_programs(0) * BN):
            row = first + tl.arange(0, BN)  # [BN]
            member = _members(classes, group, row, N, K, BK)
            b_students, b_length_students, b_unit_students = _direction(
                load_rows(student, group, row, row < N, N, D, BD)
            )
            b_teachers, b_length_teachers, b_unit_teachers = _direction(
                load_rows(teacher, group, row, row < N, N, D, BD)
            )
            b_more = _similarity(b_students, b_student) - _similarity(b_teachers, b_teacher)
            b_slope = b_more * (2.0 / pairs)
            if GRAD_STUDENT:
                b_grad = _weighted(b_slope, b_student, K)
                b_grad = _through_length(b_grad, b_students, b_length_students, b_unit_students)
                b_grad += _of_class(b_pull_student, member)
                store_rows(grad_student, b_grad, group, row, row < N, N, D, BD)
            if GRAD_TEACHER:
                b_grad = _weighted(-b_slope, b_teacher, K)
                b_grad = _through_length(b_grad, b_teachers, b_length_teachers, b_unit_teachers)
                b_grad += _of_class(b_pull_teacher, member)
                store_rows(grad_teacher, b_grad, group, row, row < N, N, D, BD)


@triton.jit
def _leave(partial, b_student, b_teacher, K, D, BK: tl.constexpr, BD: tl.constexpr):
    """Store this program's `[BK, BD]` of both networks in `[G, P, 2, K, D]`."""
    k, column = tl.arange(0, BK)[:, None], tl.arange(0, BD)
    to = (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * 2 * K * D + k * D + column
    tl.store(partial + to, b_student, (k < K) & (column < D))
    tl.store(partial + K * D + to, b_teacher, (k < K) & (column < D))


@triton.jit
def _added(partial, network, K, D, BP: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    """The sum of what all programs of a group left of a network, in a fixed order: `[BK, BD]`."""
    k, column, programs = tl.arange(0, BK)[:, None], tl.arange(0, BD), tl.num_programs(0)
    b_total = tl.zeros([BK, BD], tl.float32)
    for first in range(0, programs, BP):
        program = first + tl.arange(0, BP)[:, None, None]
        at = ((tl.program_id(1).to(tl.int64) * programs + program) * 2 + network) * K * D + k * D + column
        b_total += tl.sum(tl.load(partial + at, (program < programs) & (k < K) & (column < D), 0.0), 0)
    return b_total


@triton.jit
def _found(sums, members, K, D, BP: tl.constexpr, BK: tl.constexpr, BD: tl.constexpr):
    """What `_sums` found of all rows."""
    k, programs = tl.arange(0, BK), tl.num_programs(0)
    b_members = tl.zeros([BK], tl.float32)
    for first in range(0, programs, BP):
        program = first + tl.arange(0, BP)[:, None]
        at = (tl.program_id(1).to(tl.int64) * programs + program) * K + k
        b_members += tl.sum(tl.load(members + at, (program < programs) & (k < K), 0.0), 0)
    return _added(sums, 0, K, D, BP, BK, BD), _added(sums, 1, K, D, BP, BK, BD), b_members


@triton.jit
def _counted(b_members):
    """What a class's sum is divided by, `[BK, 1]`; a class without members has a sum of 0."""
    return tl.maximum(b_members, 1.0)[:, None]


@triton.jit
def _pairs(b_members, N):
    """Rows times classes that have members."""
    return tl.maximum(tl.sum((b_members > 0.0).to(tl.float32), 0) * N, 1.0)


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
def _weighted(b_weights, b_prototypes, K):
    """Prototypes `[BK, BD]` added up with the weights of each row `[BN, BK]`: `[BN, BD]`.

    The mask changes nothing but what the compiler sees: of a plain sum of products along this axis Triton makes a dot
    in TF32, which is less exact, and wrong with fewer than 8 classes.
    """
    b_products = b_weights[:, :, None] * b_prototypes
    return tl.sum(tl.where((tl.arange(0, b_prototypes.shape[0]) < K)[:, None], b_products, 0.0), 1)


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
