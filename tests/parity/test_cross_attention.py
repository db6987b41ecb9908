"""Masked crossmodal attention: the compiled kernel against the fp64 reference."""

from __future__ import annotations

import math

import pytest
import torch
import torch._dynamo
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmkd.ops import cross_attention, use_provider
from fastmmkd.ops.providers import INTERPRETED
from fastmmkd.testing.attention import SHAPES, Case, draw, hold
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

pytestmark = needs("cross_attention")


def fast(*args) -> torch.Tensor:
    with use_provider(PROVIDER):
        return cross_attention(*args)


def check(case: Case, terms: float = 1.0) -> None:
    with poisoned_memory():
        actual = case.run(fast)
    hold(case, actual, terms)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_plain_pytorch(shape, dtype, isa) -> None:
    with instruction_set(isa):
        check(draw(*shape, dtype))


def test_unaligned_mosei() -> None:
    check(draw(1, 1, 70, (50, 130, 133), 1, 5) if INTERPRETED else draw(1, 1, 375, (375, 375, 375), 2, 5))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("size", [1e-3, 4.0, 12.0])
def test_flat_and_sharp_distributions(size, isa) -> None:
    with instruction_set(isa):
        check(draw(1, 2, 20, (20, 20), 2, 5, size=size), terms=max(size, 1.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_keys_beside_scores_far_below_zero(dtype) -> None:
    case = draw(1, 1, 5, (20,), 1, 5, dtype, present=0.5, size=12.0)
    case.inputs[0], case.inputs[1] = case.inputs[0].abs() + 12, -case.inputs[1].abs() - 12
    assert all(x.isfinite().all() for x in case.run(fast))
    check(case, terms=1000.0)


@settings(deadline=None, max_examples=EXAMPLES)
@given(
    groups=st.integers(1, 2 if INTERPRETED else 3),
    batch=st.integers(1, 2 if INTERPRETED else 3),
    queries=st.integers(1, 20),
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    heads=st.integers(1, 2 if INTERPRETED else 3),
    head_width=st.integers(1, 18),
    present=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_shape_and_mask(groups, batch, queries, lengths, heads, head_width, present, seed) -> None:
    check(draw(groups, batch, queries, lengths, heads, head_width, present=present, seed=seed), terms=4.0)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_absent_modalities_and_rows_without_keys(dtype, isa) -> None:
    case = draw(2, 2, 9, (10, 40, 20), 2, 5, dtype, present=0.8)
    case.masks[1][:] = False
    for mask in case.masks:
        mask[1, 1] = False
    with instruction_set(isa):
        check(case)
        out, grad_query, *others = case.run(fast)
    assert (out[1, 1] == 0).all()
    assert (grad_query[1, 1] == 0).all()
    for gradient, mask in zip(others, case.masks * 2, strict=True):
        assert (gradient[~mask] == 0).all()


def test_no_key_at_all_and_no_query_at_all() -> None:
    case = draw(1, 2, 5, (4, 3), 2, 5, present=0.0)
    with poisoned_memory():
        assert all((x == 0).all() for x in case.run(fast))
        no_query = draw(1, 2, 0, (4, 3), 2, 5).run(fast)
        no_frames = draw(1, 2, 5, (0, 0), 2, 5).run(fast)
    assert no_query[0].numel() == 0
    assert all((x == 0).all() for x in (*no_query[2:], no_frames[0]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_masked_is_never_read(dtype) -> None:
    case = draw(1, 2, 5, (20, 7), 2, 5, dtype, present=0.5)
    expected = case.run(fast)
    for x, mask in zip(case.inputs[1:], case.masks * 2, strict=True):
        x[~mask] = float("nan")
    assert all(torch.equal(a, b) for a, b in zip(case.run(fast), expected, strict=True))


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_a_nan_stays_one(isa) -> None:
    case = draw(1, 2, 5, (20, 7), 2, 5, present=1.0)
    case.inputs[0][0, 0, 3, 0] = float("nan")
    case.inputs[2][0, 1, 2, 9] = float("nan")
    with instruction_set(isa):
        out = fast(case.inputs[0], case.inputs[1:3], case.inputs[3:], case.masks, 2)
    assert out[0, 0, 3, :5].isnan().all()
    assert out[0, 1, :, 5:].isnan().all()
    assert out[0, 0, [0, 1, 2, 4]].isfinite().all()
    assert out[0, 1, :, :5].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_other_tensors(dtype) -> None:
    case = draw(2, 2, 9, (10, 20), 2, 5, dtype)
    expected = case.run(fast)

    def packed(x):  # as the projections of the models arrive
        return torch.cat((x, x), -1).chunk(2, -1)[1]

    def turned(x):
        return x.transpose(0, 3).contiguous().transpose(0, 3)

    def sliced(x):
        return torch.stack((x, x), 2).transpose(1, 2)[:, 1]

    for change in (packed, turned, sliced):
        masks = [sliced(m[..., None])[..., 0] for m in case.masks]
        changed = Case([change(x) for x in case.inputs], masks, 2, change(case.grad))
        assert any(not x.is_contiguous() for x in changed.inputs)
        leaves = [x.requires_grad_() for x in changed.inputs]
        out = changed.call(fast)(*leaves)
        actual = [out, *torch.autograd.grad(out, leaves, changed.grad)]
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_shared_masks_and_gradients_of_a_sum() -> None:
    case = draw(2, 2, 6, (8,), 2, 5)
    case.masks = [case.masks[0][:1].expand(2, -1, -1)]
    case.grad = torch.ones(1, 1, 1, 1, device=DEVICE).expand(2, 2, 6, 10)
    check(case)


@only_cpp
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_the_number_of_threads_does_not_matter(isa) -> None:
    case = draw(3, 3, 21, (20, 30, 10), 8, 5)
    with instruction_set(isa):
        with threads(1):
            one = case.run(fast)
        with threads(2):
            two = case.run(fast)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_opcheck() -> None:
    case = draw(2, 1, 3, (4, 5), 2, 5)
    n = len(case.masks)
    keys, values = case.inputs[1 : n + 1], case.inputs[n + 1 :]
    out, statistics = torch.ops.fastmmkd.cross_attention(case.inputs[0], keys, values, case.masks, 2)
    backward = (case.grad, case.inputs[0], keys, values, case.masks, out, statistics, 2)
    torch.library.opcheck(torch.ops.fastmmkd.cross_attention_backward.default, backward)
    for x in case.inputs:
        x.requires_grad_()
    torch.library.opcheck(torch.ops.fastmmkd.cross_attention.default, (case.inputs[0], keys, values, case.masks, 2))


def test_statistics() -> None:
    case = draw(1, 2, 3, (4,), 2, 5, present=1.0)
    query, key, value = case.inputs
    _, statistics = torch.ops.fastmmkd.cross_attention(query, [key], [value], case.masks, 2)
    top, share = statistics.unbind(3)
    scores = torch.einsum("gbqhe,gbkhe->gbhqk", query.unflatten(-1, (2, 5)), key.unflatten(-1, (2, 5))) * 5**-0.5
    torch.testing.assert_close(top * math.log(2), scores.amax(-1))
    torch.testing.assert_close(share, (scores - scores.amax(-1, keepdim=True)).exp().sum(-1).reciprocal())


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()  # it remembers code that it has skipped in another test's compilation
    case = draw(2, 2, 3, (4, 5), 2, 5)
    compiled = torch.compile(cross_attention, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(case.run(compiled), case.run(fast), strict=True))


def test_autocast() -> None:
    case = draw(2, 1, 3, (4, 5), 2, 5, DTYPES[-1])
    with torch.autocast(DEVICE.type, DTYPES[-1]):
        actual = case.run(fast)
    assert all(torch.equal(a, b) for a, b in zip(actual, case.run(fast), strict=True))


def test_no_gradient_is_wanted() -> None:
    case = draw(1, 2, 3, (4, 5), 2, 5)
    expected = case.run(fast)[0]
    with torch.no_grad():
        assert torch.equal(case.call(fast)(*case.inputs), expected)
    with torch.inference_mode():
        assert torch.equal(case.call(fast)(*case.inputs), expected)


def test_the_gradient_of_the_query_alone() -> None:
    case = draw(1, 2, 3, (4, 5), 2, 5)
    expected = case.run(fast)[1]
    query = case.inputs[0].requires_grad_()
    (actual,) = torch.autograd.grad(case.call(fast)(*case.inputs), query, case.grad)
    assert torch.equal(actual, expected)


def test_refuses_segments_of_another_dtype() -> None:
    x, mask = torch.zeros(1, 2, 3, 4, device=DEVICE), torch.ones(1, 2, 3, dtype=torch.bool, device=DEVICE)
    with pytest.raises(
        ValueError, match=r"segment 0: keys torch.float16, values torch.float32; query is torch.float32"
    ):
        fast(x, [x.half()], [x], [mask], 2)


@only_cpp
def test_refuses_what_it_cannot_compute() -> None:
    x, mask = torch.zeros(1, 2, 3, 4), torch.ones(1, 2, 3, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="query is Double; expected float32 or bfloat16"):
        torch.ops.fastmmkd.cross_attention(x.double(), [x], [x], [mask], 2)
    with pytest.raises(RuntimeError, match=r"mask 0 is \[1, 2, 3\] Float"):
        torch.ops.fastmmkd.cross_attention(x, [x], [x], [mask.float()], 2)
