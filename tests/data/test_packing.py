"""Sequences without padding: how a split holds them, and how padded ones become so."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmkd.data import packing
from fastmmkd.data.dataset import Dataset, Split
from fastmmkd.errors import UserError
from fastmmkd.modalities import MODALITIES

LENGTHS = np.array([[2, 3, 1], [0, 1, 4], [3, 0, 0], [0, 0, 0], [1, 2, 2]], np.int32)


def split_of(lengths: np.ndarray, width: int = 2) -> Split:
    """Rows that count: of modality m, row r holds r + 1 and 100 m."""
    features = {
        m: np.stack(
            [np.arange(1, lengths[:, i].sum() + 1)] + [np.full(lengths[:, i].sum(), 100.0 * i)] * (width - 1), 1
        )
        for i, m in enumerate(MODALITIES)
    }
    features = {m: x.astype(np.float32) for m, x in features.items()}
    return Split(
        features, lengths, lengths > 0, np.zeros(len(lengths), np.float32), [f"{i}" for i in range(len(lengths))]
    )


def sequences(split: Split, modality: str) -> list[list[list[float]]]:
    """The rows of each sample."""
    return [split.features[modality][a:b].tolist() for a, b in pairwise(split.starts(modality))]


def test_where_a_samples_rows_are() -> None:
    split = split_of(LENGTHS)
    assert split.starts("language").tolist() == [0, 2, 2, 5, 5, 6]
    assert split.starts("language").dtype == np.int64
    assert split.row_samples("visual").tolist() == [0, 1, 1, 1, 1, 4, 4]
    assert split.longest == (3, 3, 4)


def test_a_row_of_zeros_is_a_missing_frame() -> None:
    split = split_of(LENGTHS)
    split.features["audio"][[1, 4]] = 0
    split.features["audio"][2] = [0, -1]
    assert split.frame_mask("audio").tolist() == [True, False, True, True, False, True]


LENGTH_LISTS = st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=8)


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTH_LISTS, extra=st.integers(0, 2), block=st.sampled_from([1, 100, 10_000]))
def test_padded_and_back(lengths: list[tuple[int, int, int]], extra: int, block: int) -> None:
    split = split_of(np.array(lengths, np.int32).reshape(-1, 3))
    dense = {m: split.padded(m, longest + extra) for m, longest in zip(MODALITIES, split.longest, strict=True)}
    for m, x in dense.items():
        for i, rows in enumerate(sequences(split, m)):
            assert x[i].tolist() == [[0.0, 0.0]] * (x.shape[1] - len(rows)) + rows
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "BLOCK_BYTES", block)
        back = Split.from_padded(dense, split.lengths, split.present, split.labels, split.ids)
    for m in MODALITIES:
        np.testing.assert_array_equal(back.features[m], split.features[m])
    np.testing.assert_array_equal(back.lengths, split.lengths)


@settings(deadline=None, max_examples=60)
@given(data=st.data(), lengths=LENGTH_LISTS.filter(len))
def test_taken_samples_are_whole(data: st.DataObject, lengths: list[tuple[int, int, int]]) -> None:
    split = split_of(np.array(lengths, np.int32))
    rows = np.array(data.draw(st.lists(st.integers(0, len(split) - 1), max_size=10)), np.int64)
    taken = split.take(rows)
    for m in MODALITIES:
        assert sequences(taken, m) == [sequences(split, m)[i] for i in rows]
    assert taken.ids == [split.ids[i] for i in rows]
    chosen = np.isin(np.arange(len(split)), rows)
    np.testing.assert_array_equal(split.take(chosen).features["audio"], split.take(np.unique(rows)).features["audio"])


def test_an_absent_modality_has_no_rows_whatever_its_length_says() -> None:
    present = np.array([[True, True, False], [True, False, True]])
    features = {m: np.where(present[:, i, None, None], np.ones((2, 3, 2)), 0) for i, m in enumerate(MODALITIES)}
    split = Split.from_padded(features, np.full((2, 3), 3), present, np.zeros(2), ["a", "b"])
    assert split.lengths.tolist() == [[3, 3, 0], [3, 0, 3]]
    assert [len(x) for x in split.features.values()] == [6, 3, 3]


def test_whether_modalities_are_word_aligned() -> None:
    aligned = split_of(np.array([[2, 2, 2], [0, 3, 3], [0, 0, 4], [0, 0, 0]], np.int32))
    apart = split_of(np.array([[2, 2, 2], [0, 3, 2]], np.int32))
    assert aligned.aligned
    assert not apart.aligned
    assert Dataset({"train": aligned, "valid": aligned}, "score", "by hand", "synthetic").aligned
    both = Dataset({"train": aligned, "valid": apart}, "score", "by hand", "synthetic")
    assert not both.aligned
    assert both.longest == (2, 3, 4)


def test_no_room_for_the_longest() -> None:
    with pytest.raises(ValueError, match="visual has samples of 4 frames, steps is 3"):
        split_of(LENGTHS).padded("visual", 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"audio": np.ones((5, 3))}, r"audio is \[5, 3\], expected \[5, T, d\]"),
        ({"audio": np.ones((4, 3, 2))}, r"audio is \[4, 3, 2\], expected \[5, T, d\]"),
        ({"audio": np.zeros((5, 2, 2))}, r"audio has 2 frames, but the length of sample 0 is 3"),
        ({"visual": np.ones((5, 4, 2))}, r"visual\[0, 0\] is not zero, but lies before the last 1 frames"),
        ({"visual": np.full((5, 4, 2), np.nan)}, r"visual\[0, 0\] is not zero.*expected left padding"),
    ],
)
def test_padded_arrays_that_do_not_fit(change: dict[str, np.ndarray], message: str) -> None:
    split = split_of(LENGTHS)
    dense = {m: split.padded(m) for m in MODALITIES} | change
    with pytest.raises(UserError, match=message):
        Split.from_padded(dense, split.lengths, split.present, split.labels, split.ids)


def test_a_stray_frame_is_refused_beyond_the_first_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BLOCK_BYTES", 2 * 4 * 2 * 8)
    split = split_of(LENGTHS)
    dense = {m: split.padded(m) for m in MODALITIES}
    dense["visual"][4] = 1
    with pytest.raises(UserError, match=r"visual\[4, 0\] is not zero, but lies before the last 2 frames"):
        Split.from_padded(dense, split.lengths, split.present, split.labels, split.ids)


@settings(deadline=None, max_examples=60)
@given(lengths=LENGTH_LISTS.filter(len), extra=st.integers(0, 3), sides=st.data())
def test_either_side_may_be_padded(lengths: list[tuple[int, int, int]], extra: int, sides: st.DataObject) -> None:
    """In each sample by itself."""
    split = split_of(np.array(lengths, np.int32))
    dense = {m: split.padded(m, longest + extra) for m, longest in zip(MODALITIES, split.longest, strict=True)}
    for i, m in enumerate(MODALITIES):
        for n, length in enumerate(split.lengths[:, i]):
            if sides.draw(st.booleans()):
                dense[m][n] = np.roll(dense[m][n], length, axis=0)
    back = Split.from_padded(dense, split.lengths, split.present, split.labels, split.ids)
    for m in MODALITIES:
        np.testing.assert_array_equal(back.features[m], split.features[m])


def test_zero_frames_at_an_end_are_read_as_in_the_other_samples() -> None:
    """`0 1 1 0` of three frames is `0 1 1` where the other sample is padded on the right, `1 1 0` where on the left."""
    right = np.array([[0, 1, 0, 0], [1, 1, 1, 0]], np.float32)[..., None]
    ambiguous = np.array([[0, 1, 1, 0], [1, 1, 1, 0]], np.float32)[..., None]
    lengths, present = np.array([[2, 0, 0], [3, 0, 0]]), np.array([[True, False, False]] * 2)
    none = {m: np.zeros((2, 4, 1), np.float32) for m in MODALITIES}

    def read(language: np.ndarray, lengths: np.ndarray) -> list[float]:
        of_arrays = Split.from_padded(none | {"language": language}, lengths, present, np.zeros(2), ["a", "b"])
        return of_arrays.features["language"][:, 0].tolist()

    assert read(right, lengths) == [0, 1, 1, 1, 1]
    assert read(ambiguous, np.array([[3, 0, 0], [3, 0, 0]])) == [0, 1, 1, 1, 1, 1]
    assert read(ambiguous[:, ::-1], np.array([[3, 0, 0], [3, 0, 0]])) == [1, 1, 0, 1, 1, 1]


@pytest.mark.parametrize(
    ("features", "lengths", "message"),
    [
        (("audio", "language"), (5, 3), "features are of audio, language, expected language, audio, visual"),
        (MODALITIES, (4, 3), r"lengths and present are \[4, 3\] and \[5, 3\] for 5 labels, expected \[5, 3\]"),
    ],
)
def test_arrays_of_other_numbers(features: tuple[str, ...], lengths: tuple[int, int], message: str) -> None:
    dense = {m: np.zeros((5, 2, 2), np.float32) for m in features}
    with pytest.raises(UserError, match=message):
        Split.from_padded(dense, np.zeros(lengths, np.int32), np.zeros((5, 3), bool), np.zeros(5), list("abcde"))
