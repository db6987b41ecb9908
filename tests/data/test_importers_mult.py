from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from layouts import WIDTHS, dump, mult_split, nonzero, padded, random_clips

from fastmmkd.data import store
from fastmmkd.data.importers import import_dataset
from fastmmkd.errors import UserError
from fastmmkd.modalities import MODALITIES

ALIGNED = {"language": 5, "audio": 5, "visual": 5}
NO, YES = [1, 0], [0, 1]
# Neutral, happy, sad, angry, as in the pickle.
IEMOCAP = {
    "train": np.array([[NO, YES, NO, NO], [YES, NO, NO, NO], [NO, NO, YES, YES]]),
    "valid": np.array([[NO, NO, NO, YES]]),
    "test": np.array([[NO, NO, NO, NO], [NO, NO, YES, NO]]),
}


def mosi(protocol: int = 4) -> tuple[dict, dict]:
    rng = np.random.default_rng(0)
    clips = {name: random_clips(rng, n) for name, n in (("train", 4), ("valid", 2), ("test", 3))}
    labels = {name: rng.uniform(-3, 3, (len(c), 1, 1)).astype(np.float32) for name, c in clips.items()}
    return {name: mult_split(clips[name], labels[name], ALIGNED) for name in clips}, clips


def iemocap(labels: dict[str, np.ndarray]) -> dict:
    rng = np.random.default_rng(0)
    return {name: mult_split(random_clips(rng, len(y)), y.astype(np.float64), ALIGNED) for name, y in labels.items()}


@pytest.mark.parametrize("protocol", [2, 4])
def test_mosi_is_already_left_padded(tmp_path: Path, protocol: int) -> None:
    content, clips = mosi()
    dataset = import_dataset("mult", dump(content, tmp_path / "mosi_data.pkl", protocol))
    for name, split in dataset.splits.items():
        for i, m in enumerate(MODALITIES):
            np.testing.assert_array_equal(split.padded(m, 5), padded(clips[name], m, 5, "left", "float32"))
            assert split.lengths[:, i].tolist() == [len(clip[m]) for clip in clips[name]]
        np.testing.assert_array_equal(split.labels, content[name]["labels"][:, 0, 0])
        assert split.ids == [f"{name}-{i:05d}" for i in range(len(split))]
    assert dataset.label_kind == "score"
    assert dataset.report["ids"]["generated"] == ["train", "valid", "test"]
    store.write(dataset, tmp_path / "a.h5")


def test_ids_of_video_and_interval_are_joined(tmp_path: Path) -> None:
    content, _ = mosi()
    for name, split in content.items():
        split["id"] = np.array(
            [[f"{name}video".encode(), b"1.5", str(i).encode()] for i in range(len(split["labels"]))]
        )
    dataset = import_dataset("mult", dump(content, tmp_path / "a.pkl"))
    assert dataset.splits["valid"].ids == ["validvideo_1.5_0", "validvideo_1.5_1"]


def test_iemocap_pairs_become_happy_sad_angry_neutral(tmp_path: Path) -> None:
    dataset = import_dataset("mult", dump(iemocap(IEMOCAP), tmp_path / "iemocap_data.pkl"))
    assert store.EMOTIONS == ("happy", "sad", "angry", "neutral")
    assert dataset.label_kind == "emotions"
    assert dataset.splits["train"].labels.tolist() == [[1, 0, 0, 0], [0, 0, 0, 1], [0, 1, 1, 0]]
    assert dataset.splits["valid"].labels.tolist() == [[0, 0, 1, 0]]
    assert dataset.splits["test"].labels.tolist() == [[0, 0, 0, 0], [0, 1, 0, 0]]
    assert store.write(dataset, tmp_path / "a.h5").splits["train"].labels.dtype == np.float32


def test_samples_with_no_emotion_or_several_are_counted(tmp_path: Path) -> None:
    dataset = import_dataset("mult", dump(iemocap(IEMOCAP), tmp_path / "iemocap_data.pkl"))
    wish = "; emotions-4way takes such data with data.ambiguous=drop alone, which leaves these samples out"
    assert dataset.report["notes"] == [
        f"train: of 3 samples 0 hold no emotion and 1 several{wish}",
        f"test: of 2 samples 1 hold no emotion and 0 several{wish}",
    ]
    single = {name: np.array([[NO, YES, NO, NO]] * 2) for name in IEMOCAP}
    assert import_dataset("mult", dump(iemocap(single), tmp_path / "iemocap_data.pkl")).report["notes"] == []


def test_a_pair_that_is_not_one_hot(tmp_path: Path) -> None:
    labels = {name: y.copy() for name, y in IEMOCAP.items()}
    labels["test"][1, 2] = [1, 1]
    with pytest.raises(UserError, match=r"a\.pkl: test labels\[1, 2\] is \[1.0, 1.0\], expected a one-hot pair"):
        import_dataset("mult", dump(iemocap(labels), tmp_path / "a.pkl"))


def test_splits_that_disagree_on_the_kind_of_labels(tmp_path: Path) -> None:
    content = iemocap(IEMOCAP)
    content["test"]["labels"] = np.zeros((2, 1, 1))
    with pytest.raises(UserError, match=r"train labels are float64 \[3, 4, 2\], expected one number per sample"):
        import_dataset("mult", dump(content, tmp_path / "a.pkl"))


def test_noalign_modalities_have_their_own_padding(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    steps = {"language": 4, "audio": 9, "visual": 7}
    sizes = {"train": 5, "valid": 2, "test": 3}
    clips = {
        name: [{m: nonzero(rng, rng.integers(2, steps[m] + 1), WIDTHS[m]) for m in MODALITIES} for _ in range(n)]
        for name, n in sizes.items()
    }
    clips["train"][0]["audio"] = nonzero(rng, 6, WIDTHS["audio"])
    clips["train"][0]["audio"][2] = 0
    content = {name: mult_split(clips[name], np.zeros((n, 1, 1)), steps) for name, n in sizes.items()}
    dataset = import_dataset("mult", dump(content, tmp_path / "mosi_data_noalign.pkl"))
    for name, split in dataset.splits.items():
        for i, m in enumerate(MODALITIES):
            np.testing.assert_array_equal(
                split.padded(m, steps[m]), padded(clips[name], m, steps[m], "left", "float32")
            )
            assert split.lengths[:, i].tolist() == [len(clip[m]) for clip in clips[name]]
    assert dataset.splits["train"].frame_mask("audio")[:6].tolist() == [True, True, False, True, True, True]
    assert not dataset.report["aligned"]
    assert not dataset.aligned


def test_minus_infinity_in_audio(tmp_path: Path) -> None:
    content, _ = mosi()
    content["train"]["audio"][-1, -1, 0] = -np.inf
    dataset = import_dataset("mult", dump(content, tmp_path / "a.pkl"))
    assert dataset.report["nonfinite"]["train"] == {"audio": {"inf": 1}}
    assert dataset.splits["train"].features["audio"][-1, 0] == 0
