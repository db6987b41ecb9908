"""Pooling and embedding of rows: of each sample what PyTorch makes of it alone, whatever lies beside it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmkd.nn.embedding import TemporalEmbedding, sinusoidal_positions
from fastmmkd.nn.pooling import masked_adaptive_mean, masked_mean
from fastmmkd.ops.layout import Layout
from fastmmkd.ops.temporal_convolution import temporal_windows
from tests.handmade import layout_of, ragged_layout, samples_of

LENGTHS = st.integers(1, 9)
BATCHES = st.tuples(st.integers(1, 2), st.integers(1, 4)).flatmap(
    lambda size: st.tuples(
        *(
            st.lists(st.lists(LENGTHS, min_size=size[1], max_size=size[1]), min_size=size[0], max_size=size[0])
            for _ in range(2)
        )
    )
)
"""The lengths `[S, B]` of two modalities."""


def nobodys(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    return x[~layout.is_somebodys]


def rows(layout: Layout, features: int, seed: int) -> torch.Tensor:
    """Noise, in rows of nobody too: what is there must not matter."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*layout.sample.shape, features, dtype=torch.float64, generator=generator)


@settings(deadline=None, max_examples=50)
@given(lengths=BATCHES, spare=st.integers(0, 3), seed=st.integers(0, 99))
def test_without_a_mask_it_is_pytorchs_adaptive_pooling(lengths, spare, seed) -> None:
    layout, to = (ragged_layout(of, spare=spare) for of in lengths)
    x = rows(layout, 3, seed)
    pooled, mask = masked_adaptive_mean(x, torch.ones_like(layout.is_somebodys), layout, to)
    for sample, bins in zip(samples_of(x, layout), samples_of(pooled, to), strict=True):
        expected = F.adaptive_avg_pool1d(sample.T, len(bins)).T
        torch.testing.assert_close(bins, expected)
    assert torch.equal(mask, to.is_somebodys)
    assert not nobodys(pooled, to).any()


@settings(deadline=None, max_examples=50)
@given(lengths=BATCHES, spare=st.integers(0, 3), seed=st.integers(0, 99))
def test_bins_are_means_of_the_frames_that_count(lengths, spare, seed) -> None:
    layout, to = (ragged_layout(of, spare=spare) for of in lengths)
    x = rows(layout, 3, seed)
    counts = rows(layout, 1, seed + 1).squeeze(-1) > 0
    pooled, pooled_mask = masked_adaptive_mean(x, counts, layout, to)
    of_samples = zip(
        *(samples_of(*of) for of in ((x, layout), (counts, layout), (pooled, to), (pooled_mask, to))), strict=True
    )
    for sample, mask, bins, filled in of_samples:
        n, k = len(sample), len(bins)
        for i in range(k):
            first, last = i * n // k, -(-(i + 1) * n // k)
            kept = sample[first:last][mask[first:last]]
            assert filled[i] == bool(len(kept))
            torch.testing.assert_close(bins[i], kept.mean(0) if len(kept) else torch.zeros_like(bins[i]))
    assert not nobodys(pooled_mask, to).any()


def test_masked_frames_are_left_out_and_empty_bins_are_zero() -> None:
    x = torch.arange(1.0, 7.0).view(1, 6, 1)
    mask = torch.tensor([[True, False, True, True, False, False]])
    pooled, pooled_mask = masked_adaptive_mean(x, mask, layout_of(1, 1, 6), layout_of(1, 1, 3))
    assert pooled.flatten().tolist() == [1.0, 3.5, 0.0]
    assert pooled_mask.flatten().tolist() == [True, True, False]


def test_rows_of_one_layout_stay_as_they_are() -> None:
    layout = ragged_layout([[2, 3]])
    x, mask = rows(layout, 2, 0), torch.rand(1, 5) < 0.5
    pooled, pooled_mask = masked_adaptive_mean(x, mask, layout, layout)
    assert pooled is x
    assert pooled_mask is mask


