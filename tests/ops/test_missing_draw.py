"""The training draw: what it keeps, how often, and that it depends on (seed, epoch, sample, version) alone."""

from collections import Counter

import pytest
import torch

from fastmmkd.ops import missing_draw
from fastmmkd.ops.layout import Layout
from fastmmkd.testing.draws import Split, split

SAMPLES, LONGEST = 300, (8, 8, 8)


def resident(present: torch.Tensor | None = None) -> Split:
    return split(torch.ones(SAMPLES, 3, dtype=torch.bool) if present is None else present, LONGEST, (2, 2, 2), real=1.0)


def draw(rows, seed=1, epoch=0, versions=2, p_max=0.7, exact=False, data=None):
    data = data or resident()
    sample = torch.as_tensor(rows).view(1, -1)
    layouts = data.layouts(sample, versions)
    keys = sample, torch.tensor([seed]), torch.tensor(epoch)
    return *missing_draw(*data, *keys, layouts, versions, p_max, exact), layouts


def by_row(drawn, rows, versions=2):
    """(sample, version) -> the masks of the three modalities."""
    _, masks, layouts = drawn
    return {
        (row, v): tuple(
            tuple(mask[0, of.starts[0, at] : of.starts[0, at + 1]].tolist())
            for at in (v * len(rows) + i,)
            for mask, of in zip(masks, layouts, strict=True)
        )
        for i, row in enumerate(rows)
        for v in range(versions)
    }


def shown(drawn):
    """`[V * B, 3]`: whether the last frame is there."""
    _, masks, layouts = drawn
    return torch.stack([mask[0, of.last[0]] for mask, of in zip(masks, layouts, strict=True)], -1)


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
    data = resident()
    sample = torch.tensor([[3, 1, 4], [1, 5, 9]])
    layouts = data.layouts(sample, 2)
    together = missing_draw(*data, sample, torch.tensor([7, 8]), torch.tensor(2), layouts, 2, 0.7)
    for s, seed in enumerate((7, 8)):
        alone = draw(sample[s].tolist(), seed=seed, epoch=2)
        for m in range(3):
            rows = alone[2][m].rows
            assert torch.equal(together[0][m][s, :rows], alone[0][m][0])
            assert torch.equal(together[1][m][s, :rows], alone[1][m][0])
            assert not together[1][m][s, rows:].any()
            assert (together[0][m][s, rows:] == 0).all()


def test_features_are_zero_exactly_where_masked() -> None:
    features, masks, _ = draw(list(range(SAMPLES)))
    for x, mask in zip(features, masks, strict=True):
        assert torch.equal((x != 0).all(-1), mask)
        assert torch.equal((x != 0).any(-1), mask)


def test_a_samples_frames_are_the_last_of_its_rows() -> None:
    """More room: zeros come first; less: the first frames are cut, and the others drop as before."""
    data, sample = resident(), torch.arange(20)[None]
    keys = sample, torch.tensor([1]), torch.tensor(0)
    features, masks, layouts = draw(sample[0].tolist())
    for lengths in ([of.lengths + 3 for of in layouts], [(of.lengths - 2).clamp_min(1) for of in layouts]):
        others = [Layout.of(n, int(n.sum()) + 4, int(n.max())) for n in lengths]
        other_features, other_masks = missing_draw(*data, *keys, others, 2, 0.7)
        for m, (of, other) in enumerate(zip(layouts, others, strict=True)):
            for b in range(of.batch):
                end, other_end = of.starts[0, b + 1], other.starts[0, b + 1]
                n = min(of.lengths[0, b], other.lengths[0, b])
                assert torch.equal(other_features[m][0, other_end - n : other_end], features[m][0, end - n : end])
                assert torch.equal(other_masks[m][0, other_end - n : other_end], masks[m][0, end - n : end])
                assert not other_masks[m][0, other.starts[0, b] : other_end - n].any()
            assert torch.equal((other_features[m] != 0).any(-1), other_masks[m])


def test_says_which_layout_is_wrong() -> None:
    data, sample = resident(), torch.arange(4)[None]
    keys = sample, torch.tensor([1]), torch.tensor(0)
    layouts = [*data.layouts(sample, 2)[:2], *data.layouts(sample, 1)[2:]]
    with pytest.raises(ValueError, match=r"starts of modality 2 are \(1, 5\); expected \(1, 9\)"):
        missing_draw(*data, *keys, layouts, 2, 0.7)


def test_subsets_are_uniform_over_the_seven() -> None:
    rows = list(range(SAMPLES))
    counts: Counter[tuple[bool, ...]] = Counter()
    for epoch in range(10):
        # With p = 0 a kept modality shows at least its last frame.
        counts.update(tuple(row) for row in shown(draw(rows, epoch=epoch, p_max=0.0)).tolist())
    assert len(counts) == 7
    assert (False, False, False) not in counts
    expected = 10 * 2 * SAMPLES / 7
    chi2 = sum((n - expected) ** 2 / expected for n in counts.values())
    assert chi2 < 22.5  # 0.999 quantile with 6 degrees of freedom


def test_only_modalities_that_a_sample_has_are_kept() -> None:
    present = torch.zeros(SAMPLES, 3, dtype=torch.bool)
    present[:, 2] = True
    present[::2, 1] = True
    drawn = draw(list(range(SAMPLES)), p_max=0.0, data=resident(present))
    assert not drawn[1][0].any()
    shows = shown(drawn).view(2, SAMPLES, 3)
    assert shows[:, 1::2, 2].all()  # the only one there always stays
    both = Counter(tuple(row) for row in shows[:, ::2].reshape(-1, 3).tolist())
    assert set(both) == {(False, True, False), (False, False, True), (False, True, True)}


@pytest.mark.parametrize("exact", [False, True])
def test_mean_ratio_of_dropped_frames(exact) -> None:
    full = [torch.ones(SAMPLES * 8, dtype=torch.bool)] * 3
    data = Split([x.float().unsqueeze(-1) for x in full], full, [torch.arange(SAMPLES + 1) * 8] * 3, resident().present)
    dropped = kept = 0.0
    for epoch in range(5):
        _, drawn, _ = draw(list(range(SAMPLES)), epoch=epoch, p_max=0.7, exact=exact, data=data)
        for mask in drawn:
            frames = mask.view(-1, 8)
            frames = frames[frames.any(-1)]
            dropped += (~frames).sum().item()
            kept += frames.sum().item()
    # U(0, 0.7) has mean 0.35; rows that lose all frames are left out, which lowers it a little.
    assert dropped / (dropped + kept) == pytest.approx(0.345, abs=0.012)


def test_p_one_drops_every_frame_and_exact_counts_are_exact() -> None:
    from fastmmkd.ops.missing_draw import dropped_frames

    layout = Layout.of(torch.tensor([[10, 10, 10, 10]]), 41, 10)
    mask, frame = layout.is_somebodys.clone(), layout.position
    mask[0, 10:17] = False
    zero = torch.zeros(1, 1, dtype=torch.int64)
    keys = layout.sample, zero, zero, zero
    for p, expected in ((0.0, [0, 0, 0, 0]), (0.5, [5, 2, 5, 5]), (1.0, [10, 3, 10, 10])):
        dropped = dropped_frames(mask, frame, torch.full((1, 41), p), 0, keys, layout, exact=True)
        assert dropped[0, :40].view(4, 10).sum(-1).tolist() == expected
        assert not (dropped & ~mask).any()
    everything = dropped_frames(mask, frame, torch.ones(1, 41), 0, keys, layout, exact=False)
    assert torch.equal(everything, mask)
