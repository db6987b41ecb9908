"""Sums and means over bands of frames against dense adjacencies, and the convolutions made of them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmkd.nn.neighbourhood import Band, NeighbourhoodConvolution, RelationalConvolution, band_mean, band_sum
from fastmmkd.ops.layout import Layout
from tests.handmade import ragged_layout, samples_of

BANDS = st.tuples(st.integers(-4, 4), st.integers(-4, 4)).map(lambda band: (min(band), max(band)))
LENGTHS = st.lists(st.lists(st.integers(1, 6), min_size=3, max_size=3), min_size=1, max_size=2)


def rows(layout: Layout, d: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*layout.sample.shape, d, generator=generator, dtype=torch.float64)


def adjacency(counts: torch.Tensor, band: Band) -> torch.Tensor:
    """`A [T, T]`, 1 where the column is a node in the row's band."""
    frames = len(counts)
    near = [[float(band[0] <= other - t <= band[1]) for other in range(frames)] for t in range(frames)]
    return torch.tensor(near, dtype=torch.float64) * counts


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTHS, band=BANDS, spare=st.integers(0, 2), seed=st.integers(0, 99))
def test_bands_are_dense_adjacencies(lengths: list[list[int]], band: Band, spare: int, seed: int) -> None:
    layout = ragged_layout(lengths, spare=spare)
    x = rows(layout, 3, seed)
    counts = (rows(layout, 1, seed + 1).squeeze(-1) > -0.5) & layout.is_somebodys
    found = zip(*(samples_of(of(x, counts, layout, band), layout) for of in (band_sum, band_mean)), strict=True)
    of_samples = zip(samples_of(x, layout), samples_of(counts, layout), found, strict=True)
    for sample, counted, (total, mean) in of_samples:
        a = adjacency(counted, band)
        torch.testing.assert_close(total, a @ sample)
        torch.testing.assert_close(mean, a @ sample / a.sum(1, keepdim=True).clamp_min(1))


@pytest.mark.parametrize("models", [1, 2])
def test_convolutions_and_their_gradients_are_those_of_dense_adjacencies(models: int) -> None:
    torch.manual_seed(0)
    bands: tuple[Band, ...] = ((-2, -1), (0, 0), (1, 2))
    relational = RelationalConvolution(models, 3, 4, bands).double()
    neighbourhood = NeighbourhoodConvolution(models, 4, (-2, 2)).double()
    layout = ragged_layout([[5, 1, 3], [2, 4, 1]][:models], spare=1)
    x, counts = rows(layout, 3).requires_grad_(), layout.is_somebodys.clone()
    counts[0, 1] = False
    made = neighbourhood(relational(x, counts, layout), counts, layout)
    expected = []
    for i, (sample, counted) in enumerate(zip(samples_of(x, layout), samples_of(counts, layout), strict=True)):
        s = i // layout.batch
        h = sample @ relational.own.weight[s] + relational.own.bias[s]
        for r, band in enumerate(bands):
            a = adjacency(counted, band)
            h = h + a @ sample / a.sum(1, keepdim=True).clamp_min(1) @ relational.relations[s, r]
        own = h @ neighbourhood.own.weight[s] + neighbourhood.own.bias[s]
        expected.append(own + adjacency(counted, (-2, 2)) @ h @ neighbourhood.neighbours[s])
    torch.testing.assert_close(samples_of(made, layout), expected)
    wanted = [x, *relational.parameters(), *neighbourhood.parameters()]
    upstream = rows(layout, 4, seed=3) * layout.factor(x.dtype).unsqueeze(-1)
    literal = sum((y * g).sum() for y, g in zip(expected, samples_of(upstream, layout), strict=True))
    torch.testing.assert_close(
        torch.autograd.grad((made * upstream).sum(), wanted), torch.autograd.grad(literal, wanted)
    )
