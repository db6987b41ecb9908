"""The CUDA kernels of the losses, thread by thread on a CPU, against the fp64 reference."""

import pytest
import torch

from fastmmkd.ops import reference
from fastmmkd.testing.losses import normal, upstream
from fastmmkd.testing.parity import assert_as_exact, poisoned_memory, value_and_gradients
from tests.cuda.emulated import loss, needs_compiler, operations, reversed_order

pytestmark = needs_compiler

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1, 1), (2, 2, 3), (3, 16, 40), (1, 33, 120), (2, 70, 40)]


def run(name, inputs, constants) -> list[torch.Tensor]:
    with poisoned_memory():
        found = loss(name, inputs, constants)
        with reversed_order():
            again = loss(name, inputs, constants)
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(found, again, strict=True))
    return found


def check(name, inputs, constants, of_reference=None) -> list[torch.Tensor]:
    found = run(name, inputs, constants)

    def by_reference(x):
        function = getattr(reference, name)
        return value_and_gradients(lambda *x: function(*x, *(of_reference or constants)), x, upstream(len(x[0])))

    plain, exact = by_reference(inputs), by_reference([x.double() for x in inputs])
    for i, actual in enumerate(found):
        assert_as_exact(f"gradient {i}" if i else name, actual, plain[i], exact[i], 3 if i else 2)
    return found


def contrast(inputs, eta, offset=0, reduction="mean") -> list[torch.Tensor]:
    constants = (eta, offset, reduction)
    return check("pairwise_contrastive", inputs, (eta, offset, reduction == "mean"), constants)


def rows(groups, n, width, dtype=torch.float32, others=None):
    return [normal(groups, n, width).to(dtype), normal(groups, others or n, width, seed=1).to(dtype)]


def margin(width):
    """About half of the pairs are nearer."""
    return (2 * width) ** 0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_contrast_as_exact_as_plain_pytorch(shape, dtype) -> None:
    for reduction in ("mean", "sum"):
        contrast(rows(*shape, dtype), margin(shape[2]), 0, reduction)


@pytest.mark.parametrize(("n", "others", "offset"), [(0, 3, 1), (1, 3, 2), (33, 70, 37)])
def test_contrast_of_a_slice_of_the_batch(n, others, offset) -> None:
    contrast(rows(2, n, 40, others=others), margin(40), offset)


@pytest.mark.parametrize("gap", [1e-1, 1e-6])
def test_contrast_of_near_rows(gap) -> None:
    centre = normal(2, 1, 40, scale=30.0)
    contrast([centre + normal(2, 33, 40, seed=seed, scale=gap) for seed in (1, 2)], 5 * gap, 0, "sum")


def test_contrast_of_identical_rows_sends_nothing() -> None:
    same = torch.full((2, 40, 3), 0.3)
    value, *gradients = run("pairwise_contrastive", [same, same.clone()], (1.5, 0, True))
    assert value.tolist() == [2.25, 2.25]
    assert all((x == 0).all() for x in gradients)


def test_contrast_with_a_nan() -> None:
    student, teacher = rows(2, 20, 7)
    student[0, 3, 2] = float("nan")
    value, grad_student, grad_teacher = run("pairwise_contrastive", [student, teacher], (3.0, 0, True))
    assert value[0].isnan()
    assert value[1].isfinite()
    assert grad_student[0, 3].isnan().any()
    assert grad_student[1].isfinite().all()
    assert grad_teacher[0].isnan().any()


def members(groups, n, count):
    """Of `count` classes; class 1 is absent where there are 3 or more."""
    drawn = torch.randint(count, (groups, n), generator=torch.Generator().manual_seed(n))
    return (torch.where(drawn == 1, 0, drawn) if count > 2 else drawn), count


def networks(groups, n, width, dtype=torch.float32):
    return [(normal(groups, n, width, seed=seed) + 0.5).to(dtype) for seed in (0, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "count"), list(zip(SHAPES, (1, 2, 3, 7, 7), strict=True)), ids=str)
