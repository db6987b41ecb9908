"""A whole layer of crossmodal interaction: the compiled kernels against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmkd.ops import crossmodal_layer, use_provider
from fastmmkd.ops.composition import CrossmodalWeights
from fastmmkd.testing.attention import layout_of
from fastmmkd.testing.layers import LayerCase, draw_crossmodal, hold
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

pytestmark = needs("crossmodal_layer")

CASES = {
    "UMDF": (1, [[13, 1, 20]], 8, 5),
    "two models": (2, [[13, 1, 20], [2, 9, 5]], 2, 5),
    "three models of one layout": (3, [[5, 4]], 2, 4),
    "one row": (1, [[1]], 1, 4),
    "an odd width": (2, [[4, 70], [9, 3]], 1, 7),
}
"""Models, lengths, heads and their width."""
NAMES = list(CASES)


def fast(*args) -> list[torch.Tensor]:
    with use_provider(PROVIDER):
        return crossmodal_layer(*args)


def check(case: LayerCase) -> None:
    with poisoned_memory():
        actual = case.run(fast)
    hold(case, actual)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_as_exact_as_plain_pytorch(name, dtype, isa) -> None:
    with instruction_set(isa):
        check(draw_crossmodal(*CASES[name], dtype))


@settings(deadline=None, max_examples=EXAMPLES)
@given(
    data=st.data(),
    models=st.integers(1, 2),
    batch=st.integers(1, 3),
    heads=st.integers(1, 3),
    head_width=st.integers(1, 9),
    present=st.sampled_from([0.0, 0.5, 1.0]),
    spare=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_any_layout(data, models, batch, heads, head_width, present, spare, seed) -> None:
    of_a_model = st.lists(st.integers(1, 20), min_size=batch, max_size=batch)
    lengths = data.draw(st.lists(of_a_model, min_size=models, max_size=models))
    head_width = max(head_width, -(-8 // heads))  # of fewer features a norm is steep
    case = draw_crossmodal(models, lengths, heads, head_width, torch.float32, present, spare, seed)
    with poisoned_memory():
        actual = case.run(fast)
    hold(case, actual, terms=1000.0)


def test_absent_modalities_and_samples_without_any() -> None:
    case = draw_crossmodal(1, [[5, 3, 4]], 2, 5)
    case.masks[1][:] = False
    for mask in case.masks:
        mask[:, 5:8] = False
    check(case)
    check(draw_crossmodal(1, [[5, 3, 4]], 2, 5, present=0.0))


def test_rows_of_nobody_are_zero_and_so_are_their_gradients() -> None:
    case = draw_crossmodal(2, [[3, 8], [1, 2]], 2, 5, spare=3)
    nobodys = ~case.layout.is_somebodys
    out, *grads = case.run(fast)
    assert (out[:, nobodys] == 0).all()
    assert all((grad[nobodys] == 0).all() for grad in grads[:3])
    for stream in case.inputs[:3]:
        stream[nobodys] = 7.0
    case.grad[:, nobodys] = float("nan")
    for x, y in zip(case.run(fast), (out, *grads), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_a_ragged_batch_is_its_samples_one_by_one() -> None:
    case = draw_crossmodal(1, [[13, 1, 20]], 8, 5)
    weights = CrossmodalWeights(*case.inputs[3:])
    out = fast(case.inputs[:3], case.masks, case.layout, 8, weights)
    for start, end in case.layout.starts[0].unfold(0, 2, 1).tolist():
        layout = layout_of([[end - start]])
        streams, masks = ([x[:, start:end] for x in of] for of in (case.inputs[:3], case.masks))
        for x, expected in zip(out, fast(streams, masks, layout, 8, weights), strict=True):
            torch.testing.assert_close(x[:, start:end], expected, rtol=1e-5, atol=1e-5)


def test_a_result_that_nobody_asks_for_has_no_gradient() -> None:
    case = draw_crossmodal(1, [[5, 3, 4]], 2, 5)
    case.grad[1] = 0
    expected = case.run(fast)
    leaves = [x.requires_grad_() for x in case.inputs]
    out = fast(leaves[:3], case.masks, case.layout, 2, CrossmodalWeights(*leaves[3:]))
    grads = torch.autograd.grad([out[0], out[2]], leaves, [case.grad[0], case.grad[2]])
    assert all(torch.equal(a, b) for a, b in zip(grads, expected[1:], strict=True))


def test_views_of_other_tensors() -> None:
    case = draw_crossmodal(2, [[3, 8], [1, 2]], 2, 5)
    expected = case.run(fast)
    case.inputs = [torch.stack((x, x), -1)[..., 1] for x in case.inputs]
    case.masks = [torch.stack((x, x), -1)[..., 0] for x in case.masks]
    leaves = [x.requires_grad_() for x in case.inputs]
    out = case.call(fast)(*leaves)
    actual = [out, *torch.autograd.grad(out, leaves, case.grad)]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@only_cpp
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_the_number_of_threads_matters_by_rounding_at_most(isa) -> None:
    case = draw_crossmodal(1, [[50, 41, 12, 90, 33, 7]], 8, 5)
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
    case = draw_crossmodal(2, [[3, 2]], 2, 5, spare=0)
    streams, masks, layout, weights = case.inputs[:3], case.masks, case.layout, CrossmodalWeights(*case.inputs[3:])
    with pytest.raises(ValueError, match="3 streams and 2 masks; expected 3"):
        crossmodal_layer(streams, masks[:2], layout, 2, weights)
    with pytest.raises(ValueError, match="3 heads do not divide the width 10"):
        crossmodal_layer(streams, masks, layout, 3, weights)
    with pytest.raises(ValueError, match=r"streams are \(2, 4, 10\); the layout has 5 rows of 1 models"):
        crossmodal_layer([x[:, 1:] for x in streams], masks, layout, 2, weights)
    with pytest.raises(ValueError, match=r"stream 1 is \(2, 4, 10\) torch.float32; the first is \(2, 5, 10\)"):
        crossmodal_layer([streams[0], streams[1][:, 1:], streams[2]], masks, layout, 2, weights)
    with pytest.raises(ValueError, match=r"mask 0 is \(1, 5\); expected \(2, 5\)"):
        crossmodal_layer(streams, [mask[:1] for mask in masks], layout, 2, weights)
    with pytest.raises(ValueError, match=r"out_bias is torch.float64; streams are torch.float32"):
        crossmodal_layer(streams, masks, layout, 2, weights._replace(out_bias=weights.out_bias.double()))


def test_opcheck() -> None:
    case = draw_crossmodal(1, [[3, 2]], 2, 5)
    inputs = [x.requires_grad_() for x in case.inputs]
    args = inputs[:3], case.masks, case.layout.starts, inputs[3:], case.layout.longest, 2
    torch.library.opcheck(torch.ops.fastmmkd.crossmodal_layer.default, (*args, 1e-5))
    detached = [x.detach() for x in inputs]
    args = detached[:3], *args[1:3], detached[3:], *args[4:]
    _, kept = torch.ops.fastmmkd.crossmodal_layer(*args, 1e-5)
    backward = (list(case.grad), *args[:4], kept, *args[4:])
    torch.library.opcheck(torch.ops.fastmmkd.crossmodal_layer_backward.default, backward)


def test_compiles_to_one_graph() -> None:
    case = draw_crossmodal(1, [[3, 2]], 2, 5)
    compiled = torch.compile(case.call(crossmodal_layer), fullgraph=True, backend="aot_eager")
    leaves = [x.requires_grad_() for x in case.inputs]
    out = compiled(*leaves)
    actual = [out, *torch.autograd.grad(out, leaves, case.grad)]
    for x, expected in zip(actual, case.run(crossmodal_layer), strict=True):
        assert torch.equal(x, expected)


def test_under_autocast_it_is_composed_in_half_precision() -> None:
    case = draw_crossmodal(1, [[3, 2]], 2, 5)
    expected = case.run(crossmodal_layer)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = case.call(crossmodal_layer)(*case.inputs)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected[0], rtol=0.1, atol=0.1)
