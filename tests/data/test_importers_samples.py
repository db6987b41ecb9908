"""Files that are only to be predicted: fewer splits than a data set has, and labels or none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from fastmmkd.data import store
from fastmmkd.data.dataset import SPLITS
from fastmmkd.data.importers import import_dataset
from fastmmkd.data.importers.samples import load
from fastmmkd.data.training_file import read_data
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
    dataset = load(tmp_path / "new.npz")
    split = dataset.splits["samples"]
    assert_holds(split, clips)
    assert split.ids == ["a", "b", "c", "d"]
    assert split.labels.tolist() == [1, -1, 0, 3]
    assert dataset.label_kind == "score"


def test_one_sample_of_arrays(clips, tmp_path: Path) -> None:
    np.savez(tmp_path / "new.npz", language=clips[0]["language"], visual=clips[0]["visual"])
    dataset = load(tmp_path / "new.npz")
    split = dataset.splits["samples"]
    assert dataset.label_kind == ""
    assert split.present.tolist() == [[True, False, True]]
    np.testing.assert_array_equal(split.features["language"], clips[0]["language"])


def test_lengths_say_what_zeros_cannot(tmp_path: Path) -> None:
    language = np.zeros((2, 4, 3), np.float32)
    language[:, :2] = 1
    np.savez(tmp_path / "new.npz", language=language, language_lengths=np.array([3, 2]))
    assert load(tmp_path / "new.npz").splits["samples"].lengths[:, 0].tolist() == [3, 2]


def test_a_single_clip_of_mmsa(clips, tmp_path: Path) -> None:
    clip = {PICKLE_KEYS[m]: clips[0][m] for m in MODALITIES} | {"id": "0001", "raw_text": "fine"}
    split = load(dump(clip, tmp_path / "clip.pkl")).splits["samples"]
    assert split.ids == ["0001"]
    assert_holds(split, clips[:1])


def test_one_split_of_a_pickle(clips, tmp_path: Path) -> None:
    part = mmsa_split(clips, [0.5, -1, 2, 0], "test", STEPS)
    dataset = load(dump({"test": part}, tmp_path / "new.pkl"))
    assert list(dataset.splits) == ["test"]
    assert dataset.splits["test"].ids == [f"test$_${i}" for i in range(4)]
    assert dataset.splits["test"].labels.tolist() == [0.5, -1, 2, 0]
    del part["regression_labels"]
    assert load(dump({"test": part}, tmp_path / "new.pkl")).label_kind == ""


def test_mmsa_files_are_read_as_their_importer_reads_them(tmp_path: Path) -> None:
    """Token masks and lengths count: BERT fills padding, and zeros may be frames."""
    rng, content = np.random.default_rng(1), {}
    for name in SPLITS:
        part = mmsa_split(random_clips(rng, 4, longest=8), [0.5, -1, 2, 0], name, dict.fromkeys(MODALITIES, 10))
        part["audio_lengths"] = part["vision_lengths"] = (part["audio"] != 0).any(-1).sum(1) + 1
        content[name] = part
    path = dump(content, tmp_path / "mmsa.pkl")
    theirs, ours = import_dataset("mmsa", path), load(path)
    for name in SPLITS:
        expected, split = theirs.splits[name], ours.splits[name]
        np.testing.assert_array_equal(split.lengths, expected.lengths)
        for modality in MODALITIES:
            np.testing.assert_array_equal(split.features[modality], expected.features[modality])
    assert (ours.splits["test"].lengths[:, 0] < 10).all()


def test_padding_of_a_single_clip_is_no_frame(clips, tmp_path: Path) -> None:
    part = mmsa_split(clips[:1], [0.5], "test", dict.fromkeys(MODALITIES, 9))
    clip = {key: part[key][0] for key in ("text", "audio", "vision", "text_bert", "id")}
    assert_holds(load(dump(clip, tmp_path / "clip.pkl")).splits["samples"], clips[:1])


def test_emotions_of_a_pickle_are_no_scores(clips, tmp_path: Path) -> None:
    labels = np.zeros((4, 4, 2))
    dataset = load(dump({"valid": mult_split(clips, labels, STEPS)}, tmp_path / "new.pkl"))
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
    dataset = load(tmp_path)
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
        load(tmp_path / "new.npz")
    assert str(raised.value).startswith(str(tmp_path / "new.npz"))


@pytest.mark.parametrize("labelled", [True, False])
def test_a_store_of_them(labelled, clips, tmp_path: Path) -> None:
    labels = {"labels": np.array([1.0, -1, 0, 3])} if labelled else {}
    np.savez(tmp_path / "new.npz", **{m: padded(clips, m, 6, "left") for m in MODALITIES}, **labels)
    dataset = import_dataset("samples", tmp_path / "new.npz")
    written = store.write_samples(dataset, tmp_path / "new.h5")
    again = load(tmp_path / "new.h5")
    assert list(again.splits) == ["samples"]
    assert_holds(again.splits["samples"], clips)
    assert again.splits["samples"].labels.tolist() == ([1, -1, 0, 3] if labelled else [0, 0, 0, 0])
    assert (again.label_kind, again.content_hash) == ("score" if labelled else "", written.content_hash)
    with h5py.File(tmp_path / "new.h5") as file:
        assert ("labels" in file["samples"]) == labelled
    for refuses in (store.read, store.read_header, read_data):
        with pytest.raises(UserError, match=r"new.h5: data set has the splits samples, expected train, valid, test; "):
            refuses(tmp_path / "new.h5")


def test_a_store_of_three_splits_without_labels_is_not_trained_on(clips, tmp_path: Path) -> None:
    parts = {name: mmsa_split(clips, [0, 0, 0, 0], name, STEPS) for name in SPLITS}
    for part in parts.values():
        del part["regression_labels"]
    store.write_samples(load(dump(parts, tmp_path / "new.pkl")), tmp_path / "new.h5")
    assert list(load(tmp_path / "new.h5").splits) == list(SPLITS)
    with pytest.raises(UserError, match="data set has no labels, expected one of score, sims, emotions; as it is, "):
        store.read(tmp_path / "new.h5")


def test_a_damaged_store_of_them(clips, tmp_path: Path) -> None:
    np.savez(tmp_path / "new.npz", **{m: padded(clips, m, 6, "left") for m in MODALITIES})
    store.write_samples(load(tmp_path / "new.npz"), tmp_path / "new.h5")
    with h5py.File(tmp_path / "new.h5", "r+") as file:
        file["samples/features/audio"][0, 0] += 1
    with pytest.raises(UserError, match="samples/features/audio does not match its stored hash"):
        load(tmp_path / "new.h5")


def test_samples_are_not_divided(clips, tmp_path: Path) -> None:
    np.savez(tmp_path / "new.npz", **{m: padded(clips, m, 6, "left") for m in MODALITIES})
    with pytest.raises(UserError, match=r"new.npz: samples are only to be predicted, expected no --resplit$"):
        import_dataset("samples", tmp_path / "new.npz", resplit=1)
    with pytest.raises(UserError, match=r"new.npz: it has no labels, expected no --labels sims$"):
        import_dataset("samples", tmp_path / "new.npz", labels="sims")


def test_names_of_splits(clips, tmp_path: Path) -> None:
    np.savez(tmp_path / "new.npz", **{m: padded(clips, m, 6, "left") for m in MODALITIES})
    dataset = load(tmp_path / "new.npz")
    for name in ("meta", "a/b", ""):
        with pytest.raises(UserError, match="expected names of letters, digits"):
            store.write_samples(replace(dataset, splits={name: dataset.splits["samples"]}), tmp_path / "new.h5")


def test_what_is_no_such_file(tmp_path: Path) -> None:
    expected = r"a store \(.h5\), .npz, .pkl or a folder of .csd files$"
    with pytest.raises(UserError, match=f"new.npz: no such file, expected {expected}"):
        load(tmp_path / "new.npz")
    (tmp_path / "new.txt").write_text("x")
    with pytest.raises(UserError, match=f"cannot be told apart, expected {expected}"):
        load(tmp_path / "new.txt")
    (tmp_path / "new.npz").write_bytes(b"PK\x03\x04 not really")
    with pytest.raises(UserError, match=r"not a .npz file of plain arrays"):
        load(tmp_path / "new.npz")
    np.savez(tmp_path / "new.npz", language=np.array([{"a": 1}], dtype=object))
    with pytest.raises(UserError, match=r"not a .npz file of plain arrays"):
        load(tmp_path / "new.npz")
