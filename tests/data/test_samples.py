"""Files that are only to be predicted: fewer splits than a data set has, and labels or none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from fastmmkd.data.samples import read_samples
from fastmmkd.errors import UserError
from fastmmkd.modalities import MODALITIES
from tests.data.layouts import PICKLE_KEYS, dump, mmsa_split, mult_split, padded, random_clips, write_csd

STEPS = dict.fromkeys(MODALITIES, 5)


@pytest.fixture
def clips() -> list[dict[str, np.ndarray]]:
    return random_clips(np.random.default_rng(0), 4)


def assert_holds(split, clips) -> None:
    for modality in MODALITIES:
        np.testing.assert_array_equal(split.features[modality], np.concatenate([clip[modality] for clip in clips]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_arrays(side, clips, tmp_path: Path) -> None:
    arrays = {m: padded(clips, m, 5 + i, side) for i, m in enumerate(MODALITIES)}
    np.savez(tmp_path / "new.npz", **arrays, ids=np.array(["a", "b", "c", "d"]), labels=np.array([1.0, -1, 0, 3]))
    dataset = read_samples(tmp_path / "new.npz")
    split = dataset.splits["samples"]
    assert_holds(split, clips)
    assert split.ids == ["a", "b", "c", "d"]
    assert split.labels.tolist() == [1, -1, 0, 3]
    assert dataset.label_kind == "score"


def test_one_sample_of_arrays(clips, tmp_path: Path) -> None:
    np.savez(tmp_path / "new.npz", language=clips[0]["language"], visual=clips[0]["visual"])
    dataset = read_samples(tmp_path / "new.npz")
    split = dataset.splits["samples"]
    assert dataset.label_kind == ""
    assert split.present.tolist() == [[True, False, True]]
    np.testing.assert_array_equal(split.features["language"], clips[0]["language"])


def test_lengths_say_what_zeros_cannot(tmp_path: Path) -> None:
    language = np.zeros((2, 4, 3), np.float32)
    language[:, :2] = 1
    np.savez(tmp_path / "new.npz", language=language, language_lengths=np.array([3, 2]))
    assert read_samples(tmp_path / "new.npz").splits["samples"].lengths[:, 0].tolist() == [3, 2]


def test_a_single_clip_of_mmsa(clips, tmp_path: Path) -> None:
    clip = {PICKLE_KEYS[m]: clips[0][m] for m in MODALITIES} | {"id": "0001", "raw_text": "fine"}
    split = read_samples(dump(clip, tmp_path / "clip.pkl")).splits["samples"]
    assert split.ids == ["0001"]
    assert_holds(split, clips[:1])


def test_one_split_of_a_pickle(clips, tmp_path: Path) -> None:
    part = mmsa_split(clips, [0.5, -1, 2, 0], "test", STEPS)
    dataset = read_samples(dump({"test": part}, tmp_path / "new.pkl"))
    assert list(dataset.splits) == ["test"]
    assert dataset.splits["test"].ids == [f"test$_${i}" for i in range(4)]
    assert dataset.splits["test"].labels.tolist() == [0.5, -1, 2, 0]
    del part["regression_labels"]
    assert read_samples(dump({"test": part}, tmp_path / "new.pkl")).label_kind == ""


def test_emotions_of_a_pickle_are_no_scores(clips, tmp_path: Path) -> None:
    labels = np.zeros((4, 4, 2))
    dataset = read_samples(dump({"valid": mult_split(clips, labels, STEPS)}, tmp_path / "new.pkl"))
    assert dataset.label_kind == ""
    assert_holds(dataset.splits["valid"], clips)


@pytest.mark.parametrize("labelled", [True, False])
def test_computational_sequences(labelled, tmp_path: Path) -> None:
    rng, times = np.random.default_rng(0), np.array([[0.0, 0.4], [0.4, 1.0], [1.0, 1.5]])
    x = {root: rng.normal(size=(3, width)) for root, width in (("glove_vectors", 6), ("COVAREP", 4), ("FACET", 3))}
    for root, rows in x.items():
        write_csd(tmp_path / f"{root}.csd", root, {"video1": (rows, times), "video2": (rows, times)})
    if labelled:
        label = (np.array([[2.0]]), np.array([[0.4, 1.5]]))
        write_csd(tmp_path / "labels.csd", "Opinion Segment Labels", {"video1": label})
    dataset = read_samples(tmp_path)
    split = dataset.splits["samples"]
    if labelled:
        assert (split.ids, split.labels.tolist(), dataset.label_kind) == (["video1[0]"], [2.0], "score")
        np.testing.assert_allclose(split.features["language"], x["glove_vectors"][1:], rtol=1e-6)
    else:
        assert (split.ids, dataset.label_kind) == (["video1", "video2"], "")
        assert split.lengths.tolist() == [[3, 3, 3]] * 2


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"text": np.ones((1, 2, 3))}, "has text, expected some of audio, audio_lengths, ids, labels"),
        ({"ids": np.array(["a"])}, "has no features, expected some of language, audio, visual, text, vision"),
        ({"language": np.ones((2, 2, 3)), "labels": np.ones(3)}, "language has 2 samples, its labels 3"),
        ({"language": np.ones((1, 2, 3)), "language_lengths": np.array([-1])}, "language_lengths is not 1 numbers"),
        ({"language": np.zeros((1, 2, 3))}, "no sample has a frame of any modality"),
    ],
)
def test_arrays_that_cannot_be_read(arrays, said, tmp_path: Path) -> None:
    np.savez(tmp_path / "new.npz", **arrays)
    with pytest.raises(UserError, match=said) as raised:
        read_samples(tmp_path / "new.npz")
    assert str(raised.value).startswith(str(tmp_path / "new.npz"))


def test_what_is_no_such_file(tmp_path: Path) -> None:
    expected = r"a store \(.h5\), .npz, .pkl or a folder of .csd files$"
    with pytest.raises(UserError, match=f"new.npz: no such file, expected {expected}"):
        read_samples(tmp_path / "new.npz")
    (tmp_path / "new.txt").write_text("x")
    with pytest.raises(UserError, match=f"cannot be told apart, expected {expected}"):
        read_samples(tmp_path / "new.txt")
    (tmp_path / "new.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(UserError, match=r"not a .npz file of plain arrays"):
        read_samples(tmp_path / "new.npz")
    np.savez(tmp_path / "new.npz", language=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match=r"not a .npz file of plain arrays"):
        read_samples(tmp_path / "new.npz")