@pytest.mark.parametrize("padding", [(0, 0), (3, 0), (0, 2), (3, 2)])
def test_bins_are_those_of_the_frames_whatever_padding_comes_before_them(padding: tuple[int, int]) -> None:
    """A sample of 5 frames here and 3 there, and one of 2 and 4."""
    lengths = [[5, 2]], [[3, 4]]
    plain = [ragged_layout(of) for of in lengths]
    x = rows(plain[0], 3, 0)
    mask = torch.tensor([[True, False, True, True, True, False, True]])
    padded = [
        Layout.of(torch.tensor(of) + n, sum(of[0]) + 2 * n, max(of[0]) + n, torch.full((1, 2), n))
        for of, n in zip(lengths, padding, strict=True)
    ]
    in_padded = torch.cat([torch.arange(padding[0], 5 + padding[0]), torch.arange(2) + 5 + 2 * padding[0]])
    wide, wide_mask = x.new_full((1, padded[0].rows, 3), 7.0), mask.new_zeros(1, padded[0].rows)
    wide[:, in_padded], wide_mask[:, in_padded] = x, mask
    expected, found = masked_adaptive_mean(x, mask, *plain), masked_adaptive_mean(wide, wide_mask, *padded)
    for e, f in zip(expected, found, strict=True):
        for own, other in zip(samples_of(e, plain[1]), samples_of(f, padded[1]), strict=True):
            torch.testing.assert_close(other[padding[1] :], own)
            assert not other[: padding[1]].any()


@settings(deadline=None, max_examples=50)
@given(lengths=BATCHES, spare=st.integers(0, 3), groups=st.integers(1, 2), seed=st.integers(0, 99))
def test_a_mean_is_that_of_a_samples_frames_that_count(lengths, spare, groups, seed) -> None:
    layout = ragged_layout(lengths[0], spare=spare)
    x = torch.cat([rows(layout, 3, seed + g) for g in range(groups)]).unflatten(0, (groups, -1)).transpose(0, 1)
    counts = torch.cat([rows(layout, 1, seed - g - 1) > 0 for g in range(groups)]).squeeze(-1)
    counts = counts.unflatten(0, (groups, -1)).transpose(0, 1)
    means = masked_mean(x.flatten(0, 1), counts.flatten(0, 1), layout).unflatten(0, x.shape[:2])
    for g in range(groups):
        of_group = zip(samples_of(x[:, g], layout), samples_of(counts[:, g], layout), strict=True)
        expected = [sample[mask].mean(0) if mask.any() else torch.zeros(3).double() for sample, mask in of_group]
        torch.testing.assert_close(means[:, g].flatten(0, 1), torch.stack(expected))


@settings(deadline=None, max_examples=50)
@given(lengths=BATCHES, spare=st.integers(0, 3), seed=st.integers(0, 99))
def test_windows_are_a_convolutions_receptive_field(lengths, spare, seed) -> None:
    layout = ragged_layout(lengths[0], spare=spare)
    x = rows(layout, 4, seed).masked_fill(~layout.is_somebodys.unsqueeze(-1), 0.0)
    weight = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    windows = temporal_windows(x, layout) @ weight
    kernel = weight.view(3, 4, 5).permute(2, 1, 0)
    for sample, convolved in zip(samples_of(x, layout), samples_of(windows, layout), strict=True):
        torch.testing.assert_close(convolved, F.conv1d(sample.T[None], kernel, padding=1)[0].T)
    assert not nobodys(windows, layout).any()


def test_gradients_are_those_of_the_samples_alone() -> None:
    """Of all three at once, by finite differences."""
    layout, to = ragged_layout([[3, 1], [2, 4]], spare=1), ragged_layout([[2, 3], [1, 1]], spare=2)
    x = rows(layout, 2, 0).requires_grad_()
    counts = rows(layout, 1, 1).squeeze(-1) > 0

    def outputs(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (
            temporal_windows(x, layout),
            masked_mean(x, counts, layout),
            masked_adaptive_mean(x, counts, layout, to)[0],
        )

    assert torch.autograd.gradcheck(outputs, x)


@pytest.mark.parametrize("positions", ["first", "last"])
def test_an_embedding_counts_positions_from_a_samples_first_frame_or_its_last(positions) -> None:
    embedding = TemporalEmbedding(1, (2,), 4, positions=positions).double()
    (convolution,) = embedding.convolutions
    layout = ragged_layout([[3, 1, 2]], spare=2)
    x = rows(layout, 2, 0)
    (z,) = embedding([x], [layout])
    table = sinusoidal_positions(3, 4, torch.device("cpu"), torch.float64)
    for sample, embedded in zip(samples_of(x, layout), samples_of(z, layout), strict=True):
        alone = convolution(temporal_windows(sample[None], layout_of(1, 1, len(sample))))[0]
        codes = table[: len(sample)]
        torch.testing.assert_close(embedded, alone + (codes if positions == "first" else codes.flip(0)))


def test_positions_by_hand() -> None:
    table = sinusoidal_positions(3, 5, torch.device("cpu"), torch.float64)
    assert table.shape == (3, 5)
    assert table[0].tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]
    torch.testing.assert_close(table[2, 0].item(), torch.sin(torch.tensor(2.0)).item(), rtol=1e-6, atol=1e-6)
