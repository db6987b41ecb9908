"""CorrKD eqs. 2 to 4: the compiled kernel against the fp64 reference."""

import pytest
import torch

from fastmmkd.testing.losses import SHAPES, check, fast, normal
from fastmmkd.testing.parity import DEVICE, DTYPES, needs

OP = "prototype_similarity"

pytestmark = needs(OP)


def draw(groups, n, width, dtype=torch.float32):
    """The rows have a mean, without which means of many rows would be as good as 0."""
    return [(normal(groups, n, width, seed=seed) + 0.5).to(dtype) for seed in (0, 1)]


def classes(groups, n, count):
    """Of `count` classes; class 1 is absent where there are 3 or more."""
    drawn = torch.randint(count, (groups, n), generator=torch.Generator().manual_seed(n)).to(DEVICE)
    return (torch.where(drawn == 1, 0, drawn) if count > 2 else drawn), count


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_plain_pytorch(dtype) -> None:
    for i, shape in enumerate(SHAPES):
        check(OP, draw(*shape, dtype), classes(*shape[:2], (1, 2, 3, 7)[i % 4]))


def test_many_rows() -> None:
    check(OP, draw(2, 1000, 40), classes(2, 1000, 7))


def test_mixed_dtypes() -> None:
    student, teacher = draw(2, 9, 40)
    check(OP, [student, teacher.to(DTYPES[-1])], classes(2, 9, 3))


def test_classes_that_are_no_class() -> None:
    """They belong to no prototype, as in the reference; nothing is read or written out of bounds."""
    of_rows, _ = classes(2, 9, 2)
    of_rows[:, 3], of_rows[:, 7] = -1, 5
    check(OP, draw(2, 9, 12), (of_rows, 2))


def test_nobody_has_a_class() -> None:
    loss, *gradients = fast(OP, draw(2, 9, 12), (torch.full((2, 9), 4, device=DEVICE), 2))
    assert (loss == 0).all()
    assert all((x == 0).all() for x in gradients)
    loss, *gradients = fast(OP, draw(2, 9, 12), (torch.zeros(2, 9, dtype=torch.int64, device=DEVICE), 0))
    assert (loss == 0).all()
    assert all((x == 0).all() for x in gradients)


def test_zero_rows_and_zero_prototypes() -> None:
    student, teacher = draw(2, 16, 12)
    student[:, ::5] = 0.0
    student[0, 3] = -student[0, 2]
    of_rows = torch.tensor([0, 0, 1, 1] + [2] * 12, device=DEVICE).expand(2, 16)
    _, grad_student, _ = check(OP, [student, teacher], (of_rows, 3))
    assert (grad_student[0, 2:4].abs().sum(-1) > 0).all()  # no gradient through their prototype 0, but as rows


def test_zero_rows_alone_in_their_class_receive_nothing() -> None:
    student, teacher = draw(1, 4, 12)
    student[:, 0] = 0.0
    _, grad_student, _ = check(OP, [student, teacher], (torch.tensor([[0, 1, 1, 2]], device=DEVICE), 3))
    assert (grad_student[0, 0] == 0).all()


def test_equal_networks_have_exactly_zero() -> None:
    student, _ = draw(2, 33, 40)
    for x in fast(OP, [student, student.clone()], classes(2, 33, 3)):
        assert (x == 0).all()


@pytest.mark.parametrize("size", [1e-37, 1e-20, 1e4, 1e20, 1e36])
def test_rows_of_any_length(size) -> None:
    student, teacher = draw(2, 9, 5)
    check(OP, [student * size, teacher], classes(2, 9, 2))


def test_identical_rows() -> None:
    student, teacher = draw(2, 33, 12)
    student[:, 5:20] = student[:, 4:5]
    check(OP, [student, teacher], classes(2, 33, 3))


def test_no_samples() -> None:
    loss, *gradients = fast(OP, draw(2, 0, 4), classes(2, 0, 2))
    assert loss.tolist() == [0.0, 0.0]
    assert [x.shape for x in gradients] == [(2, 0, 4)] * 2


def test_a_nan_is_seen() -> None:
    student, teacher = draw(2, 20, 7)
    student[0, 3] = float("nan")
    loss, grad_student, grad_teacher = fast(OP, [student, teacher], classes(2, 20, 2))
    assert loss[0].isnan()
    assert loss[1].isfinite()
    assert grad_student[0, 3].isnan().all()
    assert grad_teacher[0].isnan().any()
    assert grad_student[1].isfinite().all()
