"""`LN(x + r)`: the compiled kernel against the fp64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmkd.ops import reference, residual_layer_norm, use_provider
from fastmmkd.testing.norm import NAMES, draw
from fastmmkd.testing.parity import (
    DEVICE,
    DTYPES,
    EXAMPLES,
    INSTRUCTION_SETS,
    PROVIDER,
    assert_as_exact,
    instruction_set,
    needs,
    only_cpp,
    poisoned_memory,
    threads,
    value_and_gradients,
)

pytestmark = needs("residual_layer_norm")


def fast(*inputs: torch.Tensor) -> torch.Tensor:
    with use_provider(PROVIDER):
        return residual_layer_norm(*inputs)


def check(inputs, grad, terms=1.0) -> None:
    with poisoned_memory():
        actual = value_and_gradients(fast, inputs, grad)
    plain = value_and_gradients(reference.residual_layer_norm, inputs, grad)
    exact = value_and_gradients(reference.residual_layer_norm, [x.double() for x in inputs], grad)
    for i, name in enumerate(NAMES):
        assert_as_exact(name, actual[i], plain[i], exact[i], 3 if i else 2, terms)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 40), (3, 4, 50, 40), (2, 5, 7, 64), (2, 130, 37), (1, 6, 36)])
def test_as_exact_as_plain_pytorch(shape, dtype, isa) -> None:
    with instruction_set(isa):
        check(*draw(shape, dtype))


@pytest.mark.parametrize("residual_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_mixture_of_dtypes(dtype, residual_dtype) -> None:
    check(*draw((2, 3, 5, 40), dtype, residual_dtype, torch.float32))


@settings(deadline=None, max_examples=EXAMPLES)
@given(shape=st.lists(st.integers(1, 20), min_size=2, max_size=4), seed=st.integers(0, 1000))
def test_any_shape(shape, seed) -> None:
    inputs, grad = draw(tuple(shape), seed=seed)
    # Two values: 1 / deviation is up to 1 / sqrt(eps), and the gradient a small difference of terms of that size.
    steep = 1e5**0.5 * (grad.abs().max() * inputs[2].abs().max()).item()
    check(inputs, grad, terms=steep if shape[-1] < 3 else 3.0)


def test_no_rows() -> None:
    inputs, grad = draw((2, 0, 5))
    out, *gradients = value_and_gradients(fast, inputs, grad)
    assert out.shape == (2, 0, 5)
    assert [x.shape for x in gradients] == [x.shape for x in inputs]
    assert (gradients[2] == 0).all()


def test_views_of_other_tensors() -> None:
    inputs, grad = draw((2, 3, 5, 8))
    expected = value_and_gradients(fast, inputs, grad)
    inputs[0] = inputs[0].transpose(1, 2).contiguous().transpose(1, 2)
    inputs[1] = torch.cat((inputs[1], inputs[1]), -1).chunk(2, -1)[1]
    inputs[2] = inputs[2].t().contiguous().t()
    for actual, other in zip(value_and_gradients(fast, inputs, grad.flip(0).flip(0)), expected, strict=True):
        assert torch.equal(actual, other)


@only_cpp
def test_the_number_of_threads_does_not_matter() -> None:
    inputs, grad = draw((3, 4, 375, 40))
    with threads(1):
        one = value_and_gradients(fast, inputs, grad)
    with threads(2):
        two = value_and_gradients(fast, inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_a_nan_stays_one() -> None:
    inputs, _ = draw((1, 3, 8), DTYPES[-1])
    inputs[0][0, 1, 2] = float("nan")
    out = fast(*inputs)
    assert out[0, 1].isnan().all()
    assert out[0, ::2].isfinite().all()


def test_opcheck() -> None:
    inputs, _ = draw((2, 3, 8))
    args = (*(x.requires_grad_() for x in inputs), 1e-5)
    torch.library.opcheck(torch.ops.fastmmkd.residual_layer_norm.default, args)
    mixed, grad = draw((2, 3, 8), DTYPES[-1], torch.float32, torch.float32)
    out, mean, rstd = torch.ops.fastmmkd.residual_layer_norm(*mixed, 1e-5)
    backward = (grad.to(out.dtype), *mixed[:3], mean, rstd)
    torch.library.opcheck(torch.ops.fastmmkd.residual_layer_norm_backward.default, backward)


def test_compiles_to_one_graph() -> None:
    inputs, grad = draw((2, 3, 8))
    compiled = torch.compile(residual_layer_norm, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(
        value_and_gradients(compiled, inputs, grad), value_and_gradients(residual_layer_norm, inputs, grad), strict=True
    ):
        assert torch.equal(actual, expected)


def test_autocast() -> None:
    inputs, grad = draw((2, 3, 8), DTYPES[-1], torch.float32, torch.float32)
    expected = value_and_gradients(fast, inputs, grad)
    with torch.autocast(DEVICE.type, DTYPES[-1]):
        actual = value_and_gradients(fast, inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
