"""A whole encoder layer: the compiled kernels against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmkd.ops import encoder_layer, use_provider
from fastmmkd.ops.composition import EncoderWeights
from fastmmkd.testing.layers import LayerCase, draw_encoder, hold
from fastmmkd.testing.parity import (
    DEVICE,
    DTYPES,
    EXAMPLES,
    INSTRUCTION_SETS,
    PROVIDER,
    instruction_set,
    needs,
    only_cpp,
    poisoned_memory,
    threads,
)

pytestmark = needs("encoder_layer")

CASES = {
    "a layer per modality": ((1, 3), [[13, 1, 20]], 1, 8, 5),
    "the joint layer": ((1,), [[13, 1, 20, 7]], 1, 8, 15),
    "two models": ((2, 3), [[13, 1, 20], [2, 9, 5]], 2, 2, 5),
    "two models of one layout": ((2,), [[5, 4]], 1, 2, 8),
    "one row": ((1,), [[1]], 1, 1, 4),
    "an odd width": ((2,), [[4, 70]], 2, 1, 7),
}
"""Group axes, lengths, groups of the mask, heads and their width."""
NAMES = list(CASES)


def fast(*args) -> torch.Tensor:
    with use_provider(PROVIDER):
        return encoder_layer(*args)


def check(case: LayerCase) -> None:
    with poisoned_memory():
        actual = case.run(fast)
    hold(case, actual)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_as_exact_as_plain_pytorch(name, dtype, isa) -> None:
    with instruction_set(isa):
        check(draw_encoder(*CASES[name], dtype))


@settings(deadline=None, max_examples=EXAMPLES)
@given(
    data=st.data(),
    models=st.integers(1, 2),
    layers=st.integers(1, 3),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    head_width=st.integers(1, 9),
    present=st.sampled_from([0.0, 0.5, 1.0]),
    spare=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_any_layout(data, models, layers, batch, heads, head_width, present, spare, seed) -> None:
    of_a_model = st.lists(st.integers(1, 20), min_size=batch, max_size=batch)
    lengths = data.draw(st.lists(of_a_model, min_size=models, max_size=models))
    head_width = max(head_width, -(-8 // heads))  # of fewer features a norm is steep
    case = draw_encoder((models, layers), lengths, models, heads, head_width, torch.float32, present, spare, seed)
    with poisoned_memory():
        actual = case.run(fast)
    hold(case, actual, terms=1000.0)


def test_a_sample_whose_rows_are_all_masked_attends_to_nothing() -> None:
    case = draw_encoder((1, 3), [[5, 3, 4]], 1, 2, 5)
    case.masks[0][:, 5:8] = False
    check(case)
    check(draw_encoder((1, 3), [[5, 3, 4]], 1, 2, 5, present=0.0))


def test_rows_of_nobody_are_zero_and_so_are_their_gradients() -> None:
    case = draw_encoder((2, 3), [[3, 8], [1, 2]], 2, 2, 5, spare=3)
    nobodys = ~case.layout.is_somebodys.repeat_interleave(3, 0)
    out, grad, *grads = case.run(fast)
    assert (out[nobodys] == 0).all()
    assert (grad[nobodys] == 0).all()
    case.inputs[0][nobodys] = 7.0
    case.grad[nobodys] = float("nan")
    for x, y in zip(case.run(fast), (out, grad, *grads), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_a_ragged_batch_is_its_samples_one_by_one() -> None:
    case = draw_encoder((1, 3), [[13, 1, 20]], 1, 8, 5)
    out = fast(case.inputs[0], case.masks[0], case.layout, 8, EncoderWeights(*case.inputs[1:]))
    for start, end in case.layout.starts[0].unfold(0, 2, 1).tolist():
        alone = draw_encoder((1, 3), [[end - start]], 1, 8, 5, spare=0)
        x, mask = case.inputs[0][:, start:end], case.masks[0][:, start:end]
        expected = fast(x, mask, alone.layout, 8, EncoderWeights(*case.inputs[1:]))
        torch.testing.assert_close(out[:, start:end], expected, rtol=1e-5, atol=1e-5)


def test_views_of_other_tensors() -> None:
    case = draw_encoder((2, 3), [[3, 8], [1, 2]], 2, 2, 5)
    expected = case.run(fast)
    case.inputs = [torch.stack((x, x), -1)[..., 1] for x in case.inputs]
    case.masks = [torch.stack((x, x), -1)[..., 0] for x in case.masks]
    case.grad = case.grad.transpose(0, 2).contiguous().transpose(0, 2)
    leaves = [x.requires_grad_() for x in case.inputs]
    out = case.call(fast)(*leaves)
    actual = [out, *torch.autograd.grad(out, leaves, case.grad)]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@only_cpp
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_the_number_of_threads_matters_by_rounding_at_most(isa) -> None:
    case = draw_encoder((1, 3), [[50, 41, 12, 90, 33, 7]], 1, 8, 5)
    with instruction_set(isa):
        with threads(1):
            one = case.run(fast)
        with threads(2):
            two = case.run(fast)
            again = case.run(fast)
    assert all(torch.equal(a, b) for a, b in zip(two, again, strict=True))
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


def test_what_does_not_fit_together_is_refused() -> None:
    case = draw_encoder((3,), [[3, 2]], 1, 2, 5, spare=0)
    x, (mask,), layout, weights = case.inputs[0], case.masks, case.layout, EncoderWeights(*case.inputs[1:])
    with pytest.raises(ValueError, match="3 heads do not divide the width 10"):
        encoder_layer(x, mask, layout, 3, weights)
    with pytest.raises(ValueError, match=r"x is \(3, 4, 10\); the layout has 5 rows of 1 models"):
        encoder_layer(x[:, 1:], mask, layout, 2, weights)
    with pytest.raises(ValueError, match=r"mask is \(2, 5\); expected \(3, 5\), or a divisor of 3"):
        encoder_layer(x, mask.expand(2, -1), layout, 2, weights)
    with pytest.raises(ValueError, match=r"out_bias is torch.float64; x is torch.float32"):
        encoder_layer(x, mask, layout, 2, weights._replace(out_bias=weights.out_bias.double()))


def test_opcheck() -> None:
    case = draw_encoder((1, 3), [[3, 2]], 1, 2, 5)
    x, *weights = (x.requires_grad_() for x in case.inputs)
    args = x, case.masks[0], case.layout.starts, weights, case.layout.longest, 2
    torch.library.opcheck(torch.ops.fastmmkd.encoder_layer.default, (*args, 1e-5))
    with torch.no_grad():
        out, kept = torch.ops.fastmmkd.encoder_layer(*args, 1e-5)
        backward = (case.grad, *args[:3], [w.detach() for w in weights], kept, *args[4:])
    torch.library.opcheck(
        torch.ops.fastmmkd.encoder_layer_backward.default,
        tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in backward),
    )
    assert out.shape == x.shape


def test_compiles_to_one_graph() -> None:
    case = draw_encoder((1, 3), [[3, 2]], 1, 2, 5)
    compiled = torch.compile(case.call(encoder_layer), fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in case.inputs]
    out = compiled(*leaves)
    actual = [out, *torch.autograd.grad(out, leaves, case.grad)]
    for x, expected in zip(actual, case.run(encoder_layer), strict=True):
        assert torch.equal(x, expected)


def test_under_autocast_it_is_composed_in_half_precision() -> None:
    case = draw_encoder((1, 3), [[3, 2]], 1, 2, 5)
    expected = case.run(encoder_layer)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = case.call(encoder_layer)(*case.inputs)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected[0], rtol=0.1, atol=0.1)
