from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from layouts import WIDTHS, dump, mmsa_split, nonzero, padded, random_clips

from fastmmkd.data import store
from fastmmkd.data.importers import import_dataset
from fastmmkd.errors import UserError
from fastmmkd.modalities import MODALITIES

ALIGNED = {"language": 5, "audio": 5, "visual": 5}
UNALIGNED = {"language": 5, "audio": 9, "visual": 11}
LABELS = {"train": [-3, -0.4, 0, 2.2], "valid": [1, 3], "test": [0.6, -1.8, 2]}


def aligned(change: Callable[[dict], None] | None = None) -> tuple[dict, dict]:
    """(content of the file, the clips it was made from)."""
    rng = np.random.default_rng(0)
    clips = {name: random_clips(rng, len(labels)) for name, labels in LABELS.items()}
    content = {name: mmsa_split(clips[name], LABELS[name], name, ALIGNED) for name in store.SPLITS}
    if change:
        change(content)
    return content, clips


def unaligned() -> tuple[dict, dict]:
    rng = np.random.default_rng(1)
    clips, content = {}, {}
    for name, labels in LABELS.items():
        lengths = {"language": rng.integers(2, 6, len(labels))}
        lengths |= {m: rng.integers(3, UNALIGNED[m] + 1, len(labels)) for m in ("audio", "visual")}
        clips[name] = [{m: nonzero(rng, lengths[m][i], WIDTHS[m]) for m in MODALITIES} for i in range(len(labels))]
        clips[name][0]["audio"][[1, -1]] = 0  # zero frames inside and at the end of the given length
        content[name] = mmsa_split(clips[name], labels, name, UNALIGNED)
        content[name]["audio_lengths"] = lengths["audio"].tolist()
        content[name]["vision_lengths"] = lengths["visual"].tolist()
    return content, clips


def test_aligned_clips_become_left_padded(tmp_path: Path) -> None:
    content, clips = aligned()
    dataset = import_dataset("mmsa", dump(content, tmp_path / "aligned_50.pkl"))
    for name, split in dataset.splits.items():
        for i, m in enumerate(MODALITIES):
            np.testing.assert_array_equal(split.padded(m, 5), padded(clips[name], m, 5, "left", "float32"))
            assert split.lengths[:, i].tolist() == [len(clip[m]) for clip in clips[name]]
        assert split.present.all()
        np.testing.assert_array_equal(split.labels, np.float32(LABELS[name]))
        assert split.ids == [f"{name}$_${i}" for i in range(len(clips[name]))]
    assert dataset.report["aligned"]
    assert dataset.report["padding"]["train"]["shared"].keys() <= {"right", "none"}
    assert (dataset.importer, dataset.source, dataset.label_kind) == ("mmsa", "MMSA aligned_50.pkl", "score")
    store.write(dataset, tmp_path / "a.h5")


def test_the_token_mask_decides_where_language_is(tmp_path: Path) -> None:
    """BERT gives padding tokens a vector; those are zeroed, and a zero vector of a real token is kept as a frame."""

    def change(content: dict) -> None:
        train = content["train"]
        for key in ("text", "audio", "vision"):
            train[key][0] = 0
        train["text"][0] = 0.5
        train["text"][0, 2] = 0
        train["audio"][0, :2] = 1
        train["vision"][0, 1] = 1
        train["text_bert"][0, 1] = [1, 1, 1, 0, 0]

    dataset = import_dataset("mmsa", dump(aligned(change)[0], tmp_path / "a.pkl"))
    train = dataset.splits["train"]
    assert train.lengths[0].tolist() == [3, 3, 3]
    assert train.features["language"][:3, 0].tolist() == [0.5, 0.5, 0]
    assert train.features["audio"][:3, 0].tolist() == [1, 1, 0]
    assert train.frame_mask("visual")[:3].tolist() == [False, True, False]


