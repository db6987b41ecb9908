"""UMDF eqs. 1 to 3: the compiled kernel against the fp64 reference."""

import pytest
import torch

from fastmmkd.testing.losses import SHAPES, check, fast, normal
from fastmmkd.testing.parity import DEVICE, DTYPES, INSTRUCTION_SETS, instruction_set, needs

OP = "gaussian_mmd"

pytestmark = needs(OP)


def draw(groups, n, width, dtype=torch.float32, shift=0.5):
    return [normal(groups, n, width).to(dtype), (normal(groups, n, width, seed=1) + shift).to(dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_plain_pytorch(dtype) -> None:
    for shape in SHAPES:
        check(OP, draw(*shape, dtype))


@pytest.mark.parametrize("gap", [1e-1, 1e-3, 1e-5])
def test_near_rows(gap) -> None:
    """Clusters far from the origin and from each other: kernel values near 1 and near 0."""
    cluster = torch.arange(33) % 3
    centre = normal(2, 3, 40, scale=30.0)[:, cluster]
    check(OP, [centre + normal(2, 33, 40, seed=seed, scale=gap) for seed in (1, 2)])


@pytest.mark.parametrize("shift", [1e-3, 3.0, 100.0])
def test_distributions_near_and_far(shift) -> None:
    check(OP, draw(2, 129, 40, shift=shift))


def test_mixed_dtypes() -> None:
    x, y = draw(2, 9, 40)
    check(OP, [x, y.to(DTYPES[-1])])


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_equal_halves_have_exactly_zero(isa) -> None:
    x = normal(2, 45, 40)
    with instruction_set(isa):
        loss, grad_x, grad_y = fast(OP, [x, x.clone()])
    assert loss.tolist() == [0.0, 0.0]
    assert grad_x.abs().max() < 1e-6
    assert grad_y.abs().max() < 1e-6


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("value", [0.0, 0.3, 1e10])
def test_identical_rows_have_zero_and_no_gradient(value, n) -> None:
    same = torch.full((2, n, 3), value, device=DEVICE)
    for x in fast(OP, [same, same.clone()]):
        assert (x == 0).all()


@pytest.mark.parametrize("size", [1e-12, 1e4, 1e12])
def test_rows_of_any_size(size) -> None:
    check(OP, [x * size for x in draw(1, 9, 5)])


def test_duplicate_rows() -> None:
    x, y = draw(2, 33, 12)
    x[:, 5:20] = x[:, 4:5]
    y[:, ::3] = x[:, ::3]
    check(OP, [x, y])


def test_no_samples_have_no_distance() -> None:
    assert fast(OP, draw(2, 0, 4))[0].isnan().all()


def test_a_nan_is_seen() -> None:
    x, y = draw(2, 20, 7)
    x[0, 3, 2] = float("nan")
    loss, *gradients = fast(OP, [x, y])
    assert loss[0].isnan()
    assert loss[1].isfinite()
    assert all(g[0].isnan().any() and g[1].isfinite().all() for g in gradients)
