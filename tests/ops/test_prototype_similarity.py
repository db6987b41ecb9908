"""CorrKD eqs. 2 to 4 against their loops, by hand, with absent classes and zero vectors, and the gradient."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmmkd.ops import prototype_similarity

ROOT_HALF = math.sqrt(0.5)


def cosine(a, b):
    norms = math.hypot(*a) * math.hypot(*b)
    return sum(x * y for x, y in zip(a, b, strict=True)) / norms if norms else 0.0


def literal(student, teacher, classes):
    """The equations for one group, in Python floats, over the classes that are present."""
    classes = classes.tolist()
    present = sorted(set(classes))

    def similarities(rows):
        members = {k: [row for row, own in zip(rows, classes, strict=True) if own == k] for k in present}
        prototypes = {k: [sum(x) / len(members[k]) for x in zip(*members[k], strict=True)] for k in present}
        return [[cosine(row, prototypes[k]) for k in present] for row in rows]

    total = 0.0
    for row_s, row_t in zip(similarities(student.tolist()), similarities(teacher.tolist()), strict=True):
        for s, t in zip(row_s, row_t, strict=True):
            total += (s - t) ** 2
    return total / (len(classes) * len(present))


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_by_hand_two_samples_of_two_classes() -> None:
    """Every row is its own prototype: the student's similarities are 0 across, the teacher's 1 / sqrt 2."""
    student, teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[1.0, 0.0], [1.0, 1.0]]])
    loss = prototype_similarity(student, teacher, torch.tensor([[0, 1]]), 2)
    assert loss.tolist() == pytest.approx([2 * 0.5 / (2 * 2)], rel=1e-6)


def test_by_hand_three_samples_with_absent_classes() -> None:
    """Classes 0 and 2 of 4. Student: c_0 = (1/2, 1/2), c_2 = (1, 0); teacher: c_0 = (2, 0), c_2 = (0, 3)."""
    student = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]], dtype=torch.float64)
    teacher = torch.tensor([[[2.0, 0.0], [2.0, 0.0], [0.0, 3.0]]], dtype=torch.float64)
    loss = prototype_similarity(student, teacher, torch.tensor([[0, 0, 2]]), 4)
    row_0, row_1, row_2 = (ROOT_HALF - 1) ** 2 + 1, (ROOT_HALF - 1) ** 2, ROOT_HALF**2
    assert loss.tolist() == pytest.approx([(row_0 + row_1 + row_2) / (3 * 2)], rel=1e-12)
    assert loss.item() == pytest.approx(0.2785955, abs=1e-6)


def test_by_hand_one_class_present() -> None:
    """Student at 45 degrees from its prototype, teacher on it: (1 / sqrt 2 - 1)^2, K = 1."""
    student, teacher = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    loss = prototype_similarity(student, teacher, torch.tensor([[1, 1]]), 3)
    assert loss.tolist() == pytest.approx([(ROOT_HALF - 1) ** 2], rel=1e-5)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    groups=st.integers(1, 3),
    rows=st.integers(1, 7),
    width=st.integers(1, 4),
    count=st.integers(1, 5),
)
def test_equals_the_loops(seed, groups, rows, width, count) -> None:
    student, teacher = draw(groups, rows, width, seed=seed), draw(groups, rows, width, seed=seed + 1)
    classes = torch.randint(count, (groups, rows), generator=torch.Generator().manual_seed(seed))
    loss = prototype_similarity(student, teacher, classes, count)
    assert loss.dtype == torch.float64
    expected = [literal(student[g], teacher[g], classes[g]) for g in range(groups)]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-14)


def test_groups_count_their_own_classes() -> None:
    """One class in group 0, three in group 1; a class that nobody has, named or not, changes nothing."""
    student, teacher = draw(2, 4, 3), draw(2, 4, 3, seed=1)
    classes = torch.tensor([[1, 1, 1, 1], [0, 2, 1, 0]])
    loss = prototype_similarity(student, teacher, classes, 3)
    assert loss.tolist() == pytest.approx([literal(student[g], teacher[g], classes[g]) for g in range(2)], rel=1e-12)
    torch.testing.assert_close(prototype_similarity(student, teacher, classes, 7), loss)


def test_a_zero_row_has_similarity_and_gradient_zero() -> None:
    """Row 0 of the student is 0 and alone in its class: similarities [[0, 0], [0, 1]] against ones."""
    student = torch.tensor([[[0.0, 0.0], [1.0, 0.0]]], requires_grad=True)
    teacher = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    loss = prototype_similarity(student, teacher, torch.tensor([[0, 1]]), 2)
    loss.sum().backward()
    assert loss.tolist() == [0.75]
    assert (student.grad == 0).all()


def test_a_zero_prototype_has_similarity_zero_and_a_finite_gradient() -> None:
    """The student's rows of class 0 cancel; its row of class 1 lies across: similarities [[0, 0], [0, 0], [0, 1]]."""
    student = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]], requires_grad=True)
    teacher = torch.tensor([[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]]])
    loss = prototype_similarity(student, teacher, torch.tensor([[0, 0, 1]]), 2)
    loss.sum().backward()
    assert loss.item() == pytest.approx(5 / 6, rel=1e-6)
    assert torch.isfinite(student.grad).all()


