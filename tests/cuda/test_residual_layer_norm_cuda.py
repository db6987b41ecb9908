"""The CUDA kernels of `LN(x + r)`, thread by thread on a CPU, against the fp64 reference."""

import pytest
import torch

from fastmmkd.ops import reference
from fastmmkd.testing.norm import NAMES, draw
from fastmmkd.testing.parity import assert_as_exact, poisoned_memory, value_and_gradients
from tests.cuda.emulated import needs_compiler, norm, reversed_order

pytestmark = needs_compiler

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def run(inputs, grad) -> list[torch.Tensor]:
    with poisoned_memory():
        found = norm(inputs, grad)
        with reversed_order():
            assert all(torch.equal(a, b) for a, b in zip(norm(inputs, grad), found, strict=True))
    return found


def check(inputs, grad) -> None:
    actual = run(inputs, grad)
    plain = value_and_gradients(reference.residual_layer_norm, inputs, grad)
    exact = value_and_gradients(reference.residual_layer_norm, [x.double() for x in inputs], grad)
    for i, name in enumerate(NAMES):
        assert_as_exact(name, actual[i], plain[i], exact[i], 3 if i else 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 40), (3, 4, 50, 40), (2, 130, 37), (1, 3, 2000)])
def test_as_exact_as_plain_pytorch(shape, dtype) -> None:
    check(*draw(shape, dtype))


@pytest.mark.parametrize("residual_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_mixture_of_dtypes(dtype, residual_dtype) -> None:
    check(*draw((2, 3, 5, 40), dtype, residual_dtype, torch.float32))


def test_no_rows() -> None:
    inputs, grad = draw((2, 0, 5))
    out, *gradients = run(inputs, grad)
    assert out.shape == (2, 0, 5)
    assert (gradients[2] == 0).all()
    assert (gradients[3] == 0).all()


def test_views_of_other_tensors() -> None:
    inputs, grad = draw((2, 3, 5, 8))
    expected = run(inputs, grad)
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    inputs[1] = torch.cat((inputs[1], inputs[1]), -1).chunk(2, -1)[1]
    inputs[2] = inputs[2].t().contiguous().t()
    assert all(torch.equal(a, b) for a, b in zip(run(inputs, grad), expected, strict=True))


def test_rows_that_do_not_fit_are_refused() -> None:
    with pytest.raises(RuntimeError, match="expected rows of at most 6144"):
        norm(*draw((1, 1, 6145)))
