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
from fastmmkd.testing.attention import RAGGED, SHAPES, AttentionCase, draw, draw_ragged, hold, layout_of
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


def check(case: AttentionCase, terms: float = 1.0) -> None:
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
        changed = AttentionCase([change(x) for x in case.inputs], masks, 2, change(case.grad))
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


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RAGGED)
def test_ragged_batches(name, dtype, isa) -> None:
    few_keys = 1.0 if dtype == torch.float32 else 5000.0  # backward reads the rounded result
    with instruction_set(isa):
        check(draw_ragged(*RAGGED[name], 2, 5, dtype), few_keys)


def lengths(models: int, batch: int) -> st.SearchStrategy[list[list[int]]]:
    of_a_model = st.lists(st.integers(1, 20), min_size=batch, max_size=batch)
    return st.lists(of_a_model, min_size=models, max_size=models)


@settings(deadline=None, max_examples=EXAMPLES)
@given(
    data=st.data(),
    groups=st.integers(1, 4),
    batch=st.integers(1, 3),
    segments=st.integers(1, 3),
    spare=st.integers(0, 3),
    head_width=st.integers(1, 18),
    present=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_any_layout(data, groups, batch, segments, spare, head_width, present, seed) -> None:
    divisor = st.sampled_from([n for n in range(1, groups + 1) if groups % n == 0])
    of_all = [data.draw(lengths(data.draw(divisor), batch)) for _ in range(1 + segments)]
    masks = [data.draw(divisor) for _ in range(segments)]
    check(draw_ragged(groups, of_all, masks, 2, head_width, present=present, spare=spare, seed=seed), terms=4.0)


@pytest.mark.parametrize("name", RAGGED)
def test_a_ragged_batch_is_its_samples_one_by_one(name) -> None:
    case = draw_ragged(*RAGGED[name], 2, 5)
    n = len(case.masks)
    layouts = case.layout, *(case.key_layouts or [case.layout] * n)
    actual = case.run(fast)
    of_actual = [layouts[0], *layouts, *layouts[1:]]
    for group in range(len(case.grad)):

        def rows(x, of, sample, group=group):
            at = of.starts[group * len(of.starts) // len(case.grad)]
            return x[group * len(x) // len(case.grad), at[sample] : at[sample + 1]][None, None]

        for sample in range(case.layout.batch):
            inputs = [rows(x, of, sample) for x, of in zip(case.inputs, (*layouts, *layouts[1:]), strict=True)]
            masks = [rows(x, of, sample) for x, of in zip(case.masks, layouts[1:], strict=True)]
            alone = AttentionCase(inputs, masks, 2, rows(case.grad, layouts[0], sample)).run(fast)
            for x, of, expected in zip(actual, of_actual, alone, strict=True):
                torch.testing.assert_close(rows(x, of, sample), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", RAGGED)
def test_rows_of_nobody_are_zero_and_never_read(name) -> None:
    case = draw_ragged(*RAGGED[name], 2, 5, spare=3)
    expected = case.run(fast)
    layouts = case.layout, *(case.key_layouts or [case.layout] * len(case.masks))
    of_inputs = *layouts, *layouts[1:]

    def nobodys(x, of):
        return ~of.is_somebodys.repeat_interleave(len(x) // len(of.starts), 0)

    for x, of in zip((*case.inputs, case.grad), (*of_inputs, layouts[0]), strict=True):
        x[nobodys(x, of)] = float("nan")
    with poisoned_memory():
        actual = case.run(fast)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    for x, of in zip(actual, (layouts[0], *of_inputs), strict=True):
        assert (x[nobodys(x, of)] == 0).all()


def test_views_of_ragged_rows() -> None:
    case = draw_ragged(*RAGGED["two models, unaligned"], 2, 5)
    expected = case.run(fast)

    def between(x):  # other groups and rows
        return torch.stack((x, x), 2).flatten(1, 2)[:, ::2].transpose(0, 1).contiguous().transpose(0, 1)

    changed = AttentionCase(
        [between(x) for x in case.inputs],
        [between(x) for x in case.masks],
        2,
        between(case.grad),
        case.layout,
        case.key_layouts,
    )
    leaves = [x.requires_grad_() for x in changed.inputs]
    out = changed.call(fast)(*leaves)
    actual = [out, *torch.autograd.grad(out, leaves, changed.grad)]
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@only_cpp
@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
def test_the_number_of_threads_does_not_matter(isa) -> None:
    ragged = draw_ragged(4, ([[1, 90, 3], [40, 50, 2]],) * 3, (2, 1), 8, 5)
    for case in (draw(3, 3, 21, (20, 30, 10), 8, 5), ragged):
        with instruction_set(isa):
            with threads(1):
                one = case.run(fast)
            with threads(2):
                two = case.run(fast)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def arguments(case: AttentionCase) -> tuple:
    """Those of the compiled operation, of a ragged case."""
    n = len(case.masks)
    layouts = [case.layout, *(case.key_layouts or [case.layout] * n)]
    segments = case.inputs[1 : n + 1], case.inputs[n + 1 :], case.masks
    starts = [of.starts for of in layouts]
    return case.inputs[0], *segments, starts[0], starts[1:], [of.longest for of in layouts], case.heads


@pytest.mark.parametrize("name", ["aligned", "two models, unaligned"])
def test_opcheck(name) -> None:
    case = draw_ragged(*RAGGED[name], 2, 5)
    *inputs, heads = arguments(case)
    out, statistics = torch.ops.fastmmkd.cross_attention(*inputs, heads)
    backward = (case.grad, *inputs, out, statistics, heads)
    torch.library.opcheck(torch.ops.fastmmkd.cross_attention_backward.default, backward)
    for x in case.inputs:
        x.requires_grad_()
    torch.library.opcheck(torch.ops.fastmmkd.cross_attention.default, arguments(case))


def test_statistics() -> None:
    case = draw_ragged(2, ([[3]], [[4]]), (1,), 2, 5, present=1.0)
    query, key, _ = case.inputs
    _, statistics = torch.ops.fastmmkd.cross_attention(*arguments(case))
    top, share = statistics[..., :3].unbind(2)
    query, key = query[:, :3].unflatten(-1, (2, 5)), key[:, :4].unflatten(-1, (2, 5))
    scores = torch.einsum("gqhe,gkhe->ghqk", query, key) * 5**-0.5
    torch.testing.assert_close(top * math.log(2), scores.amax(-1))
    torch.testing.assert_close(share, (scores - scores.amax(-1, keepdim=True)).exp().sum(-1).reciprocal())
    assert statistics[..., 3:].isfinite().all()


def test_compiles_to_one_graph() -> None:
    torch._dynamo.reset()  # it remembers code that it has skipped in another test's compilation
    compiled = torch.compile(cross_attention, fullgraph=True, backend="aot_eager")
    for case in (draw(2, 2, 3, (4, 5), 2, 5), draw_ragged(*RAGGED["two models, unaligned"], 2, 5)):
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


def test_refuses_layouts_that_do_not_fit() -> None:
    case = draw_ragged(2, ([[3, 4]], [[3, 4]]), (1,), 2, 5)
    query, key, value = case.inputs
    for layout, message in (
        (layout_of([[3, 3, 1]], 2), r"starts are \[\(1, 3\), \(1, 4\)\]; expected \[S, B \+ 1\] of one B"),
        (layout_of([[3, 4]] * 3, 2), r"starts are \[\(1, 3\), \(3, 3\)\]; .* an S that divides 2"),
        (layout_of([[3, 4]]), r"segment 0: keys \(2, 9, 10\), values \(2, 9, 10\); expected \(2, 7, 10\)"),
    ):
        with pytest.raises(ValueError, match=message):
            fast(query, [key], [value], case.masks, 2, case.layout, [layout])
    with pytest.raises(ValueError, match="2 key layouts; expected one for each of 1 segments"):
        fast(query, [key], [value], case.masks, 2, case.layout, [case.layout] * 2)
    with pytest.raises(ValueError, match=r"query is \(2, 9, 10\); expected \[G, B, T, d\], or rows"):
        fast(query, [key], [value], case.masks, 2)


@only_cpp
def test_refuses_what_it_cannot_compute() -> None:
    case = draw_ragged(1, ([[3, 4]], [[3, 4]]), (1,), 2, 5)
    query, keys, values, masks, starts, key_starts, longest, heads = arguments(case)
    call = torch.ops.fastmmkd.cross_attention
    with pytest.raises(RuntimeError, match="query is Double; expected float32 or bfloat16"):
        call(query.double(), keys, values, masks, starts, key_starts, longest, heads)
    with pytest.raises(RuntimeError, match=r"mask 0 is \[1, 9\] Float"):
        call(query, keys, values, [masks[0].float()], starts, key_starts, longest, heads)
    for wrong, message in (
        ([0, 4, 3], "keys: sample 1 of model 0 has the rows from 4 up to 3; expected at most 4 of 9"),
        ([0, 2, 7], "keys: sample 1 of model 0 has the rows from 2 up to 7"),
        ([0, 8, 10], "keys: sample 0 of model 0 has the rows from 0 up to 8"),
        ([0, 4, 10], "keys: sample 1 of model 0 has the rows from 4 up to 10"),
        ([1, 3, 7], "keys: rows of model 0 start at 1; expected 0"),
    ):
        with pytest.raises(RuntimeError, match=message):
            call(query, keys, values, masks, starts, [torch.tensor([wrong])], longest, heads)
    with pytest.raises(RuntimeError, match=r"key_starts 0 are \[1, 2\] Long; starts are \[1, 3\]"):
        call(query, keys, values, masks, starts, [starts[:, :2]], longest, heads)
