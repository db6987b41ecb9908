"""k-means against loops, and normal noise that depends on its keys alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmkd.nn.kmeans import kmeans
from fastmmkd.nn.noise import NOISE_STREAMS, normal_noise
from fastmmkd.ops.philox import WORD, DrawKeys, philox, uniform


def literal_kmeans(rows: list[torch.Tensor], picks: list[float], iterations: int) -> list[torch.Tensor]:
    """Of one group; rows that do not count are left out."""
    centroids: list[torch.Tensor] = []
    for pick in picks:
        odds = [min(((x - c) ** 2).sum().item() for c in centroids) if centroids else 1.0 for x in rows]
        odds = odds if sum(odds) > 0 else [1.0] * len(rows)
        below, chosen = 0.0, rows[-1]
        for x, odd in zip(rows, odds, strict=True):
            below += odd
            if pick * sum(odds) < below:
                chosen = x
                break
        centroids.append(chosen)
    for _ in range(iterations):
        members: list[list[torch.Tensor]] = [[] for _ in centroids]
        for x in rows:
            distances = [((x - c) ** 2).sum().item() for c in centroids]
            members[distances.index(min(distances))].append(x)
        centroids = [sum(of) / len(of) if of else c for of, c in zip(members, centroids, strict=True)]  # type: ignore[misc]
    return centroids


@settings(deadline=None, max_examples=30)
@given(
    rows=st.integers(1, 12),
    centroids=st.integers(1, 5),
    iterations=st.sampled_from([0, 1, 20]),
    seed=st.integers(0, 1000),
)
def test_it_is_the_loop(rows: int, centroids: int, iterations: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, rows, 3, generator=generator, dtype=torch.float64)
    counts = torch.rand(2, rows, generator=generator) < 0.7
    counts[:, seed % rows] = True
    picks = torch.rand(2, centroids, generator=generator)
    found = kmeans(x, counts, picks, iterations)
    assert found.isfinite().all()
    for group in range(2):
        counted = [row for row, counted in zip(x[group], counts[group], strict=True) if counted]
        if len(counted) > centroids:  # where there are fewer, ties are broken by rounding
            expected = literal_kmeans(counted, picks[group].double().tolist(), iterations)
            torch.testing.assert_close(found[group], torch.stack(expected))


def test_clusters_that_lie_apart_are_found() -> None:
    middles = torch.tensor([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0]], dtype=torch.float64)
    offsets = torch.randn(30, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = middles.repeat(10, 1) + offsets
    found = kmeans(x[None], torch.ones(1, 30, dtype=torch.bool), torch.tensor([[0.1, 0.5, 0.9]]), 20)[0]
    expected = torch.stack([x[k::3].mean(0) for k in range(3)])
    torch.testing.assert_close(found[found.sum(1).argsort()], expected[expected.sum(1).argsort()])


def test_few_rows_are_taken_more_than_once() -> None:
    x = torch.tensor([[[1.0, 2.0], [9.0, 9.0]]])
    found = kmeans(x, torch.tensor([[True, False]]), torch.tensor([[0.3, 0.6, 0.99]]), 5)
    torch.testing.assert_close(found, x[:, :1].expand(1, 3, 2))


DRAW = DrawKeys(torch.tensor([[7, 2, 9], [7, 1, 0]]), torch.tensor([3, 4]), torch.tensor(5))


def test_noise_is_normal() -> None:
    many = DrawKeys(torch.arange(500)[None], torch.tensor([3]), torch.tensor(0))
    z = normal_noise(many, 0, 60, torch.float64).flatten()
    assert z.isfinite().all()
    for moment, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert (z**moment).mean().item() == pytest.approx(expected, abs=4 * math.sqrt(spread / len(z)))
    lagged = [(z[:-lag] * z[lag:]).mean().item() for lag in (1, 2, 3, 4)]
    assert max(map(abs, lagged)) < 4 / math.sqrt(len(z))


def test_noise_depends_on_its_keys_alone() -> None:
    z = normal_noise(DRAW, 0, 10, torch.float64)
    alone = DRAW._replace(sample=DRAW.sample[:1, 2:], seed=DRAW.seed[:1])
    torch.testing.assert_close(normal_noise(alone, 0, 10, torch.float64)[0, 0], z[0, 2])
    torch.testing.assert_close(normal_noise(DRAW, 0, 6, torch.float64)[..., :2], z[..., :2])
    others = [
        normal_noise(DRAW, 1, 10, torch.float64),
        normal_noise(DRAW._replace(epoch=torch.tensor(6)), 0, 10, z.dtype),
    ]
    for other in [*others, z[:1].expand(2, -1, -1) + 0 * z]:
        assert not torch.allclose(other[1], z[1])
    assert normal_noise(DRAW, 0, 10, torch.bfloat16).dtype == torch.bfloat16


def test_numbers_are_those_of_box_and_muller() -> None:
    words = philox(
        (torch.tensor(1), torch.tensor(9), torch.tensor(5), torch.tensor(NOISE_STREAMS + 2)),
        (torch.tensor(3), torch.tensor(0)),
    )
    assert int(words.max()) <= WORD
    u = [float(x) for x in uniform(words)]
    radii = [math.sqrt(-2 * math.log(1 - x)) for x in u[:2]]
    expected = [r * math.cos(2 * math.pi * a) for r, a in zip(radii, u[2:], strict=True)]
    expected += [r * math.sin(2 * math.pi * a) for r, a in zip(radii, u[2:], strict=True)]
    torch.testing.assert_close(
        normal_noise(DRAW, 2, 8, torch.float64)[0, 2, 4:], torch.tensor(expected).double(), rtol=1e-5, atol=1e-6
    )
