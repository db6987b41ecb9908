import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmkd.ops import cross_attention, residual_layer_norm
from fastmmkd.testing import attention


def literal_attention(query, keys, values, masks, heads):
    """The definition, one group, row, head and query at a time."""
    key, value, mask = torch.cat(keys, 2), torch.cat(values, 2), torch.cat(masks, 2)
    out = torch.zeros_like(query)
    width = query.shape[-1] // heads
    for g in range(query.shape[0]):
        for b in range(query.shape[1]):
            usable = mask[g, b].nonzero().flatten()
            for h in range(heads):
                part = slice(h * width, (h + 1) * width)
                for t in range(query.shape[2]):
                    if len(usable):
                        scores = key[g, b, usable, part] @ query[g, b, t, part] / math.sqrt(width)
                        out[g, b, t, part] = torch.softmax(scores, 0) @ value[g, b, usable, part]
    return out


def segments(generator, groups, batch, lengths, width):
    def draw(t):
        return torch.randn(groups, batch, t, width, dtype=torch.float64, generator=generator)

    keys, values = [draw(t) for t in lengths], [draw(t) for t in lengths]
    masks = [torch.rand(groups, batch, t, generator=generator) < 0.6 for t in lengths]
    return keys, values, masks


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 1000),
    groups=st.integers(1, 3),
    batch=st.integers(1, 2),
    queries=st.integers(1, 4),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    heads=st.sampled_from([1, 2]),
    head_dim=st.integers(1, 5),
)
def test_equals_the_definition(seed, groups, batch, queries, lengths, heads, head_dim) -> None:
    generator = torch.Generator().manual_seed(seed)
    width = heads * head_dim
    query = torch.randn(groups, batch, queries, width, dtype=torch.float64, generator=generator)
    keys, values, masks = segments(generator, groups, batch, lengths, width)
    expected = literal_attention(query, keys, values, masks, heads)
    torch.testing.assert_close(cross_attention(query, keys, values, masks, heads), expected)


def ragged(models: int):
    """Queries and two segments of other lengths, rows of nobody, a sample without keys; groups, S times two."""
    lengths = [[3, 1, 2], [1, 4, 2]][:models], [[2, 2, 1], [3, 1, 1]][:models]
    layouts = [attention.layout_of(of, 1) for of in lengths]
    generator = torch.Generator().manual_seed(0)
    case = attention.draw_ragged(2 * models, (lengths[0], *lengths), (models, 2 * models), 2, 2, torch.float64, spare=1)
    for mask, of in zip(case.masks, layouts, strict=True):
        mask |= torch.rand(mask.shape, generator=generator) < 0.3
        mask.masked_fill_((of.sample == 1).repeat_interleave(len(mask) // models, 0), False)
    return case, layouts


@pytest.mark.parametrize("models", [1, 2])
def test_a_ragged_batch_is_its_samples_one_by_one(models) -> None:
    case, (layout, other) = ragged(models)
    out = case.call(cross_attention)(*case.inputs)
    of_inputs = layout, layout, other, layout, other
    groups = len(out)
    assert (out.masked_fill(layout.is_somebodys.repeat_interleave(2, 0).unsqueeze(-1), 0) == 0).all()
    for group in range(groups):

        def rows(x, of, sample, group=group):
            start, end = of.starts[group // 2, sample : sample + 2]
            return x[group * len(x) // groups, start:end][None, None]

        for sample in range(layout.batch):
            query, *kv = (rows(x, of, sample) for x, of in zip(case.inputs, of_inputs, strict=True))
            masks = [rows(x, of, sample) for x, of in zip(case.masks, (layout, other), strict=True)]
            expected = literal_attention(query, kv[:2], kv[2:], masks, case.heads)
            torch.testing.assert_close(rows(out, layout, sample), expected)


@pytest.mark.parametrize("models", [1, 2])
def test_gradients_of_a_ragged_batch(models) -> None:
    case, _ = ragged(models)
    leaves = [x.requires_grad_() for x in case.inputs]
    assert torch.autograd.gradcheck(case.call(cross_attention), leaves)
    assert torch.autograd.gradgradcheck(case.call(cross_attention), leaves)


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 2, 3, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    keys, values, masks = segments(generator, 2, 2, (3, 2), 4)
    for x in (*keys, *values):
        x.requires_grad_()
    masks[0][0, 0] = masks[1][0, 0] = False  # a row without any key

    def f(query, *kv):
        return cross_attention(query, kv[:2], kv[2:], masks, 2)

    assert torch.autograd.gradcheck(f, (query, *keys, *values))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_no_key_gives_zero_output_and_zero_gradient(dtype) -> None:
    query = torch.randn(1, 1, 3, 4, dtype=dtype, requires_grad=True)
    key, value = (torch.full((1, 1, 5, 4), 7.0, dtype=dtype, requires_grad=True) for _ in range(2))
    out = cross_attention(query, [key], [value], [torch.zeros(1, 1, 5, dtype=torch.bool)], 2)
    out.sum().backward()
    assert out.dtype == dtype
    assert (out == 0).all()
    for x in (query, key, value):
        assert (x.grad == 0).all()


def test_masked_keys_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(1, 2, 3, 4, generator=generator)
    key, value = (torch.randn(1, 2, 5, 4, generator=generator) for _ in range(2))
    mask = torch.tensor([[[True, False, True, False, False], [False, True, True, True, True]]])
    out = cross_attention(query, [key], [value], [mask], 2)
    key[~mask], value[~mask] = 1e4, -1e4
    torch.testing.assert_close(cross_attention(query, [key], [value], [mask], 2), out)


def test_attention_says_which_shape_is_wrong() -> None:
    x, mask = torch.zeros(1, 2, 3, 4), torch.ones(1, 2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"key_mask is \(1, 2, 4\), keys need \(1, 2, 3\)"):
        cross_attention(x, [x], [x], [torch.ones(1, 2, 4, dtype=torch.bool)], 2)
    with pytest.raises(ValueError, match="3 heads do not divide the width 4"):
        cross_attention(x, [x], [x], [mask], 3)
    with pytest.raises(ValueError, match="1 key, 2 value and 1 mask segments"):
        cross_attention(x, [x], [x, x], [mask], 2)


def test_residual_layer_norm_equals_pytorchs_per_group() -> None:
    x, r = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    weight, bias = torch.randn(2, 5), torch.randn(2, 5)
    out = residual_layer_norm(x, r, weight, bias)
    for g in range(2):
        expected = torch.nn.functional.layer_norm(x[g] + r[g], (5,), weight[g], bias[g])
        torch.testing.assert_close(out[g], expected)


def test_residual_layer_norm_gradients() -> None:
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in [(2, 3, 5)] * 2 + [(2, 5)] * 2]
    assert torch.autograd.gradcheck(residual_layer_norm, inputs)