def test_prototypes_as_exact_as_plain_pytorch(shape, count, dtype) -> None:
    check("prototype_similarity", networks(*shape, dtype), members(*shape[:2], count))


def test_prototypes_of_classes_that_are_no_class() -> None:
    of_rows, _ = members(2, 9, 2)
    of_rows[:, 3], of_rows[:, 7] = -1, 5
    check("prototype_similarity", networks(2, 9, 12), (of_rows, 2))


def test_prototypes_where_nobody_has_a_class() -> None:
    for constants in ((torch.full((2, 9), 4), 2), (torch.zeros(2, 9, dtype=torch.int64), 0)):
        for x in run("prototype_similarity", networks(2, 9, 12), constants):
            assert (x == 0).all()


def test_zero_rows_and_zero_prototypes() -> None:
    student, teacher = networks(2, 16, 12)
    student[:, ::5] = 0.0
    student[0, 3] = -student[0, 2]
    of_rows = torch.tensor([0, 0, 1, 1] + [2] * 12).expand(2, 16)
    check("prototype_similarity", [student, teacher], (of_rows, 3))


@pytest.mark.parametrize("size", [1e-37, 1e-20, 1e20, 1e36])
def test_prototypes_of_rows_of_any_length(size) -> None:
    student, teacher = networks(2, 9, 5)
    check("prototype_similarity", [student * size, teacher], members(2, 9, 2))


def test_prototypes_of_equal_networks_have_exactly_zero() -> None:
    student, _ = networks(2, 33, 40)
    for x in run("prototype_similarity", [student, student.clone()], members(2, 33, 3)):
        assert (x == 0).all()


def test_prototypes_with_a_nan() -> None:
    student, teacher = networks(2, 20, 7)
    student[0, 3] = float("nan")
    value, grad_student, grad_teacher = run("prototype_similarity", [student, teacher], members(2, 20, 2))
    assert value[0].isnan()
    assert value[1].isfinite()
    assert grad_student[0, 3].isnan().all()
    assert grad_teacher[0].isnan().any()
    assert grad_student[1].isfinite().all()


CASES = {
    "pairwise_contrastive": (9.0, 1, True),
    "prototype_similarity": (torch.arange(9).remainder(3).expand(2, 9), 4),
}
every_loss = pytest.mark.parametrize("name", CASES)


@every_loss
def test_mixed_dtypes_and_views(name) -> None:
    student, teacher = rows(2, 9, 40, others=9 if name == "prototype_similarity" else 11)
    expected = run(name, [student, teacher.bfloat16().float()], CASES[name])
    mixed = [student.transpose(0, 2).contiguous().transpose(0, 2), teacher.bfloat16()]
    found = run(name, mixed, CASES[name])
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@every_loss
def test_gradients_are_only_of_what_wants_one(name) -> None:
    inputs = rows(2, 9, 40, others=9 if name == "prototype_similarity" else 11)
    op = getattr(operations(), name)
    both = op(*inputs, *CASES[name], [True, True])
    for wanted in ([True, False], [False, True], [False, False]):
        found = op(*inputs, *CASES[name], wanted)
        assert torch.equal(found[0], both[0])
        assert [x.numel() > 0 for x in found[1:]] == wanted
        assert all(torch.equal(x, y) for x, y, is_wanted in zip(found[1:], both[1:], wanted, strict=True) if is_wanted)


@every_loss
def test_no_groups_and_no_samples(name) -> None:
    none = torch.zeros(0, 3, dtype=torch.int64) if name == "prototype_similarity" else None
    found = operations()
    if none is None:
        assert found.pairwise_contrastive(*rows(0, 3, 4), 9.0, 0, True, [True, True])[0].shape == (0,)
    else:
        assert found.prototype_similarity(*rows(0, 3, 4), none, 2, [True, True])[0].shape == (0,)
        empty = torch.zeros(2, 0, 4)
        value, *gradients = run(name, [empty, empty], (torch.zeros(2, 0, dtype=torch.int64), 2))
        assert value.tolist() == [0.0, 0.0]
        assert [x.shape for x in gradients] == [(2, 0, 4)] * 2
