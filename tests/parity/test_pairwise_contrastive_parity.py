"""CorrKD eq. 1: the compiled kernel against the fp64 reference."""

import pytest
import torch

from fastmmkd.ops import pairwise_contrastive, use_provider
from fastmmkd.testing.losses import SHAPES, check, fast, normal, upstream
from fastmmkd.testing.parity import DEVICE, DTYPES, PROVIDER, needs, value_and_gradients

OP = "pairwise_contrastive"

pytestmark = needs(OP)


def draw(groups, n, width, dtype=torch.float32, rows=None):
    return [normal(groups, n, width).to(dtype), normal(groups, rows or n, width, seed=1).to(dtype)]


def margin(width):
    """About half of the pairs are nearer."""
    return (2 * width) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_plain_pytorch(dtype) -> None:
    for shape in SHAPES:
        for reduction in ("mean", "sum"):
            check(OP, draw(*shape, dtype), (margin(shape[2]), 0, reduction))


@pytest.mark.parametrize(("n", "rows", "offset"), [(0, 3, 1), (1, 3, 2), (7, 64, 31), (33, 70, 37), (64, 129, 5)])
def test_a_slice_of_the_batch(n, rows, offset) -> None:
    check(OP, draw(2, n, 40, rows=rows), (margin(40), offset, "mean"))


def test_mixed_dtypes() -> None:
    student, teacher = draw(2, 9, 40)
    check(OP, [student, teacher.to(DTYPES[-1])], (9.0, 0, "mean"))


@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-6])
def test_near_rows(gap) -> None:
    """Clusters far from the origin: |s|^2 + |t|^2 - 2 s.t would have no digit left."""
    centre = normal(2, 1, 40, scale=30.0)
    student, teacher = (centre + normal(2, 33, 40, seed=seed, scale=gap) for seed in (1, 2))
    check(OP, [student, teacher], (5 * gap, 0, "sum"))


def test_identical_rows_send_nothing() -> None:
    same = torch.full((2, 40, 3), 0.3, device=DEVICE)
    loss, *gradients = fast(OP, [same, same.clone()], (1.5, 0, "mean"))
    assert loss.tolist() == [2.25, 2.25]
    assert all((x == 0).all() for x in gradients)


def test_a_student_row_on_another_teacher_row() -> None:
    student, teacher = draw(1, 20, 7)
    teacher[0, 11] = student[0, 3]
    check(OP, [student, teacher], (3.0, 0, "mean"))


@pytest.mark.parametrize("eta", [0.0, -1.0, 1e4])
def test_margins(eta) -> None:
    check(OP, draw(2, 17, 12), (eta, 0, "mean"))


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e4, 1e15])
def test_rows_of_any_size(size) -> None:
    student, teacher = (x * size for x in draw(1, 9, 5))
    check(OP, [student, teacher], (size, 0, "mean"))


def test_a_nan_is_seen() -> None:
    student, teacher = draw(2, 20, 7)
    student[0, 3, 2] = float("nan")
    loss, grad_student, grad_teacher = fast(OP, [student, teacher], (3.0, 0, "mean"))
    assert loss[0].isnan()
    assert loss[1].isfinite()
    assert grad_student[0, 3].isnan().any()
    assert grad_student[1].isfinite().all()
    assert grad_teacher[0].isnan().any()


def test_only_the_student_wants_a_gradient() -> None:
    student, teacher = draw(2, 33, 40)
    both = fast(OP, [student, teacher], (9.0, 0, "mean"))
    with use_provider(PROVIDER):
        alone = value_and_gradients(lambda s: pairwise_contrastive(s, teacher, 9.0), [student], upstream(2))
        assert not pairwise_contrastive(student, teacher, 9.0).requires_grad
    assert all(torch.equal(a, b) for a, b in zip(alone, both[:2], strict=True))
