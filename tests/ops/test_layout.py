"""Ragged batches: where rows lie, and the way from rows to padded batches and back."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmkd.ops.layout import Layout, pack, split_versions, take, unpack

LENGTHS = {"one model": [[3, 1, 4]], "two models": [[3, 1, 4], [1, 5, 1]], "a row": [[1]]}
of_each = pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS)


def layout_of(lengths: list[list[int]], spare: int = 2) -> Layout:
    return Layout.of(torch.tensor(lengths), max(map(sum, lengths)) + spare, max(map(max, lengths)))


def rows(layout: Layout, groups: int, *width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(groups, layout.rows, *width, dtype=torch.float64, generator=generator)


def literally_unpacked(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """One row at a time."""
    padded = x.new_zeros((len(x), layout.batch, layout.longest, *x.shape[2:]))
    for group in range(len(x)):
        starts = layout.starts[group // (len(x) // len(layout.starts))].tolist()
        for b in range(layout.batch):
            for t, row in enumerate(range(starts[b], starts[b + 1])):
                padded[group, b, t] = x[group, row]
    return padded


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.integers(1, 4).flatmap(
        lambda batch: st.lists(st.lists(st.integers(1, 6), min_size=batch, max_size=batch), min_size=1, max_size=3)
    ),
    spare=st.integers(0, 3),
)
def test_what_a_layout_says(lengths, spare) -> None:
    layout = layout_of(lengths, spare)
    batch = len(lengths[0])
    assert (layout.batch, layout.rows) == (batch, max(map(sum, lengths)) + spare)
    for s, of in enumerate(lengths):
        whose = [b for b, n in enumerate(of) for _ in range(n)]
        nobodys = layout.rows - len(whose)
        assert layout.lengths[s].tolist() == of
        assert layout.sample[s].tolist() == whose + [batch] * nobodys
        assert layout.position[s].tolist() == [t for n in of for t in range(n)] + [0] * nobodys
        assert layout.counted_from("last")[s].tolist() == [n - 1 - t for n in of for t in range(n)] + [0] * nobodys
        assert layout.is_somebodys[s].tolist() == [True] * len(whose) + [False] * nobodys
        assert layout.last[s].tolist() == [sum(of[: b + 1]) - 1 for b in range(batch)]
        assert layout.is_last[s].nonzero().flatten().tolist() == layout.last[s].tolist()
        assert layout.frame_mask[s].sum(-1).tolist() == of
        assert layout.frame_mask.shape == (len(lengths), batch, layout.longest)


def test_positions_count_from_a_samples_first_frame() -> None:
    lengths, padding = torch.tensor([[3, 1, 4], [1, 5, 1]]), torch.tensor([[2, 0, 4], [1, 0, 0]])
    layout = Layout.of(lengths, 9, 5, padding)
    assert layout.position.tolist() == [[0, 0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 2, 3, 4, 0, 0, 0]]
    assert torch.equal(layout.starts, Layout.of(lengths, 9, 5).starts)


def test_a_padded_batch_is_a_view_of_rows_of_samples_of_one_length() -> None:
    lengths = torch.full((2, 3), 4)
    uniform, layout = (Layout.of(lengths, 12, 4, is_uniform=known) for known in (True, False))
    assert (uniform.is_full, layout.is_full) == (True, False)
    x = rows(layout, 4, 2)
    padded = unpack(x, uniform)
    assert torch.equal(padded, unpack(x, layout))
    assert torch.equal(pack(padded, uniform), x)
    assert padded.data_ptr() == pack(padded, uniform).data_ptr() == x.data_ptr()
    twice = Layout.of(lengths.repeat(1, 2), 24, 4)
    y = rows(twice, 4, 2)
    for part, expected in zip(split_versions(y, twice, uniform), split_versions(y, twice, layout), strict=True):
        assert torch.equal(part, expected)


@of_each
@pytest.mark.parametrize("versions", [1, 2, 3])
@pytest.mark.parametrize("is_full", [False, True])
def test_rows_of_each_version_and_their_gradients(lengths, versions, is_full) -> None:
    if is_full:
        lengths = lengths[:1]
    spare = 0 if is_full else 2
    one = layout_of(lengths, spare)
    one = Layout.of(one.lengths, one.rows, one.longest, is_full=is_full)
    layout = layout_of([of * versions for of in lengths], spare)
    x = rows(layout, 2 * len(lengths), 2).requires_grad_()
    parts = split_versions(x, layout, one)
    assert len(parts) == versions
    padded = unpack(x, layout).unflatten(1, (versions, one.batch))
    for v, part in enumerate(parts):
        assert torch.equal(unpack(part, one), padded[:, v])
        assert part.shape[1] == one.rows
    assert torch.autograd.gradcheck(lambda x: [y.square() for y in split_versions(x, layout, one)], x)
    assert torch.autograd.gradgradcheck(lambda x: [y.square() for y in split_versions(x, layout, one)], x)


@of_each
@pytest.mark.parametrize("times", [1, 3])
def test_unpack_is_literal_and_pack_its_inverse(lengths, times) -> None:
    layout = layout_of(lengths)
    x = rows(layout, times * len(lengths), 2)
    x.unflatten(0, (len(lengths), -1)).masked_fill_(~layout.is_somebodys[:, None, :, None], float("nan"))
    padded = unpack(x, layout)
    assert torch.equal(padded, literally_unpacked(x, layout))
    assert torch.equal(pack(padded, layout), x.nan_to_num(0.0))


@of_each
def test_masks_and_rows_of_any_number_of_axes(lengths) -> None:
    layout = layout_of(lengths)
    assert torch.equal(unpack(layout.is_somebodys, layout), layout.frame_mask)
    assert torch.equal(pack(layout.frame_mask, layout), layout.is_somebodys)
    x = rows(layout, len(lengths), 2, 3)
    assert torch.equal(unpack(x, layout), literally_unpacked(x, layout))


@of_each
def test_room_for_longer_samples(lengths) -> None:
    starts = layout_of(lengths)
    layout = Layout.of(starts.lengths, starts.rows, starts.longest + 3)
    x = rows(layout, len(lengths), 2)
    assert torch.equal(unpack(x, layout)[:, :, : starts.longest], unpack(x, starts))
    assert (unpack(x, layout)[:, :, starts.longest :] == 0).all()


@of_each
@pytest.mark.parametrize("way", [unpack, pack])
def test_gradients_of_the_ways(way, lengths) -> None:
    layout = layout_of(lengths)
    x = rows(layout, 2 * len(lengths), 2)
    x = (x if way is unpack else unpack(x, layout)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: way(x, layout).square(), x)
    assert torch.autograd.gradgradcheck(lambda x: way(x, layout).square(), x)


@of_each
def test_take_and_its_gradients(lengths) -> None:
    layout = layout_of(lengths)
    x = rows(layout, 2 * len(lengths), 2).requires_grad_()
    taken = take(x, layout.last)
    for group in range(len(x)):
        assert torch.equal(taken[group], x[group, layout.last[group // 2]])
    assert torch.autograd.gradcheck(lambda x: take(x, layout.last).square(), x)
    assert torch.autograd.gradgradcheck(lambda x: take(x, layout.last).square(), x)


def test_nothing_is_read_by_the_host() -> None:
    """So a step can be captured in a graph."""
    layout = layout_of(LENGTHS["two models"])
    on_meta = Layout.of(torch.empty(2, 3, dtype=torch.int64, device="meta"), layout.rows, layout.longest)
    x = torch.empty(4, layout.rows, 2, device="meta")
    assert unpack(x, on_meta).shape == (4, 3, layout.longest, 2)
    assert pack(unpack(x, on_meta), on_meta).shape == x.shape
    assert take(x, on_meta.last).shape == (4, 3, 2)


def test_the_ways_compile_to_one_graph() -> None:
    layout = layout_of(LENGTHS["two models"])

    def there_and_back(x: torch.Tensor) -> torch.Tensor:
        return take(pack(unpack(x, layout).square(), layout), layout.last)

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    leaves = [rows(layout, 2, 3).requires_grad_() for _ in range(2)]
    results = [f(x) for f, x in zip((there_and_back, compiled), leaves, strict=True)]
    grads = [torch.autograd.grad(out.sum(), x)[0] for out, x in zip(results, leaves, strict=True)]
    assert torch.equal(*results)
    assert torch.equal(*grads)
