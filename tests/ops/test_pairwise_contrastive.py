"""CorrKD eq. 1 against its double sum, by hand, at D = 0, in slices of the batch, and its gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmmkd.ops import pairwise_contrastive


def literal(student, teacher, eta, offset=0):
    """The sum of the paper for one group, in Python floats."""
    student, teacher = student.tolist(), teacher.tolist()
    total = 0.0
    for i in range(len(student)):
        for j in range(len(teacher)):
            if j != offset + i:
                total += math.dist(student[i], teacher[offset + i]) ** 2
                total += max(0.0, eta - math.dist(student[i], teacher[j])) ** 2
    return total


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_by_hand_two_samples() -> None:
    """Own squared distances 1, 4; others 3, 4: (1 + 1.5^2) + (4 + 0.5^2)."""
    student, teacher = torch.tensor([[[0.0], [5.0]]]), torch.tensor([[[1.0], [3.0]]])
    assert pairwise_contrastive(student, teacher, 4.5, reduction="sum").tolist() == [7.5]
    assert pairwise_contrastive(student, teacher, 4.5).tolist() == [3.75]


def test_by_hand_three_samples() -> None:
    """Own squared distances 0, 16, 9, each twice; others 5, 1 | 3, sqrt 10 | 4, 3, with eta = 5."""
    student = torch.tensor([[[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]]], dtype=torch.float64)
    teacher = torch.tensor([[[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]]], dtype=torch.float64)
    expected = 2 * (0 + 16 + 9) + (0 + 16) + (4 + (5 - math.sqrt(10)) ** 2) + (1 + 4)
    loss = pairwise_contrastive(student, teacher, 5.0, reduction="sum")
    assert loss.tolist() == pytest.approx([expected], rel=1e-12)
    assert loss.item() == pytest.approx(78.3772234, abs=1e-6)
    assert pairwise_contrastive(student, teacher, 5.0).item() == pytest.approx(expected / 6, rel=1e-12)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    groups=st.integers(1, 3),
    rows=st.integers(1, 7),
    width=st.integers(1, 4),
    eta=st.floats(0.0, 5.0),
    data=st.data(),
)
def test_equals_the_double_sum(seed, groups, rows, width, eta, data) -> None:
    n = data.draw(st.integers(1, rows))
    offset = data.draw(st.integers(0, rows - n))
    student, teacher = draw(groups, n, width, seed=seed), draw(groups, rows, width, seed=seed + 1)
    expected = [literal(student[g], teacher[g], eta, offset) for g in range(groups)]
    loss = pairwise_contrastive(student, teacher, eta, offset, "sum")
    assert loss.dtype == torch.float64
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)
    mean = pairwise_contrastive(student, teacher, eta, offset, "mean")
    assert mean.tolist() == pytest.approx([x / max(n * (rows - 1), 1) for x in expected], rel=1e-12)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_one_sample_has_no_pairs(reduction) -> None:
    student = draw(2, 1, 3).requires_grad_()
    loss = pairwise_contrastive(student, draw(2, 1, 3, seed=1), 1.0, reduction=reduction)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0]
    assert (student.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_all_rows_identical_have_value_eta_squared_and_no_gradient(dtype) -> None:
    student, teacher = (torch.full((2, 4, 3), 0.3, dtype=dtype, requires_grad=True) for _ in range(2))
    loss = pairwise_contrastive(student, teacher, 1.5)
    loss.sum().backward()
    assert loss.tolist() == [2.25, 2.25]
    assert (student.grad == 0).all()
    assert (teacher.grad == 0).all()


def test_gradient_by_hand_where_a_row_meets_anothers_teacher() -> None:
    """s_0 = t_1: their distance sends nothing. s_1 is 2 from t_0, 2 (eta - D) = 2 pushes it on; own terms pull."""
    student = torch.tensor([[[3.0], [2.0]]], requires_grad=True)
    teacher = torch.tensor([[[0.0], [3.0]]])
    pairwise_contrastive(student, teacher, 3.0, reduction="sum").sum().backward()
    assert student.grad.flatten().tolist() == [2 * 3.0, 2 * (2.0 - 3.0) - 2 * (3.0 - 2.0)]


def test_student_equal_to_teacher_keeps_only_the_margin() -> None:
    student = draw(2, 5, 3).requires_grad_()
    teacher = student.detach().clone()
    loss = pairwise_contrastive(student, teacher, 3.0, reduction="sum")
    loss.sum().backward()
    expected = [
        sum(max(0.0, 3.0 - math.dist(a, b)) ** 2 for i, a in enumerate(x) for j, b in enumerate(x) if i != j)
        for x in teacher.tolist()
    ]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.isfinite(student.grad).all()
    assert student.grad.abs().max() > 0


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradients(reduction) -> None:
    """Away from the margin, where the second derivative jumps, and from D = 0: both are asserted."""
    student, teacher = draw(2, 3, 2, seed=3).requires_grad_(), draw(2, 4, 2, seed=4).requires_grad_()
    distance = (student.detach().unsqueeze(2) - teacher.detach().unsqueeze(1)).norm(dim=-1)
    assert distance.min() > 1e-2
    assert (distance - 1.3).abs().min() > 1e-3
    assert (distance < 1.3).any()
    assert (distance > 1.3).any()
    assert torch.autograd.gradcheck(lambda s, t: pairwise_contrastive(s, t, 1.3, 1, reduction), (student, teacher))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_slices_of_the_batch_add_up_to_the_whole(reduction) -> None:
    """Two processes with 2 and 4 of 6 rows: their sums add up; their means do, weighted by rows."""
    student, teacher = draw(2, 6, 3).requires_grad_(), draw(2, 6, 3, seed=1).requires_grad_()
    whole = pairwise_contrastive(student, teacher, 2.0, reduction=reduction)
    first = pairwise_contrastive(student[:, :2], teacher, 2.0, 0, reduction)
    second = pairwise_contrastive(student[:, 2:], teacher, 2.0, 2, reduction)
    joined = first + second if reduction == "sum" else (2 * first + 4 * second) / 6
    torch.testing.assert_close(joined, whole)
    for a, b in zip(
        torch.autograd.grad(joined.sum(), (student, teacher)),
        torch.autograd.grad(whole.sum(), (student, teacher)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_order_of_the_samples_does_not_matter_but_their_pairing_does() -> None:
    student, teacher = draw(2, 6, 3), draw(2, 6, 3, seed=1)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    loss = pairwise_contrastive(student, teacher, 2.0)
    torch.testing.assert_close(pairwise_contrastive(student[:, order], teacher[:, order], 2.0), loss)
    assert (pairwise_contrastive(student[:, order], teacher, 2.0) - loss).abs().min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_fp32(dtype) -> None:
    """Close to fp64 on the same rounded rows, and as close as the rounding allows on the rows before it."""
    exact = draw(2, 9, 20), draw(2, 9, 20, seed=1)
    student, teacher = (x.to(dtype).requires_grad_() for x in exact)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = pairwise_contrastive(student, teacher, 7.0)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), pairwise_contrastive(student.double(), teacher.double(), 7.0), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(loss.double(), pairwise_contrastive(*exact, 7.0), rtol=1e-2, atol=0)
    loss.sum().backward()
    assert student.grad.dtype == dtype
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("size", [1e4, 1e-30])
def test_extreme_rows_are_finite(size) -> None:
    student, teacher = (draw(1, 4, 3).float() * size).requires_grad_(), draw(1, 4, 3, seed=1).float() * size
    loss = pairwise_contrastive(student, teacher, 1.0)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(student.grad).all()


def test_contrastive_never_waits_for_the_device() -> None:
    """Fake tensors have shapes but no numbers: reading one, or a shape that depends on one, would raise."""
    with FakeTensorMode():
        student = torch.empty(2, 3, 4, requires_grad=True)
        loss = pairwise_contrastive(student, torch.empty(2, 6, 4), 1.0, 3)
        loss.sum().backward()
        assert loss.shape == (2,)


def test_contrastive_says_what_does_not_fit() -> None:
    x = torch.zeros(1, 3, 4)
    with pytest.raises(ValueError, match=r"student is \(1, 3, 4\), teacher is \(1, 3, 5\)"):
        pairwise_contrastive(x, torch.zeros(1, 3, 5), 1.0)
    with pytest.raises(ValueError, match=r"student is \(1, 3, 4\), teacher is \(2, 3, 4\)"):
        pairwise_contrastive(x, torch.zeros(2, 3, 4), 1.0)
    with pytest.raises(ValueError, match=r"student is \(3, 4\), teacher is \(3, 4\)"):
        pairwise_contrastive(x[0], x[0], 1.0)
    with pytest.raises(ValueError, match="offset 1: student rows are 1 to 3 of the global batch, teacher has 3"):
        pairwise_contrastive(x, x, 1.0, 1)
    with pytest.raises(ValueError, match="offset -1"):
        pairwise_contrastive(x, x, 1.0, -1)
    with pytest.raises(ValueError, match="reduction is 'none'; expected one of mean, sum"):
        pairwise_contrastive(x, x, 1.0, reduction="none")
