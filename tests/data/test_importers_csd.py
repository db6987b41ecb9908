from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from layouts import write_csd

from fastmmkd.data import store
from fastmmkd.data.importers import csd, import_dataset
from fastmmkd.data.importers.csd_files import Rows
from fastmmkd.errors import UserError

FOLDS = {"train": ["va", "vb"], "valid": ["vc"], "test": ["vd"]}
VIDEOS = [video for fold in FOLDS.values() for video in fold]

# One video of 6 seconds; the same words in each. Word i lasts from i to i + 1, the third is a pause.
WORDS = np.array([[b"i"], [b"liked"], [b"sp"], [b"this"], [b"film"], [b"!"]])
WORD_TIMES = np.array([[i, i + 1] for i in range(6)], float)
SPOKEN = [0, 1, 3, 4, 5]
GLOVE = np.array([[i + 1, -i - 1] for i in range(6)], np.float32)
# Audio every half second from 0 to 4: nothing overlaps words 4 and 5. Rows 2 and 3 lie in word 1.
AUDIO_TIMES = np.array([[i / 2, i / 2 + 0.5] for i in range(8)])
AUDIO = np.array([[10 * i, 1, 0] for i in range(8)], np.float32)
# One video frame of four seconds, from 0.5 to 4.5.
FACET_TIMES = np.array([[0.5, 4.5]])
FACET = np.array([[7, 8]], np.float32)
LABEL_TIMES = np.array([[0, 2.9], [2.9, 6]])
LABELS = np.array([[1.5], [-2.0]], np.float32)
NAMES = {
    "labels": ("CMU_MOSI_Opinion_Labels.csd", "Opinion Segment Labels"),
    "words": ("CMU_MOSI_TimestampedWords.csd", "words"),
    "language": ("CMU_MOSI_TimestampedWordVectors.csd", "glove_vectors"),
    "audio": ("CMU_MOSI_COVAREP.csd", "COVAREP"),
    "visual": ("CMU_MOSI_Visual_Facet_42.csd", "FACET_4.2"),
}
ENTRIES = {
    "labels": (LABELS, LABEL_TIMES),
    "words": (WORDS, WORD_TIMES),
    "language": (GLOVE[SPOKEN], WORD_TIMES[SPOKEN]),
    "audio": (AUDIO, AUDIO_TIMES),
    "visual": (FACET, FACET_TIMES),
}


def write(folder: Path, without: tuple[str, ...] = (), **changed: dict) -> Path:
    """The SDK's files for four equal videos, with whole streams left out or replaced."""
    for role, (file, root) in NAMES.items():
        if role not in without:
            entries = changed.get(role, dict.fromkeys(VIDEOS, ENTRIES[role]))
            write_csd(folder / file, root, entries, {"dataset name": "CMU-MOSI"})
    (folder / "splits.json").write_text(json.dumps(FOLDS))
    return folder


