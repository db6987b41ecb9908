"""CorrKD eq. 6: the compiled kernel against the fp64 reference."""

import math

import pytest
import torch

from fastmmkd.testing.losses import SHAPES, check, fast, normal
from fastmmkd.testing.parity import DEVICE, DTYPES, needs

OP = "jsd_mutual_information"

pytestmark = needs(OP)


def draw(groups, n, width, dtype=torch.float32, scale=1.0):
    inputs = [normal(groups, n, width), normal(groups, n, width, seed=1)]
    inputs += [normal(groups, width, seed=2, scale=scale * width**-0.5), normal(groups, seed=3)]
    return [x.to(dtype) for x in inputs]


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_plain_pytorch(dtype) -> None:
    for shape in SHAPES:
        check(OP, draw(*shape, dtype))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0, 1e3, 1e6])
def test_scores_of_any_size(scale) -> None:
    """1e6: every sigmoid is 0 or 1."""
    check(OP, draw(2, 37, 64, scale=scale))


def test_mixed_dtypes() -> None:
    left, right, weight, bias = draw(2, 9, 40)
    check(OP, [left, right.to(DTYPES[-1]), weight, bias.to(DTYPES[-1])])


def test_relu_sends_nothing_where_it_is_zero() -> None:
    """left = -right: every hidden unit is exactly 0."""
    left = torch.full((2, 5, 7), 0.3, device=DEVICE)
    bound, *gradients = fast(OP, [left, -left, left.new_ones(2, 7), left.new_zeros(2)])
    assert bound.tolist() == pytest.approx([-2 * math.log(2)] * 2, rel=1e-6)
    assert all((x == 0).all() for x in gradients[:3])


def test_identical_and_zero_rows() -> None:
    left, right, weight, bias = draw(2, 33, 12)
    left[:, 5:20] = left[:, 4:5]
    right[:, ::3] = 0.0
    check(OP, [left, right, weight, bias])


def test_no_samples_have_no_bound() -> None:
    assert fast(OP, draw(2, 0, 4))[0].isnan().all()


def test_a_nan_is_seen() -> None:
    left, right, weight, bias = draw(2, 20, 7)
    left[0, 3, 2] = float("nan")
    bound, grad_left, grad_right, *_ = fast(OP, [left, right, weight, bias])
    assert bound[0].isnan()
    assert bound[1].isfinite()
    assert grad_left[0, 3].isnan().any()
    assert grad_right[0].isnan().any()
    assert grad_right[1].isfinite().all()
