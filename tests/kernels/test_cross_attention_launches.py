"""Which kernels attention launches, and with what: recorded for "meta" tensors, without a GPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from fastmmkd.kernels.cross_attention import cross_attention, cross_attention_backward
from fastmmkd.kernels.launch import Launch, recorded

VOLTA, AMPERE = (7, 0), (8, 0)


def draw(queries, lengths, heads, head_width, dtype=torch.float32, groups=3, batch=4, spare=5):
    """Query, keys, values, masks and starts, as the models' projections and masks arrive: halves, and masks shared."""
    width = heads * head_width
    starts = torch.empty(1, batch + 1, dtype=torch.int64, device="meta")

    def rows(longest):
        return batch * longest + spare if longest else 0

    def empty(longest, columns):
        return torch.empty(groups, rows(longest), columns, dtype=dtype, device="meta")

    query = empty(queries, 2 * width)[..., width:]
    keys, values = zip(*(empty(t, 2 * width).chunk(2, -1) for t in lengths), strict=True)
    masks = [torch.empty(1, rows(t), dtype=torch.bool, device="meta") for t in lengths]
    return query, keys, values, masks, starts, [starts] * len(lengths), [queries, *lengths]


def record(inputs, heads, grad=None, capability=AMPERE) -> tuple[list[Launch], list[Launch]]:
    """The launches of the forward and of the backward pass."""
    with recorded(capability) as forward:
        out, statistics = cross_attention(*inputs, heads)
    grad = torch.empty_like(out) if grad is None else grad
    with recorded(capability) as backward:
        gradients = cross_attention_backward(grad, *inputs, out, statistics, heads)
    assert out.shape == gradients[0].shape == inputs[0].shape
    assert [x.shape for x in gradients[1]] == [x.shape for x in inputs[1]]
    assert [x.shape for x in gradients[2]] == [x.shape for x in inputs[2]]
    return forward, backward


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("lengths", [(50,), (50, 50), (20, 375, 500)])
def test_one_launch_forward_and_one_backward(lengths, heads, dtype) -> None:
    forward, backward = record(draw(50, lengths, heads, 5, dtype), heads)
    assert (len(forward), len(backward)) == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("queries", [1, 20, 50, 63, 375])
def test_the_grid_has_room_for_the_longest_sample_and_for_nobody(queries, dtype) -> None:
    (forward,), (backward,) = record(draw(queries, (50, 31), 8, 5, dtype), 8)
    assert forward.grid[0] == backward.grid[0] == 3 * (4 + 1) * 8
    owned = forward.options["BO"]
    assert (forward.grid[1] - 1) * owned < queries <= forward.grid[1] * owned
    owned = backward.options["BO"]
    query_blocks = -(-queries // owned)
    key_blocks = backward.grid[1] - query_blocks
    assert (key_blocks - 1) * owned < 81 <= key_blocks * owned


def test_without_queries_or_keys() -> None:
    assert [len(launches) for launches in record(draw(0, (50,), 8, 5), 8)] == [0, 1]
    assert [len(launches) for launches in record(draw(50, (0, 0), 8, 5), 8)] == [1, 1]
    assert [len(launches) for launches in record(draw(0, (0,), 8, 5), 8)] == [0, 0]


def test_views_are_not_copied() -> None:
    inputs = draw(50, (50, 31), 8, 5)
    grad = torch.empty(3, 205, 80, device="meta")[..., :40]
    (forward,), (backward,) = record(inputs, 8, grad)
    for launch in (forward, backward):
        query, keys, values, masks, starts, key_starts = launch.args[:6]
        for given, taken in zip(
            (inputs[0], *inputs[1], *inputs[2], *inputs[3], inputs[4], *inputs[5]),
            (query, *keys, *values, *masks, starts, *key_starts),
            strict=True,
        ):
            assert taken[0] is given
            assert taken[1:] == (3 // len(given), *given.stride()[:2])
    named = dict(zip(backward.kernel.arg_names, backward.args, strict=False))
    assert named["grad"] == (grad, 1, *grad.stride()[:2])
    (out,) = forward.args[6:7]
    assert out[1:] == (1, 205 * 40, 40)


def test_the_gradient_of_a_sum_and_features_apart_are_copied() -> None:
    query, *others = draw(50, (50,), 8, 5)
    apart = query.transpose(1, 2).contiguous().transpose(1, 2)
    _, (backward,) = record((apart, *others), 8, torch.empty((), device="meta").expand(3, 205, 40))
    named = dict(zip(backward.kernel.arg_names, backward.args, strict=False))
    for name in ("query", "grad"):
        assert named[name][1:] == (1, 205 * 40, 40)


@pytest.mark.parametrize(
    ("dtype", "capability", "head_width", "tile"),
    [
        (torch.float32, AMPERE, 5, None),
        (torch.float32, AMPERE, 15, "fp32"),
        (torch.float16, AMPERE, 5, "fp16"),
        (torch.bfloat16, AMPERE, 15, "bf16"),
        (torch.float16, VOLTA, 5, None),
        (torch.float16, VOLTA, 15, "fp32"),
    ],
)
def test_tensor_cores_and_head_width_decide_how_scores_are_made(dtype, capability, head_width, tile) -> None:
    for (launch,) in record(draw(50, (50,), 8, head_width, dtype), 8, capability=capability):
        chosen = launch.options["TILE"]
        assert (chosen and str(chosen)) == tile
        assert chosen is not None or launch.options["num_warps"] == 1