def test_padding_tokens_are_no_frames_where_audio_goes_on(tmp_path: Path) -> None:
    def change(content: dict) -> None:
        train = content["train"]
        train["text"][0] = 0.5
        train["text_bert"][0, 1] = [1, 1, 0, 0, 0]
        train["audio"][0] = 1

    train = import_dataset("mmsa", dump(aligned(change)[0], tmp_path / "a.pkl")).splits["train"]
    assert train.lengths[0].tolist() == [5, 5, 5]
    assert train.features["language"][:5, 0].tolist() == [0.5, 0.5, 0, 0, 0]


def test_left_padded_mmsa_files_are_detected(tmp_path: Path) -> None:
    content, clips = aligned()
    for name, split in content.items():
        for key in ("text", "audio", "vision", "text_bert"):
            split[key] = np.flip(split[key], axis=2 if key == "text_bert" else 1)  # now padded on the left
        clips[name] = [{m: x[::-1] for m, x in clip.items()} for clip in clips[name]]
    dataset = import_dataset("mmsa", dump(content, tmp_path / "a.pkl"))
    for name, split in dataset.splits.items():
        for m in MODALITIES:
            np.testing.assert_array_equal(split.padded(m, 5), padded(clips[name], m, 5, "left", "float32"))


def test_unaligned_lengths_are_believed(tmp_path: Path) -> None:
    content, clips = unaligned()
    dataset = import_dataset("mmsa", dump(content, tmp_path / "unaligned_50.pkl"))
    for name, split in dataset.splits.items():
        for i, m in enumerate(MODALITIES):
            np.testing.assert_array_equal(
                split.padded(m, UNALIGNED[m]), padded(clips[name], m, UNALIGNED[m], "left", "float32")
            )
            assert split.lengths[:, i].tolist() == [len(clip[m]) for clip in clips[name]]
    train = dataset.splits["train"]
    length = train.lengths[0, 1]
    mask = train.frame_mask("audio")[:length]
    assert mask.tolist() == [t not in (1, length - 1) for t in range(length)]
    assert not dataset.report["aligned"]
    store.write(dataset, tmp_path / "a.h5")


def test_lengths_that_contradict_the_frames_are_counted(tmp_path: Path) -> None:
    content, _ = unaligned()
    content["valid"]["vision"][1, 4:8] = 1.0
    content["valid"]["vision"][1, 8:] = 0
    content["valid"]["vision_lengths"][1] = 2
    dataset = import_dataset("mmsa", dump(content, tmp_path / "a.pkl"))
    assert dataset.report["length_misfits"]["valid"] == {"visual": 1}
    assert dataset.splits["valid"].lengths[1, 2] == 8


def test_nan_and_infinities_become_zero_and_are_counted(tmp_path: Path) -> None:
    def change(content: dict) -> None:
        content["train"]["audio"][1, 0, :2] = -np.inf
        content["train"]["audio"][2, 1, 3] = np.inf
        content["test"]["vision"][0, 0] = np.nan

    dataset = import_dataset("mmsa", dump(aligned(change)[0], tmp_path / "a.pkl"))
    assert dataset.report["nonfinite"] == {"train": {"audio": {"inf": 3}}, "valid": {}, "test": {"visual": {"nan": 3}}}
    train, test = dataset.splits["train"], dataset.splits["test"]
    assert train.features["audio"][train.starts("audio")[1], :2].tolist() == [0, 0]
    # A frame that was all NaN is a missing frame, not padding: language is there.
    assert test.lengths[0, 2] == test.lengths[0, 0]
    assert not test.frame_mask("visual")[0]


