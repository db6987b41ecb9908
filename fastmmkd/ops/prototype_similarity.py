"""Category-guided prototype distillation (CorrKD eqs. 2 to 4)."""

import torch

from fastmmkd.ops.declaration import declare_loss, wanted
from fastmmkd.ops.dispatch import implementation
from fastmmkd.ops.operation import Op
from fastmmkd.ops.precision import accumulation
from fastmmkd.ops.work import Work, loss_work


def prototype_similarity(
    student: torch.Tensor, teacher: torch.Tensor, classes: torch.Tensor, count: int
) -> torch.Tensor:
    """`1/(N K) sum_i sum_k (Ms_k(i) - Mt_k(i))^2` per group, with `M_k(i) = cos(H_i, c_k)`.

    The prototype `c_k` is the mean of a network's own rows of class k; gradients flow through it. K is the number of
    classes present among the group's rows; an absent class contributes nothing. A zero vector (a row or a prototype)
    has similarity 0 and gradient 0.

    Args:
        student, teacher: `[G, N, d]`.
        classes: `[G, N]` int64 in [0, count); not checked, as that would wait for the device.
        count: number of classes there are.

    Returns:
        `[G]` in fp32 or better, in [0, 4]; exactly 0 where student equals teacher; 0 for N = 0.

    Raises:
        ValueError: shapes that do not fit, classes that are not int64.
    """
    if student.shape != teacher.shape or student.dim() != 3:
        raise ValueError(
            f"student is {tuple(student.shape)}, teacher is {tuple(teacher.shape)}; expected [G, N, d] twice"
        )
    if classes.shape != student.shape[:2] or classes.dtype != torch.int64:
        raise ValueError(
            f"classes are {tuple(classes.shape)} {classes.dtype}, student needs {tuple(student.shape[:2])} torch.int64"
        )
    return implementation(OP, student, teacher)(student, teacher, classes, count)


def _definition(student: torch.Tensor, teacher: torch.Tensor, classes: torch.Tensor, count: int) -> torch.Tensor:
    member_gik = classes.unsqueeze(-1) == torch.arange(count, device=classes.device)
    present = member_gik.any(1).sum(-1)

    def similarity(x: torch.Tensor) -> torch.Tensor:
        x = accumulation(x)
        members_gk1 = member_gik.sum(1).clamp_min(1).unsqueeze(-1)
        prototype_gkd = (x.unsqueeze(2) * member_gik.unsqueeze(-1)).sum(1) / members_gk1
        return (_direction(x).unsqueeze(2) * _direction(prototype_gkd).unsqueeze(1)).sum(-1)

    # The prototype of an absent class is 0: its similarities are 0 in both networks.
    squared = (similarity(student) - similarity(teacher)).square()
    return squared.sum((1, 2)) / (present * student.shape[1]).clamp_min(1)


def _direction(x: torch.Tensor) -> torch.Tensor:
    """`x / |x|` over the last axis; 0 with gradient 0 where x is 0.

    Dividing by the largest element first, a constant because the direction does not depend on it, keeps squares and
    their gradients in range.
    """
    largest = x.detach().abs().amax(-1, keepdim=True)
    zero = largest < torch.finfo(x.dtype).tiny
    scaled = x / largest.masked_fill(zero, 1.0)
    norm = scaled.square().sum(-1, keepdim=True).masked_fill(zero, 1.0).sqrt()
    return (scaled / norm).masked_fill(zero, 0.0)


_declared = declare_loss(
    "prototype_similarity",
    "(Tensor student, Tensor teacher, Tensor classes, int count, bool[2] wanted)"
    " -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
    inputs=2,
    definition=_definition,
)


def _compiled(student: torch.Tensor, teacher: torch.Tensor, classes: torch.Tensor, count: int) -> torch.Tensor:
    return _declared(student, teacher, classes, count, wanted(student, teacher))[0]


def _work(g: int, n: int, d: int, c: int, e: int, gradients: bool) -> Work:
    """`G (2 N D e + 8 N + 4)` bytes (classes are int64), and `4 N D` for the student's gradient.

    `G (2 (3 N D + 3 C D + 2 N C D + 2 N C) + 3 N C)` operations: for both networks the sums of the classes, squared
    norms, prototypes, products and their two scales; differences, squares, sums. Gradient: `4 N C D + 6 N D` more.
    """
    both = 2 * (3 * n * d + 3 * c * d + 2 * n * c * d + 2 * n * c)
    more = (4 * n * c * d + 6 * n * d) * gradients
    return loss_work(g, 2 * n * d * e + 8 * n, n * d * gradients, both + 3 * n * c + more)


OP = Op(
    "prototype_similarity", _definition, ("triton", "cuda", "cpp"), _compiled, gradient="forward", work=_work, place=90
)
