from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmkd.data import packing
from fastmmkd.data.importers.assemble import RawSplit, assemble
from fastmmkd.data.importers.padding import given_span, inside, occupied_span, side_counts, union_span
from fastmmkd.data.store import SPLITS
from fastmmkd.modalities import MODALITIES

STEPS = 6
SIDES = st.sampled_from(["left", "right"])
# One clip: length, side of the padding, and per modality which of its inner frames are zero.
CLIPS = st.lists(
    st.tuples(st.integers(1, STEPS), SIDES, st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=STEPS)),
    min_size=1,
    max_size=6,
)


def place(frames: np.ndarray, side: str, steps: int = STEPS) -> np.ndarray:
    out = np.zeros((steps, *frames.shape[1:]), np.float32)
    at = steps - len(frames) if side == "left" else 0
    out[at : at + len(frames)] = frames
    return out


@settings(deadline=None, max_examples=40)
@given(clips=CLIPS, seed=st.integers(0, 99))
def test_aligned_clips_end_up_left_padded_whatever_their_side(clips: list, seed: int) -> None:
    rng = np.random.default_rng(seed)
    arrays: dict[str, list[np.ndarray]] = {m: [] for m in MODALITIES}
    expected = []
    for length, side, missing in clips:
        zero = np.array(missing[:length])
        # At both ends of the clip at least one modality is there: that is what makes an end real.
        zero[[0, -1], rng.integers(3)] = False
        frames = {m: rng.uniform(1, 2, (length, 2)).astype(np.float32) for m in MODALITIES}
        for i, m in enumerate(MODALITIES):
            frames[m][zero[:, i]] = 0
            arrays[m].append(place(frames[m], side))
        expected.append((length, frames, zero))
    raw = {name: RawSplit({m: np.stack(arrays[m]) for m in MODALITIES}, labels=np.zeros(len(clips))) for name in SPLITS}
    split = assemble(raw, source="test", importer="mult").splits["train"]
    for i, (length, frames, zero) in enumerate(expected):
        for j, m in enumerate(MODALITIES):
            absent = zero[:, j].all()
            expected_rows = frames[m][: 0 if absent else length]
            np.testing.assert_array_equal(split.features[m][split.row_samples(m) == i], expected_rows)
            assert split.present[i, j] == (not absent)
            assert split.lengths[i, j] == (0 if absent else length)
            there = split.frame_mask(m)[split.row_samples(m) == i]
            np.testing.assert_array_equal(there, ~zero[: len(expected_rows), j])


@settings(deadline=None, max_examples=40)
@given(occupied=st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=8))
def test_occupied_span_is_first_to_last_true(occupied: list[list[bool]]) -> None:
    start, stop = occupied_span(np.array(occupied))
    for row, a, b in zip(occupied, start, stop, strict=True):
        if any(row):
            assert (a, b) == (row.index(True), 5 - row[::-1].index(True))
        else:
            assert (a, b) == (0, 0)


@settings(deadline=None, max_examples=40)
@given(length=st.integers(1, STEPS), real=st.integers(1, STEPS), side=SIDES)
def test_given_lengths_are_placed_where_only_zeros_stay_outside(length: int, real: int, side: str) -> None:
    real = min(real, length)  # the last frames of the length may be zero: missing, not padding
    row = place(np.ones(real, bool), side)[None].astype(bool)
    (start, stop), misfit = given_span(row, np.array([length]))
    assert not misfit.any()
    assert stop[0] - start[0] == length
    assert not row[0, : start[0]].any()
    assert not row[0, stop[0] :].any()


def test_lengths_that_contradict_the_data_lose() -> None:
    occupied = np.array([[True, True, True, False], [False, True, True, True], [True, False, False, False]])
    (start, stop), misfit = given_span(occupied, np.array([2, 9, -1]))
    assert misfit.tolist() == [True, True, True]
    assert list(zip(start.tolist(), stop.tolist(), strict=True)) == [(0, 3), (1, 4), (0, 1)]


def test_union_ignores_modalities_without_frames() -> None:
    a = np.array([2, 0, 0]), np.array([4, 0, 0])
    b = np.array([3, 1, 0]), np.array([5, 2, 0])
    start, stop = union_span([a, b])
    assert list(zip(start.tolist(), stop.tolist(), strict=True)) == [(2, 5), (1, 2), (0, 0)]


def test_sides_are_counted() -> None:
    span = np.array([0, 1, 0, 1, 0, 0]), np.array([4, 4, 3, 3, 0, 3])
    assert side_counts(span, 4) == {"left": 1, "right": 2, "both": 1, "none": 1, "empty": 1}


def test_frames_inside_a_span() -> None:
    span = np.array([1, 0, 0]), np.array([4, 5, 0])
    assert inside(span, 5).tolist() == [[False, True, True, True, False], [True] * 5, [False] * 5]


def test_large_splits_are_packed_block_by_block(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, STEPS + 1, 13)
    frames = [rng.uniform(1, 2, (n, 2)).astype(np.float32) for n in lengths]
    x = np.stack([place(clip, "right") for clip in frames])
    x[3, 0] = [np.nan, 1]
    frames[3][0] = [0, 1]
    for samples in (1, 4, 100):
        monkeypatch.setattr(packing, "BLOCK_BYTES", samples * STEPS * 2 * 8)
        raw = {name: RawSplit({"audio": x.astype(np.float64)}, labels=np.zeros(13)) for name in SPLITS}
        dataset = assemble(raw, source="test", importer="mult")
        np.testing.assert_array_equal(dataset.splits["test"].features["audio"], np.concatenate(frames))
        assert dataset.report["nonfinite"]["test"] == {"audio": {"nan": 1}}
        assert not raw["test"].features  # given back, so that it can be freed