def test_segments_are_aligned_to_words_by_hand_checked_means(tmp_path: Path) -> None:
    dataset = import_dataset("csd", write(tmp_path))
    train = dataset.splits["train"]
    assert train.ids == ["va[0]", "va[1]", "vb[0]", "vb[1]"]
    assert train.labels.tolist() == [1.5, -2.0, 1.5, -2.0]
    assert {m: x.shape for m, x in train.features.items()} == {"language": (10, 2), "audio": (10, 3), "visual": (10, 2)}
    # Segment 0: "i liked" (the pause is skipped).
    assert train.lengths[0].tolist() == [2, 2, 2]
    assert train.features["language"][:2].tolist() == [[1, -1], [2, -2]]
    assert train.features["audio"][:2].tolist() == [[5, 1, 0], [25, 1, 0]]
    assert train.features["visual"][:2].tolist() == [[7, 8], [7, 8]]
    # Segment 1: "this film !"; audio ends at 4 s and the camera at 4.5 s: missing frames, not padding.
    assert train.lengths[1].tolist() == [3, 3, 3]
    assert train.features["language"][2:5, 0].tolist() == [4, 5, 6]
    assert train.features["audio"][2:5].tolist() == [[65, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert train.features["visual"][2:5].tolist() == [[7, 8], [7, 8], [0, 0]]
    assert dataset.aligned
    assert dataset.source == "CMU-MultimodalSDK CMU-MOSI"
    store.write(dataset, tmp_path / "a.h5")


def test_without_a_words_file_the_vectors_are_the_words(tmp_path: Path) -> None:
    with_words = import_dataset("csd", write(tmp_path))
    (tmp_path / NAMES["words"][0]).unlink()
    without = import_dataset("csd", tmp_path)
    for m in ("language", "audio", "visual"):
        a, b = with_words.splits["test"].features[m], without.splits["test"].features[m]
        np.testing.assert_array_equal(a, b)


def test_the_last_words_are_kept(tmp_path: Path) -> None:
    split = csd.load(write(tmp_path), steps=2).splits["test"]
    assert split.features["language"][:, 0].tolist() == [1, 2, 5, 6]
    # Neither microphone nor camera has anything for the last word, and the microphone nothing for both.
    assert split.present.tolist() == [[True, True, True], [True, False, True]]
    assert split.lengths.tolist() == [[2, 2, 2], [2, 0, 2]]


def test_an_unknown_first_word_is_a_missing_frame_not_padding(tmp_path: Path) -> None:
    """No vector, no sound and no picture, but the word was said: its place stays."""
    vectors = GLOVE[SPOKEN] * (np.array(SPOKEN) > 0)[:, None]
    entries = {
        "language": (vectors, WORD_TIMES[SPOKEN]),
        "audio": (AUDIO[2:], AUDIO_TIMES[2:]),
        "visual": (FACET, FACET_TIMES + np.array([0.5, 0])),
    }
    changed = {role: dict.fromkeys(VIDEOS, entry) for role, entry in entries.items()}
    test = import_dataset("csd", write(tmp_path, **changed)).splits["test"]
    assert test.lengths[0].tolist() == [2, 2, 2]
    assert [test.frame_mask(m)[:2].tolist() for m in ("language", "audio", "visual")] == [[False, True]] * 3


def test_nan_and_minus_infinity_become_zero_before_the_mean(tmp_path: Path) -> None:
    audio = AUDIO.copy()
    audio[0, 1], audio[1, 1], audio[2, 2] = np.nan, 3, -np.inf
    entries = {video: (audio if video == "va" else AUDIO, AUDIO_TIMES) for video in VIDEOS}
    dataset = import_dataset("csd", write(tmp_path, audio=entries))
    assert dataset.splits["train"].features["audio"][:2].tolist() == [[5, 1.5, 0], [25, 1, 0]]
    assert dataset.report["nonfinite"] == {"train": {"audio": {"nan": 1, "inf": 1}}, "valid": {}, "test": {}}


def test_a_video_without_a_stream_lacks_the_modality(tmp_path: Path) -> None:
    entries = {video: ENTRIES["audio"] for video in VIDEOS if video != "vd"}
    test = import_dataset("csd", write(tmp_path, audio=entries)).splits["test"]
    assert test.present.tolist() == [[True, False, True]] * 2
    assert test.lengths[:, 1].tolist() == [0, 0]


def test_a_segment_without_words_is_left_out_and_counted(tmp_path: Path) -> None:
    times = np.array([[0, 2.9], [2.9, 6], [2.4, 2.6], [7, 9]])  # the third holds only the pause
    labels = np.array([[1.5], [-2.0], [0], [3]])
    entries = {video: (labels, times) if video == "vb" else ENTRIES["labels"] for video in VIDEOS}
    dataset = import_dataset("csd", write(tmp_path, labels=entries))
    assert dataset.splits["train"].ids == ["va[0]", "va[1]", "vb[0]", "vb[1]"]
    assert dataset.report["notes"] == ["2 segments without words left out"]


def test_a_word_belongs_to_one_segment(tmp_path: Path) -> None:
    """A word that crosses a border is in the segment that holds its midpoint."""
    times = np.array([[0, 1.4], [1.4, 6]])
    entries = dict.fromkeys(VIDEOS, (LABELS, times))
    split = import_dataset("csd", write(tmp_path, labels=entries)).splits["test"]
    assert split.lengths[:, 0].tolist() == [1, 4]


def test_all_labels_of_mosei_start_with_sentiment(tmp_path: Path) -> None:
    wide = np.concatenate([LABELS, np.ones((2, 6), np.float32)], axis=1)
    entries = dict.fromkeys(VIDEOS, (wide, LABEL_TIMES))
    dataset = import_dataset("csd", write(tmp_path, labels=entries))
    assert dataset.splits["test"].labels.tolist() == [1.5, -2.0]


def test_streams_that_are_cut_into_segments_already(tmp_path: Path) -> None:
    """The SDK's own alignment writes every stream as `video[k]`, row i for word i."""
    audio = np.array([[1, 2, 3], [4, 5, 6]], np.float32)
    stretched = WORD_TIMES[:2] + [[-0.2, 0.2]] * 2  # collapsed intervals reach into the neighbours
    cut = {
        "labels": (LABELS[:1], LABEL_TIMES[:1]),
        "language": (GLOVE[:2], WORD_TIMES[:2]),
        "audio": (audio, stretched),
        "visual": (FACET, FACET_TIMES),  # not one row a word: averaged in time
    }
    changed = {role: {f"{video}[{k}]": entry for video in VIDEOS for k in (2, 10)} for role, entry in cut.items()}
    dataset = import_dataset("csd", write(tmp_path, without=("words",), **changed))
    train = dataset.splits["train"]
    assert train.ids == ["va[2]", "va[10]", "vb[2]", "vb[10]"]
    assert train.features["language"][2:4].tolist() == GLOVE[:2].tolist()
    assert train.features["audio"][2:4].tolist() == audio.tolist()
    assert train.features["visual"][2:4].tolist() == [[7, 8], [7, 8]]


def test_streams_cut_by_word_beside_labels_by_video(tmp_path: Path) -> None:
    """There k counts words, so that it must not be taken for the segment's number."""
    words = {f"{video}[{i}]": (GLOVE[[i]], WORD_TIMES[[i]]) for video in VIDEOS for i in SPOKEN}
    dataset = import_dataset("csd", write(tmp_path, without=("words",), language=words))
    assert dataset.splits["test"].padded("language")[:, -2:, 0].tolist() == [[1, 2], [5, 6]]


def test_folds_of_the_sdk_are_read_not_run(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "splits.json").unlink()
    marker = tmp_path / "ran"
    (tmp_path / "cmu_mosi_std_folds.py").write_text(
        f"open({str(marker)!r}, 'w')\nstandard_train_fold=['va']\nstandard_valid_fold = ['vc']\n"
        "standard_test_fold = ['vd']\n"
    )
    dataset = import_dataset("csd", tmp_path)
    assert dataset.splits["train"].ids == ["va[0]", "va[1]"]
    assert dataset.report["notes"] == ["1 videos in no fold left out"]
    assert not marker.exists()


def test_missing_folds_show_the_expected_file(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "splits.json").unlink()
    with pytest.raises(UserError, match=r'splits\.json: no such file.*\{"train": \["video", \.\.\.\], "valid"'):
        import_dataset("csd", tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"splits\.json: not JSON"),
        ("[]", r"splits\.json: holds a list"),
        ('{"train": []}', r"splits\.json: no list for 'valid'"),
        ('{"train": ["va"], "valid": ["va"], "test": []}', r"video 'va' is in train and in valid"),
        ('{"train": ["va"], "valid": ["other"], "test": ["vd"]}', "no segment with words for valid"),
    ],
)
def test_bad_folds(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path)
    (tmp_path / "splits.json").write_text(text)
    with pytest.raises(UserError, match=message):
        import_dataset("csd", tmp_path)