def test_a_modality_that_a_sample_or_a_split_lacks_is_absent(tmp_path: Path) -> None:
    def change(content: dict) -> None:
        content["train"]["vision"][2] = 0
        content["valid"]["audio"][:] = 0
        del content["test"]["text"], content["test"]["text_bert"]

    dataset = import_dataset("mmsa", dump(aligned(change)[0], tmp_path / "a.pkl"))
    train, valid, test = dataset.splits.values()
    assert train.present.tolist() == [[True] * 3, [True] * 3, [True, True, False], [True] * 3]
    assert train.lengths[2, 2] == 0
    assert not valid.present[:, 1].any()
    assert not test.present[:, 0].any()
    assert test.features["language"].shape == (0, 6)
    assert dataset.report["absent"] == {"train": {"visual": 1}, "valid": {"audio": 2}, "test": {"language": 3}}
    assert dataset.report["notes"] == ["the source's test split has no language"]
    store.write(dataset, tmp_path / "a.h5")


def test_a_modality_that_exists_nowhere(tmp_path: Path) -> None:
    def change(content: dict) -> None:
        for split in content.values():
            del split["vision"]

    dataset = import_dataset("mmsa", dump(aligned(change)[0], tmp_path / "a.pkl"))
    assert dataset.splits["test"].features["visual"].shape == (0, 1)
    assert dataset.report["notes"] == ["the source has no visual at all"]
    store.write(dataset, tmp_path / "a.h5")


def test_repeated_ids_are_renamed_and_counted(tmp_path: Path) -> None:
    def change(content: dict) -> None:
        content["train"]["id"] = ["a", "b", "a", "a#2"]
        content["valid"]["id"] = ["b", "c"]

    dataset = import_dataset("mmsa", dump(aligned(change)[0], tmp_path / "a.pkl"))
    assert dataset.splits["train"].ids == ["a", "b", "a#2", "a#2#2"]
    assert dataset.splits["valid"].ids == ["b#2", "c"]
    assert dataset.report["ids"] == {"generated": [], "repeated": 3, "repeated_examples": ["a", "a#2", "b"]}


def _drop(*path: str) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        for key in path[:-1]:
            content = content[key]
        del content[path[-1]]

    return change


def _put(name: str, key: str, value: object) -> Callable[[dict], None]:
    def change(content: dict) -> None:
        content[name][key] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop("valid"), "no split 'valid', found test, train"),
        (_drop("test", "regression_labels"), "test has no 'regression_labels', found annotations, audio, "),
        (_put("train", "regression_labels", np.zeros((4, 2))), r"train regression_labels are float64 \[4, 2\]"),
        (
            _put("train", "regression_labels", np.array([0, 1, np.nan, 1])),
            r"train regression_labels\[2\] is not finite",
        ),
        (_put("train", "regression_labels", np.array([0, 1, 4.5, 1])), "train label 2 is 4.5"),
        (_put("train", "audio", np.zeros((4, 5))), r"train audio is \[4, 5\], expected \[N, T, d\]"),
        (_put("train", "audio", [[1.0], [1.0, 2.0]]), "train audio is ragged"),
        (_put("train", "audio", np.array([["a"]])), "train audio is <U1"),
        (_put("train", "audio", np.zeros((3, 5, 4))), "train audio has 3 samples, its labels 4"),
        (_put("valid", "audio", np.zeros((2, 5, 3))), r"valid audio is \[2, 5, 3\], expected \[N, 5, 4\]"),
        (_put("valid", "id", ["a"]), "valid has 1 ids for 2 labels"),
        (_put("train", "text_bert", np.zeros((4, 3, 7))), r"text_bert is \[4, 3, 7\], expected \[4, 3, 5\]"),
        (_put("train", "audio_lengths", [1, 2]), "audio_lengths has 2 entries"),
    ],
)
def test_errors_name_file_key_and_shape(tmp_path: Path, change: Callable[[dict], None], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        import_dataset("mmsa", dump(aligned(change)[0], tmp_path / "aligned_50.pkl"))
    assert "aligned_50.pkl" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_list_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds a list, expected a dict of train, valid, test"):
        import_dataset("mmsa", dump([1], tmp_path / "a.pkl"))


def test_unknown_format(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="format 'sdk' is not one of mmsa, mult, csd, mfn"):
        import_dataset("sdk", tmp_path)
