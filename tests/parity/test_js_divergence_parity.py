"""UMDF eqs. 4 and 5: the compiled kernel against the fp64 reference."""

import math

import pytest
import torch

from fastmmkd.ops.providers import INTERPRETED
from fastmmkd.testing.losses import SIZES, check, fast, normal
from fastmmkd.testing.parity import DEVICE, DTYPES, INSTRUCTION_SETS, instruction_set, needs

OP = "js_divergence"

pytestmark = needs(OP)


SHAPES = [(groups, n, classes) for groups in (1, 3) for n in SIZES for classes in (1, 2, 3, 7, 40, 120)]
if INTERPRETED:  # every program takes milliseconds
    SHAPES = [(1, 1, 2), (2, 2, 7), (3, 16, 1), (2, 16, 3), (2, 33, 40), (1, 64, 120), (2, 129, 7)]


def draw(groups, n, classes, dtype=torch.float32, scale=2.0):
    return [normal(groups, n, classes, seed=seed, scale=scale).to(dtype) for seed in (0, 1)]


@pytest.mark.parametrize("dtype", DTYPES)
def test_as_exact_as_plain_pytorch(dtype) -> None:
    for shape in SHAPES:
        check(OP, draw(*shape, dtype))


@pytest.mark.parametrize("scale", [0.0, 1e-3, 30.0, 300.0, 1e4])
def test_logits_of_any_size(scale) -> None:
    check(OP, draw(2, 37, 5, scale=scale))


def test_a_common_shift_of_the_logits() -> None:
    a, b = draw(2, 37, 5)
    check(OP, [a + 1000.0, b - 3000.0])


def test_mixed_dtypes() -> None:
    a, b = draw(2, 9, 4)
    check(OP, [a, b.to(DTYPES[-1])])


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_equal_distributions_have_exactly_zero(isa) -> None:
    a, _ = draw(2, 33, 7)
    with instruction_set(isa):
        for x in fast(OP, [a, a.clone()]):
            assert (x == 0).all()


@pytest.mark.parametrize("gap", [1e-1, 1e-3])
def test_near_distributions(gap) -> None:
    a, b = draw(2, 33, 7)
    check(OP, [a, a + gap * b])


def test_opposite_certainties_have_ln_two() -> None:
    far = torch.tensor([[[60.0, -60.0]]], device=DEVICE)
    loss, *gradients = fast(OP, [far, -far])
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)
    assert all(x.isfinite().all() for x in gradients)


def test_no_samples_have_no_divergence() -> None:
    assert fast(OP, draw(2, 0, 4))[0].isnan().all()


def test_a_nan_is_seen() -> None:
    a, b = draw(2, 20, 3)
    a[0, 3, 2] = float("nan")
    loss, grad_a, grad_b = fast(OP, [a, b])
    assert loss[0].isnan()
    assert loss[1].isfinite()
    assert grad_a[0, 3].isnan().all()
    assert grad_b[0, 3].isnan().all()
    assert grad_a[0, :3].isfinite().all()