def test_missing_streams_are_named(tmp_path: Path) -> None:
    write(tmp_path, without=("audio", "labels"))
    with pytest.raises(UserError, match=r"no COVAREP \(such as .*\) and no opinion segment labels .*found CMU_MOSI_T"):
        import_dataset("csd", tmp_path)


def test_two_files_for_one_role(tmp_path: Path) -> None:
    write(tmp_path)
    write_csd(tmp_path / "CMU_MOSI_Visual_Facet_41.csd", "FACET_4.1", {"va": ENTRIES["visual"]})
    with pytest.raises(UserError, match=r"both CMU_MOSI_Visual_Facet_41\.csd and .*_42\.csd are visual; remove one"):
        import_dataset("csd", tmp_path)


def test_other_streams_are_ignored(tmp_path: Path) -> None:
    write(tmp_path)
    for name in ("OpenFace_2", "CMU_MOSI_TimestampedPhones"):
        write_csd(tmp_path / f"{name}.csd", name, {"va": (np.zeros((1, 9)), WORD_TIMES[:1])})
    assert len(import_dataset("csd", tmp_path).splits["test"]) == 2


def _rename(role: str, file: str, root: str, metadata: dict, width: int | None = None) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / NAMES[role][0]).unlink()
        features, times = ENTRIES[role]
        if width:
            features = np.ones((len(features), width), np.float32)
        write_csd(folder / file, root, dict.fromkeys(VIDEOS, (features, times)), metadata)

    return change


@pytest.mark.parametrize(
    "change",
    [
        _rename("audio", "x.csd", "COAVAREP", {}),
        _rename("audio", "covarep.csd", "x", {}),
        _rename("audio", "x.csd", "x", {"computational sequence description": "COVAREP features of the Facet videos"}),
        _rename("audio", "x.csd", "x", {}, width=74),
        _rename("language", "y.csd", "y", {}, width=300),
        _rename("visual", "CMU_MOSEI_VisualFacet42.csd", "z", {}),
        _rename("labels", "CMU_MOSEI_Labels.csd", "All Labels", {}),
    ],
)
def test_roles_are_found_by_root_file_description_or_width(tmp_path: Path, change: Callable[[Path], None]) -> None:
    change(write(tmp_path))
    assert import_dataset("csd", tmp_path).splits["train"].present[0].all()


