"""Sample-level contrastive distillation (CorrKD eq. 1)."""

import torch

from fastmmkd.ops.registry import implementation

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
    return implementation("pairwise_contrastive", student, teacher)(student, teacher, eta, offset, reduction)
