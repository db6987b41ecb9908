"""The CUDA kernels of attention, thread by thread on a CPU, against the fp64 reference."""

import math

import pytest
import torch

from fastmmkd.testing.attention import RAGGED, SHAPES, AttentionCase, draw, draw_ragged, hold
from fastmmkd.testing.parity import poisoned_memory
from tests.cuda.emulated import arguments, attention, needs_compiler, operations, reversed_order

pytestmark = needs_compiler

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def run(case: AttentionCase) -> list[torch.Tensor]:
    """In memory that starts as NaN, and in two orders of threads, between which no result may differ."""
    with poisoned_memory():
        found = attention(case)
        with reversed_order():
            again = attention(case)
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(found, again, strict=True))
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_plain_pytorch(shape, dtype) -> None:
    case = draw(*shape, dtype)
    hold(case, run(case))


@pytest.mark.parametrize("head_width", [4, 10, 16])
def test_unaligned_and_across_every_tile_boundary(head_width) -> None:
    case = draw(1, 1, 70, (210, 129), 1, head_width, present=0.8)
    hold(case, run(case))


@pytest.mark.parametrize("size", [1e-3, 4.0, 12.0])
def test_flat_and_sharp_distributions(size) -> None:
    case = draw(1, 2, 20, (20, 20), 2, 5, size=size)
    hold(case, run(case), terms=max(size, 1.0))


@pytest.mark.parametrize("head_width", [5, 20])
def test_absent_modalities_and_rows_without_keys(head_width) -> None:
    case = draw(2, 3, 9, (10, 20, 30), 2, head_width, present=0.8)
    case.masks[1][:] = False
    for mask in case.masks:
        mask[1, 2] = False
    found = run(case)
    hold(case, found)
    out, grad_query, *others = found
    assert (out[1, 2] == 0).all()
    assert (grad_query[1, 2] == 0).all()
    for gradient, mask in zip(others, case.masks * 2, strict=True):
        assert (gradient[~mask] == 0).all()


def test_no_key_at_all_and_no_query_at_all() -> None:
    assert all((x == 0).all() for x in run(draw(1, 2, 5, (4, 3), 2, 5, present=0.0)))
    no_query = run(draw(1, 2, 0, (4, 3), 2, 5))
    no_frames = run(draw(1, 2, 5, (0, 0), 2, 5))
    assert no_query[0].numel() == 0
    assert all((x == 0).all() for x in (*no_query[2:], no_frames[0]))


@pytest.mark.parametrize("head_width", [5, 20])
def test_what_is_masked_is_never_read(head_width) -> None:
    case = draw(1, 2, 5, (20, 7), 2, head_width, present=0.5)
    expected = run(case)
    for x, mask in zip(case.inputs[1:], case.masks * 2, strict=True):
        x[~mask] = float("nan")
    assert all(torch.equal(a, b) for a, b in zip(run(case), expected, strict=True))


@pytest.mark.parametrize("head_width", [5, 20])
def test_a_nan_stays_one(head_width) -> None:
    case = draw(1, 2, 5, (20, 7), 2, head_width, present=1.0)
    case.inputs[0][0, 0, 3, 0] = float("nan")
    case.inputs[2][0, 1, 2, head_width] = float("nan")
    out = run(case)[0]
    assert out[0, 0, 3, :head_width].isnan().all()
    assert out[0, 1, :, head_width:].isnan().all()
    assert out[0, 0, [0, 1, 2, 4]].isfinite().all()
    assert out[0, 1, :, :head_width].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_views_of_other_tensors(dtype) -> None:
    case = draw(3, 2, 9, (10, 20), 2, 5, dtype)
    expected = run(case)

    def packed(x):
        return torch.cat((x, x), -1).chunk(2, -1)[1]

    def turned(x):
        return x.transpose(0, 3).contiguous().transpose(0, 3)

    for change in (packed, turned):
        masks = [change(m[..., None])[..., 0] for m in case.masks]
        changed = AttentionCase([change(x) for x in case.inputs], masks, 2, change(case.grad))
        assert not changed.inputs[0].is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(run(changed), expected, strict=True))


def test_shared_masks_and_gradients_of_a_sum() -> None:
    case = draw(2, 2, 6, (8,), 2, 5)
    case.masks = [case.masks[0][:1].expand(2, -1, -1)]
    case.grad = torch.ones(1, 1, 1, 1).expand(2, 2, 6, 10)
    hold(case, run(case))


@pytest.mark.parametrize("head_width", [5, 16, 20])
@pytest.mark.parametrize("name", RAGGED)
def test_ragged_batches(name, head_width) -> None:
    case = draw_ragged(*RAGGED[name], 2, head_width)
    hold(case, run(case))


@pytest.mark.parametrize("head_width", [5, 20])
def test_samples_and_nobody_across_every_tile_boundary(head_width) -> None:
    lengths = [[1, 130, 2, 65]], [[200, 3, 1, 64]], [[31, 33, 129, 1]]
    case = draw_ragged(1, lengths, (1, 1), 1, head_width, spare=300)
    hold(case, run(case))


@pytest.mark.parametrize("head_width", [5, 20])
def test_rows_of_nobody_are_never_read_and_get_zeros(head_width) -> None:
    case = draw_ragged(*RAGGED["two models, unaligned"], 2, head_width, spare=40)
    expected = run(case)
    of_all = [case.layout, *case.key_layouts * 2]
    nobodys = [~of.is_somebodys.repeat_interleave(4 // len(of.starts), 0) for of in of_all]
    for x, empty in zip((*case.inputs, case.grad), (*nobodys, nobodys[0]), strict=True):
        x[empty] = float("nan")
    actual = run(case)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert all((x[empty] == 0).all() for x, empty in zip(actual, (nobodys[0], *nobodys), strict=True))


@pytest.mark.parametrize("head_width", [5, 20])
def test_statistics(head_width) -> None:
    case = draw(1, 2, 3, (4,), 2, head_width, present=1.0)
    query, key, _ = case.inputs
    _, statistics = operations().cross_attention(*arguments(case))
    top, share = statistics.unflatten(-1, (2, 3)).movedim(-2, 1).unbind(3)
    split = (2, head_width)
    scores = torch.einsum("gbqhe,gbkhe->gbhqk", query.unflatten(-1, split), key.unflatten(-1, split)) * head_width**-0.5
    torch.testing.assert_close(top * math.log(2), scores.amax(-1))
    torch.testing.assert_close(share, (scores - scores.amax(-1, keepdim=True)).exp().sum(-1).reciprocal())


def test_what_the_kernels_cannot_do_is_refused() -> None:
    wide = draw(1, 1, 2, (3,), 1, 257)
    with pytest.raises(RuntimeError, match="heads are 257 wide; expected at most 256"):
        attention(wide)
    with pytest.raises(RuntimeError, match="4 segments; expected at most 3"):
        attention(draw(1, 1, 2, (3, 1, 1, 1), 1, 4))
    with pytest.raises(RuntimeError, match="query is Double; expected float32, float16 or bfloat16"):
        attention(draw(1, 1, 2, (3,), 1, 4, torch.float64))
