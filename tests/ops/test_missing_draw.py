"""The training draw: what it keeps, how often, and that it depends on (seed, epoch, sample, version) alone."""

from collections import Counter

import pytest
import torch

from fastmmkd.ops import missing_draw

SAMPLES, STEPS = 300, (8, 8, 8)


def resident(present: torch.Tensor | None = None):
    generator = torch.Generator().manual_seed(0)
    present = torch.ones(SAMPLES, 3, dtype=torch.bool) if present is None else present
    features, masks = [], []
    for m, t in enumerate(STEPS):
        mask = (torch.arange(t) >= torch.randint(0, t, (SAMPLES, 1), generator=generator)) & present[:, m, None]
        features.append((1.0 + torch.rand(SAMPLES, t, 2, generator=generator)) * mask.unsqueeze(-1))
        masks.append(mask)
    return features, masks, present


def draw(rows, seed=1, epoch=0, versions=2, p_max=0.7, exact=False, data=None):
    features, masks, present = data or resident()
    sample = torch.as_tensor(rows).view(1, -1)
    return missing_draw(
        features, masks, present, sample, torch.tensor([seed]), torch.tensor(epoch), versions, p_max, exact
    )


def by_row(drawn, rows, versions=2):
    """(sample, version) -> the masks of the three modalities."""
    _, masks = drawn
    return {
        (row, v): tuple(tuple(m[0, v * len(rows) + i].tolist()) for m in masks)
        for i, row in enumerate(rows)
        for v in range(versions)
    }


def test_does_not_depend_on_order_or_batch_size_or_rank() -> None:
    rows = list(range(40))
    whole = by_row(draw(rows), rows)
    shuffled = rows[::-1]
    assert by_row(draw(shuffled), shuffled) == whole
    parts = {}
    for start in range(0, 40, 8):  # five ranks, or five smaller batches
        part = rows[start : start + 8]
        parts |= by_row(draw(part), part)
    assert parts == whole


def test_seeds_epochs_and_versions_differ() -> None:
    rows = list(range(60))
    base = by_row(draw(rows), rows)
    assert by_row(draw(rows, seed=2), rows) != base
    assert by_row(draw(rows, epoch=1), rows) != base
    assert by_row(draw(rows, seed=1 + 2**32), rows) != base
    assert any(base[row, 0] != base[row, 1] for row in rows)


def test_several_seeds_at_once_equal_each_alone() -> None:
    features, masks, present = resident()
    sample = torch.tensor([[3, 1, 4], [1, 5, 9]])
    together = missing_draw(features, masks, present, sample, torch.tensor([7, 8]), torch.tensor(2), 2, 0.7)
    for s, seed in enumerate((7, 8)):
        alone = draw(sample[s].tolist(), seed=seed, epoch=2)
        for m in range(3):
            assert torch.equal(together[0][m][s], alone[0][m][0])
            assert torch.equal(together[1][m][s], alone[1][m][0])


def test_features_are_zero_exactly_where_masked() -> None:
    features, masks = draw(list(range(SAMPLES)))
    for x, mask in zip(features, masks, strict=True):
        assert torch.equal((x != 0).all(-1), mask)
        assert torch.equal((x != 0).any(-1), mask)


def test_subsets_are_uniform_over_the_seven() -> None:
    rows = list(range(SAMPLES))
    counts: Counter[tuple[bool, ...]] = Counter()
    for epoch in range(10):
        _, masks = draw(rows, epoch=epoch, p_max=0.0)
        # With p = 0 a kept modality shows at least its last frame.
        kept = torch.stack([mask[0, :, -1] for mask in masks], -1)
        counts.update(tuple(row) for row in kept.tolist())
    assert len(counts) == 7
    assert (False, False, False) not in counts
    expected = 10 * 2 * SAMPLES / 7
    chi2 = sum((n - expected) ** 2 / expected for n in counts.values())
    assert chi2 < 22.5  # 0.999 quantile with 6 degrees of freedom


def test_only_modalities_that_a_sample_has_are_kept() -> None:
    present = torch.zeros(SAMPLES, 3, dtype=torch.bool)
    present[:, 2] = True
    present[::2, 1] = True
    _, masks = draw(list(range(SAMPLES)), p_max=0.0, data=resident(present))
    assert not masks[0].any()
    shows = torch.stack([mask[0, :, -1] for mask in masks], -1).view(2, SAMPLES, 3)
    assert shows[:, 1::2, 2].all()  # the only one there always stays
    both = Counter(tuple(row) for row in shows[:, ::2].reshape(-1, 3).tolist())
    assert set(both) == {(False, True, False), (False, False, True), (False, True, True)}


@pytest.mark.parametrize("exact", [False, True])
def test_mean_ratio_of_dropped_frames(exact) -> None:
    features, _, present = resident()
    full = torch.ones(SAMPLES, 8, dtype=torch.bool)
    data = (features, [full] * 3, present)
    dropped = kept = 0.0
    for epoch in range(5):
        _, drawn = draw(list(range(SAMPLES)), epoch=epoch, p_max=0.7, exact=exact, data=data)
        for mask in drawn:
            shown = mask[0][mask[0].any(-1)]
            dropped += (~shown).sum().item()
            kept += shown.sum().item()
    # U(0, 0.7) has mean 0.35; rows that lose all frames are left out, which lowers it a little.
    assert dropped / (dropped + kept) == pytest.approx(0.345, abs=0.012)


def test_p_one_drops_every_frame_and_exact_counts_are_exact() -> None:
    from fastmmkd.ops.reference import dropped_frames

    mask = torch.ones(1, 4, 10, dtype=torch.bool)
    mask[0, 1, :7] = False
    sample, zero = torch.arange(4)[None], torch.zeros(1, 1, dtype=torch.int64)
    for p, expected in ((0.0, [0, 0, 0, 0]), (0.5, [5, 2, 5, 5]), (1.0, [10, 3, 10, 10])):
        ratio = torch.full((1, 4), p)
        found = dropped_frames(mask, ratio, 0, sample, zero, zero, zero, exact=True)
        assert found.sum(-1)[0].tolist() == expected
        assert not (found & ~mask).any()
    everything = dropped_frames(mask, torch.ones(1, 4), 0, sample, zero, zero, zero, exact=False)
    assert torch.equal(everything, mask)
