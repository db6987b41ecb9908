"""Category-guided prototype distillation (CorrKD eqs. 2 to 4)."""

import torch

from fastmmkd.ops.registry import implementation


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
    return implementation("prototype_similarity", student, teacher)(student, teacher, classes, count)