def test_all_rows_zero() -> None:
    student = torch.zeros(2, 4, 3, requires_grad=True)
    loss = prototype_similarity(student, student.detach(), torch.tensor([[0, 1, 1, 0]] * 2), 3)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0]
    assert (student.grad == 0).all()


def test_equal_networks_have_loss_and_gradient_zero() -> None:
    student = draw(2, 5, 3).float().requires_grad_()
    loss = prototype_similarity(student, student.detach().clone(), torch.tensor([[0, 1, 1, 0, 2]] * 2), 3)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.0]
    assert (student.grad == 0).all()


def test_gradients() -> None:
    """Smooth away from zero vectors; with an absent class, and class sizes 1 and 3."""
    student, teacher = draw(2, 4, 3, seed=2).requires_grad_(), draw(2, 4, 3, seed=3).requires_grad_()
    classes = torch.tensor([[0, 2, 2, 2], [1, 1, 3, 0]])
    assert torch.autograd.gradcheck(lambda s, t: prototype_similarity(s, t, classes, 4), (student, teacher))


def test_order_of_samples_and_names_of_classes_do_not_matter() -> None:
    student, teacher = draw(2, 6, 3), draw(2, 6, 3, seed=1)
    classes = torch.tensor([[0, 1, 1, 2, 0, 0], [2, 2, 1, 1, 1, 2]])
    loss = prototype_similarity(student, teacher, classes, 3)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    permuted = prototype_similarity(student[:, order], teacher[:, order], classes[:, order], 3)
    torch.testing.assert_close(permuted, loss)
    torch.testing.assert_close(prototype_similarity(student, teacher, torch.tensor([2, 0, 1])[classes], 3), loss)
    assert (prototype_similarity(student, teacher, classes[:, order], 3) - loss).abs().min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_fp32(dtype) -> None:
    """Close to fp64 on the same rounded rows, and as close as the rounding allows on the rows before it."""
    exact = draw(2, 9, 20), draw(2, 9, 20, seed=1)
    student, teacher = (x.to(dtype).requires_grad_() for x in exact)
    classes = torch.arange(9).remainder(3).expand(2, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = prototype_similarity(student, teacher, classes, 3)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(), prototype_similarity(student.double(), teacher.double(), classes, 3), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(loss.double(), prototype_similarity(*exact, classes, 3), rtol=2e-2, atol=0)
    loss.sum().backward()
    assert student.grad.dtype == dtype
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("size", [1e4, 1e20, 1e-20])
def test_similarities_do_not_depend_on_the_length_of_the_rows(size) -> None:
    """Also where a square is beyond fp32's range."""
    student, teacher = draw(1, 5, 3).float(), draw(1, 5, 3, seed=1).float()
    classes = torch.tensor([[0, 1, 0, 1, 1]])
    scaled = (student * size).requires_grad_()
    loss = prototype_similarity(scaled, teacher, classes, 2)
    torch.testing.assert_close(loss, prototype_similarity(student, teacher, classes, 2))
    loss.sum().backward()
    assert torch.isfinite(scaled.grad).all()
    assert scaled.grad.abs().max() > 0


def test_prototypes_never_wait_for_the_device() -> None:
    """Fake tensors have shapes but no numbers: reading one, or a shape that depends on one, would raise."""
    with FakeTensorMode():
        student = torch.empty(2, 5, 4, requires_grad=True)
        loss = prototype_similarity(student, torch.empty(2, 5, 4), torch.empty(2, 5, dtype=torch.int64), 3)
        loss.sum().backward()
        assert loss.shape == (2,)


def test_prototypes_say_what_does_not_fit() -> None:
    x, classes = torch.zeros(1, 3, 4), torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"student is \(1, 3, 4\), teacher is \(1, 3, 5\)"):
        prototype_similarity(x, torch.zeros(1, 3, 5), classes, 2)
    with pytest.raises(ValueError, match=r"student is \(3, 4\), teacher is \(3, 4\)"):
        prototype_similarity(x[0], x[0], classes[0], 2)
    with pytest.raises(ValueError, match=r"classes are \(1, 2\) torch.int64, student needs \(1, 3\) torch.int64"):
        prototype_similarity(x, x, classes[:, :2], 2)
    with pytest.raises(ValueError, match=r"classes are \(1, 3\) torch.float32"):
        prototype_similarity(x, x, classes.float(), 2)
