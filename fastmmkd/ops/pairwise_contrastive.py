"""Sample-level contrastive distillation (CorrKD eq. 1)."""

import torch

from fastmmkd.ops.declaration import declare_loss, wanted
from fastmmkd.ops.dispatch import implementation
from fastmmkd.ops.operation import Op
from fastmmkd.ops.precision import accumulation
from fastmmkd.ops.work import Work, loss_work

REDUCTIONS = ("mean", "sum")


def pairwise_contrastive(
    student: torch.Tensor, teacher: torch.Tensor, eta: float, offset: int = 0, reduction: str = "mean"
) -> torch.Tensor:
    """`sum_i sum_{j != own(i)} [D(s_i, t_own(i))^2 + max(0, eta - D(s_i, t_j))^2]` per group, D the Euclidean distance.

    `own(i) = offset + i`. The positive term is inside the double sum: it counts N - 1 times. The gradient of D at
    D = 0 is 0.

    Args:
        student: `[G, n, d]`, rows of this process.
        teacher: `[G, N, d]`, rows of the global batch.
        eta: margin of the pairs of different samples.
        offset: the teacher row of student row 0.
        reduction: "sum" is the paper's; "mean" divides it by `n (N - 1)` (decision: the sum grows with the square of
            the batch).

    Returns:
        `[G]` in fp32 or better, >= 0; 0 where there are no pairs (N = 1 or n = 0).

    Raises:
        ValueError: shapes that do not fit, own rows outside the teacher's, an unknown reduction.
    """
    if (
        student.dim() != 3
        or teacher.dim() != 3
        or student.shape[0] != teacher.shape[0]
        or student.shape[2] != teacher.shape[2]
    ):
        raise ValueError(
            f"student is {tuple(student.shape)}, teacher is {tuple(teacher.shape)}; expected [G, n, d] and [G, N, d]"
        )
    if offset < 0 or offset + student.shape[1] > teacher.shape[1]:
        raise ValueError(
            f"offset {offset}: student rows are {offset} to {offset + student.shape[1] - 1} of the global batch, "
            f"teacher has {teacher.shape[1]}"
        )
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
    return implementation(OP, student, teacher)(student, teacher, eta, offset, reduction)


def _definition(student: torch.Tensor, teacher: torch.Tensor, eta: float, offset: int, reduction: str) -> torch.Tensor:
    student, teacher = accumulation(student), accumulation(teacher)
    n, rows = student.shape[1], teacher.shape[1]
    row = torch.arange(rows, device=student.device)
    own_ij = row == row[offset : offset + n, None]
    squared_gij = (student.unsqueeze(2) - teacher.unsqueeze(1)).square().sum(-1)
    # The square root never sees a 0, where its gradient would be infinite.
    zero_gij = squared_gij == 0
    distance_gij = squared_gij.masked_fill(zero_gij, 1.0).sqrt().masked_fill(zero_gij, 0.0)
    negative = (eta - distance_gij).clamp_min(0.0).square().masked_fill(own_ij, 0.0).sum((1, 2))
    positive = squared_gij.diagonal(offset, 1, 2).sum(-1)
    loss = (rows - 1) * positive + negative
    return loss if reduction == "sum" else loss / max(n * (rows - 1), 1)


_declared = declare_loss(
    "pairwise_contrastive",
    "(Tensor student, Tensor teacher, float eta, int offset, bool mean, bool[2] wanted)"
    " -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
    inputs=2,
    definition=lambda student, teacher, eta, offset, mean: _definition(
        student, teacher, eta, offset, "mean" if mean else "sum"
    ),
)


def _compiled(student: torch.Tensor, teacher: torch.Tensor, eta: float, offset: int, reduction: str) -> torch.Tensor:
    return _declared(student, teacher, eta, offset, reduction == "mean", wanted(student, teacher))[0]


def _work(g: int, n: int, m: int, d: int, e: int, gradients: bool) -> Work:
    """`G ((N + M) D e + 4)` bytes, and `4 N D` for the student's gradient.

    `G N M (3 D + 4)` operations: distance, root, margin, square, sum. Gradient: `2 D + 2` more, the factor and, per
    feature, a product and a sum.
    """
    return loss_work(g, (n + m) * d * e, n * d * gradients, n * m * (3 * d + 4 + (2 * d + 2) * gradients))


OP = Op(
    "pairwise_contrastive", _definition, ("triton", "cuda", "cpp"), _compiled, gradient="forward", work=_work, place=80
)
