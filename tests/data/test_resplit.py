from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmkd.data.importers.resplit import _allocate, resplit
from fastmmkd.data.integrity import array_hashes
from fastmmkd.data.store import SPLITS, Dataset
from fastmmkd.modalities import MODALITIES

Make = Callable[..., Dataset]


def rows(dataset: Dataset) -> dict[str, tuple]:
    """Sample id -> everything that is known about it."""
    return {
        sample: (
            *(split.features[m][split.row_samples(m) == i].tobytes() for m in MODALITIES),
            split.lengths[i].tolist(),
            split.present[i].tolist(),
            split.labels[i].tolist(),
        )
        for split in dataset.splits.values()
        for i, sample in enumerate(split.ids)
    }


@pytest.mark.parametrize("kind", ["score", "emotions"])
def test_samples_stay_whole_and_sizes_the_same(make_dataset: Make, kind: str) -> None:
    before = make_dataset(kind=kind)
    after = resplit(before, 3)
    assert rows(after) == rows(before)
    assert {name: len(split) for name, split in after.splits.items()} == {"train": 12, "valid": 6, "test": 5}
    assert after.splits["train"].ids != before.splits["train"].ids


def test_a_function_of_the_seed(make_dataset: Make) -> None:
    once, again, other = (resplit(make_dataset(), seed) for seed in (1, 1, 2))
    assert array_hashes(once) == array_hashes(again)
    assert array_hashes(once) != array_hashes(other)


def test_seed_and_origin_are_recorded(make_dataset: Make) -> None:
    before = make_dataset()
    after = resplit(before, 5)
    assert after.source == "random numbers, re-split with seed 5"
    assert after.report["resplit"] == {
        "seed": 5,
        "by": "sample",
        "sizes": [12, 6, 5],
        "videos_in_several_splits": 0,
    }
    assert after.report["notes"] == ["a note"]
    assert "resplit" not in before.report


@settings(deadline=None, max_examples=40)
@given(
    strata=st.lists(st.integers(0, 4), min_size=3, max_size=80),
    cuts=st.tuples(st.floats(0.1, 0.8), st.floats(0.1, 0.9)),
    seed=st.integers(0, 9),
)
def test_strata_are_shared_out_in_proportion(strata: list[int], cuts: tuple[float, float], seed: int) -> None:
    total = len(strata)
    train = max(1, int(cuts[0] * total))
    valid = int(cuts[1] * (total - train))
    sizes = np.array([train, valid, total - train - valid])
    kinds = np.array(strata)
    target = _allocate(kinds, sizes, np.random.default_rng(seed))
    assert np.bincount(target, minlength=3).tolist() == sizes.tolist()
    for kind in np.unique(kinds):
        got = np.bincount(target[kinds == kind], minlength=3)
        assert (np.abs(got - (kinds == kind).sum() * sizes / total) < 2).all()


def test_strata_are_sign_and_modalities(make_dataset: Make) -> None:
    """120 samples, 40 each negative, zero, positive; half of each without language: every split gets its share."""
    dataset = make_dataset()
    labels, language = np.repeat([-1.0, 0, 2], 40), np.tile([True, False], 60)
    at = 0
    for name, n in zip(SPLITS, (60, 24, 36), strict=True):
        split, part = dataset.splits[name], slice(at, at + n)
        split.labels, split.ids = labels[part].astype(np.float32), [f"{i}" for i in range(at, at + n)]
        split.present = np.stack([language[part], np.ones(n, bool), np.ones(n, bool)], axis=1)
        split.lengths = split.present.astype(np.int32)
        split.features = {m: np.zeros((split.present[:, i].sum(), 1), np.float32) for i, m in enumerate(MODALITIES)}
        at += n
    for name, split in resplit(dataset, 0).splits.items():
        share = len(split) / 6
        for sign in (-1, 0, 1):
            for has in (True, False):
                count = ((np.sign(split.labels) == sign) & (split.present[:, 0] == has)).sum()
                assert abs(count - share) < 2, (name, sign, has)


def test_videos_that_are_torn_apart_are_counted(make_dataset: Make) -> None:
    dataset = make_dataset()
    for name, split in dataset.splits.items():
        split.ids = [f"{name}$_${i}" for i in range(len(split))]
    again = resplit(dataset, 0)
    groups = [{sample.split("$_$")[0] for sample in split.ids} for split in again.splits.values()]
    expected = sum(sum(name in group for group in groups) > 1 for name in SPLITS)
    assert again.report["resplit"]["videos_in_several_splits"] == expected > 0


def test_the_ideal_posterior_moves_along(make_dataset: Make) -> None:
    dataset = make_dataset()
    for split in dataset.splits.values():
        split.ideal = {"lav": np.stack([split.labels, 1 - split.labels], axis=1)}
    for split in resplit(dataset, 1).splits.values():
        np.testing.assert_array_equal(split.ideal["lav"][:, 0], split.labels)