def test_damaged_streams(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / NAMES["audio"][0]
    with h5py.File(path, "a") as file:
        del file["COVAREP/data/va/intervals"]
        file["COVAREP/data/va/intervals"] = np.zeros((3, 2))
    with pytest.raises(UserError, match=r"COVAREP\.csd: va has features \[8, 3\] and intervals \[3, 2\]"):
        import_dataset("csd", tmp_path)
    with h5py.File(path, "a") as file:
        del file["COVAREP/data/va/intervals"]
    with pytest.raises(UserError, match=r"COVAREP\.csd: there is no data/va/intervals"):
        import_dataset("csd", tmp_path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"COVAREP\.csd: truncated; copy or make it again"):
        import_dataset("csd", tmp_path)
    with h5py.File(path, "w") as file:
        file["d1"] = np.zeros(3)
    with pytest.raises(UserError, match=r"COVAREP\.csd: not a computational sequence"):
        import_dataset("csd", tmp_path)


def test_labels_out_of_range_name_the_sample(tmp_path: Path) -> None:
    entries = dict.fromkeys(VIDEOS, (LABELS * 2, LABEL_TIMES))
    with pytest.raises(UserError, match="train label 1 is -4, expected a score"):
        import_dataset("csd", write(tmp_path, labels=entries))


class TestWordsWithoutDuration:
    """Aligners leave words that begin and end at the same time."""

    def test_glove_is_theirs_and_other_rows_hold_their_instant(self, tmp_path: Path) -> None:
        times = WORD_TIMES.copy()
        times[1] = 1.25, 1.25
        times[5] = 5.5, 5.5  # audio and video have ended
        changed = {"words": (WORDS, times), "language": (GLOVE[SPOKEN], times[SPOKEN])}
        dataset = import_dataset("csd", write(tmp_path, **{k: dict.fromkeys(VIDEOS, v) for k, v in changed.items()}))
        train = dataset.splits["train"]
        assert train.lengths[0].tolist() == [2, 2, 2]
        assert train.features["language"][:5].tolist() == GLOVE[SPOKEN].tolist()
        assert train.features["audio"][1].tolist() == AUDIO[2].tolist()  # from 1 to 1.5 seconds
        assert train.features["visual"][1].tolist() == FACET[0].tolist()
        assert not train.features["audio"][4].any()
        assert dataset.report["notes"] == [
            "8 words without duration have the rows at their instant, 4 have no audio, 4 have no visual"
        ]

    def test_a_set_of_them_keeps_its_words(self, tmp_path: Path) -> None:
        times = np.repeat(WORD_TIMES[:, :1] + 0.25, 2, axis=1)
        changed = {"words": (WORDS, times), "language": (GLOVE[SPOKEN], times[SPOKEN])}
        dataset = import_dataset("csd", write(tmp_path, **{k: dict.fromkeys(VIDEOS, v) for k, v in changed.items()}))
        assert dataset.splits["test"].features["language"].tolist() == GLOVE[SPOKEN].tolist()

    def test_of_two_at_one_instant_each_has_the_mean(self) -> None:
        rows = Rows(np.array([[1.0], [3], [9]]), np.array([1.0, 1, 0]), np.array([1.0, 1, 2]))
        frames, _ = csd.mean_over_words(rows, np.array([1.0, 1.0]), np.array([1.0, 1.0]))
        assert frames.tolist() == [[2], [2]]

    def test_an_instant_between_two_rows_is_in_the_later(self) -> None:
        rows = Rows(np.array([[1.0], [3]]), np.array([0.0, 1]), np.array([1.0, 2]))
        frames, _ = csd.mean_over_words(rows, np.array([1.0, 2]), np.array([1.0, 2]))
        assert frames.tolist() == [[3], [0]]


def test_a_set_without_a_frame(tmp_path: Path) -> None:
    later = {role: dict.fromkeys(VIDEOS, (ENTRIES[role][0], ENTRIES[role][1] + 100)) for role in ("audio", "visual")}
    nothing = dict.fromkeys(VIDEOS, (GLOVE[SPOKEN] * 0, WORD_TIMES[SPOKEN]))
    with pytest.raises(UserError, match="CMU-MOSI: no sample has a frame of any modality, every feature is zero"):
        import_dataset("csd", write(tmp_path, language=nothing, **later))


def test_touching_intervals_do_not_overlap_but_instants_inside_do() -> None:
    rows = Rows(np.array([[1.0], [2], [4], [8]]), np.array([0, 1, 2.5, 3]), np.array([1 + 1e-7, 2, 2.5, 3]))
    frames, counts = csd.mean_over_words(rows, np.array([1.0, 2.0]), np.array([2.0, 3.0]))
    assert frames.tolist() == [[2], [4]]
    assert counts == {}
