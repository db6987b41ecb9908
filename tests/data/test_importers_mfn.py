from __future__ import annotations

import os
from pathlib import Path

import h5py
import numpy as np
import pytest
from layouts import padded, random_clips, write_mfn

from fastmmkd.data import store
from fastmmkd.data.importers import import_dataset
from fastmmkd.errors import UserError
from fastmmkd.modalities import MODALITIES

SIZES = {"train": 6, "valid": 2, "test": 3}
STARS = {"train": np.array([1, 1.5, 3, 3, 4.5, 5]), "valid": np.array([2.0, 3]), "test": np.array([3.5, 4, 5])}
MMMO = Path(os.environ.get("MMMO_DIR", Path(__file__).parents[2].parent / "shared/data/ict_mmmo"))


def write(folder: Path, labels: dict[str, np.ndarray] = STARS, key: str = "d1") -> dict:
    """A folder like ICT-MMMO: left-padded float64, no language in train; returns the clips."""
    rng = np.random.default_rng(0)
    clips = {}
    for name, n in SIZES.items():
        clips[name] = random_clips(rng, n)
        kept = [m for m in MODALITIES if (name, m) != ("train", "language")]
        features = {m: padded(clips[name], m, 5, "left") for m in kept}
        write_mfn(folder, name, features, labels[name], key)
    return clips


@pytest.mark.parametrize("key", ["d1", "data"])
def test_a_folder_without_language_in_training(tmp_path: Path, key: str) -> None:
    clips = write(tmp_path, key=key)
    dataset = import_dataset("mfn", tmp_path)
    for name, split in dataset.splits.items():
        for i, m in enumerate(MODALITIES):
            if (name, m) == ("train", "language"):
                assert not split.present[:, i].any()
                assert not split.lengths[:, i].any()
                assert split.features[m].shape == (0, 6)
            else:
                np.testing.assert_array_equal(split.padded(m, 5), padded(clips[name], m, 5, "left", "float32"))
                assert split.lengths[:, i].tolist() == [len(clip[m]) for clip in clips[name]]
    assert dataset.report["notes"] == ["the source's train split has no language"]
    assert dataset.source == f"MFN {tmp_path.name}"
    store.write(dataset, tmp_path / "a.h5")


def test_stars_are_centred_and_the_map_is_recorded(tmp_path: Path) -> None:
    write(tmp_path)
    dataset = import_dataset("mfn", tmp_path)
    assert dataset.label_map == "label - 3"
    assert dataset.splits["train"].labels.tolist() == [-2, -1.5, 0, 0, 1.5, 2]


def test_scores_are_kept(tmp_path: Path) -> None:
    labels = {name: y - 3 for name, y in STARS.items()}
    write(tmp_path, labels)
    dataset = import_dataset("mfn", tmp_path)
    assert dataset.label_map == "identity"
    assert dataset.splits["valid"].labels.tolist() == [-1, 0]


def test_one_scale_for_all_splits(tmp_path: Path) -> None:
    """Labels in 1 .. 3 could be either; another split decides."""
    write(tmp_path, {**STARS, "train": np.array([1.0, 1, 2, 2, 3, 3])})
    assert import_dataset("mfn", tmp_path).splits["train"].labels.tolist() == [-2, -2, -1, -1, 0, 0]


def test_another_scale_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {**STARS, "train": np.full(6, 2.0), "test": np.array([1.0, 7, 2])})
    with pytest.raises(UserError, match=r"test label 1 is 7, expected a score in \[-3, 3\] or 1 to 5 stars"):
        import_dataset("mfn", tmp_path)


def test_labels_as_a_column(tmp_path: Path) -> None:
    write(tmp_path, {name: y[:, None] for name, y in STARS.items()})
    assert import_dataset("mfn", tmp_path).splits["valid"].labels.tolist() == [-1, 0]


def test_embeddings_win_over_word_indices(tmp_path: Path) -> None:
    clips = write(tmp_path)
    with h5py.File(tmp_path / "text_test.h5", "w") as file:
        file["d1"] = np.zeros((3, 5), np.int64)
    split = import_dataset("mfn", tmp_path).splits["test"]
    np.testing.assert_array_equal(split.padded("language", 5), padded(clips["test"], "language", 5, "left", "float32"))


def test_errors(tmp_path: Path) -> None:
    write(tmp_path)
    with h5py.File(tmp_path / "text_train.h5", "w") as file:
        file["d1"] = np.zeros((6, 5), np.int64)
    with pytest.raises(UserError, match=r"text_train\.h5: holds int64 \[6, 5\], expected features \[N, T, d\]"):
        import_dataset("mfn", tmp_path)
    with h5py.File(tmp_path / "text_train.h5", "w") as file:
        file["embedding"] = np.zeros((6, 5, 6))
    with pytest.raises(UserError, match=r"text_train\.h5: no data set d1 or data, found embedding"):
        import_dataset("mfn", tmp_path)
    (tmp_path / "text_train.h5").write_bytes(b"hello")
    with pytest.raises(UserError, match=r"text_train\.h5: damaged or no HDF5"):
        import_dataset("mfn", tmp_path)
    (tmp_path / "text_train.h5").unlink()
    (tmp_path / "y_valid.h5").unlink()
    with pytest.raises(UserError, match=r"y_valid\.h5: no such file, expected the labels of valid"):
        import_dataset("mfn", tmp_path)
    with pytest.raises(UserError, match=r"a folder of \.h5 files"):
        import_dataset("mfn", tmp_path / "nowhere")


def test_a_split_without_features(tmp_path: Path) -> None:
    write(tmp_path)
    for file in ("audio_train.h5", "video_train.h5"):
        (tmp_path / file).unlink()
    with pytest.raises(UserError, match=r"no features for train, expected at least one of text_train\.h5"):
        import_dataset("mfn", tmp_path)


@pytest.mark.skipif(not MMMO.is_dir(), reason=f"the real ICT-MMMO files are not in {MMMO} (set MMMO_DIR)")
class TestRealFiles:
    def test_sizes_labels_and_presence(self, tmp_path: Path) -> None:
        dataset = store.write(import_dataset("mfn", MMMO), tmp_path / "mmmo.h5")
        assert [len(split) for split in dataset.splits.values()] == [220, 40, 80]
        assert (dataset.longest, dataset.feature_dims) == ((20, 20, 20), (300, 74, 36))
        assert dataset.label_map == "label - 3"
        assert not dataset.splits["train"].present[:, 0].any()
        assert dataset.splits["train"].present[:, 1:].all()
        assert all(dataset.splits[name].present.all() for name in ("valid", "test"))
        mean, _ = dataset.normalisation["audio"]
        assert 160 < mean[0] < 190  # pitch in Hz

    def test_every_source_frame_is_kept_and_the_last_is_real(self) -> None:
        dataset = import_dataset("mfn", MMMO)
        for name, split in dataset.splits.items():
            last = np.stack([split.padded(m, 20)[:, -1].any(-1) for m in MODALITIES])
            assert last.any(0).all()
            for m, prefix in (("audio", "audio"), ("visual", "video")):
                with h5py.File(MMMO / f"{prefix}_{name}.h5") as file:
                    source = file["d1"][()].astype(np.float32)
                assert (source != 0).any(-1).sum() == split.frame_mask(m).sum()
                np.testing.assert_allclose(split.padded(m).sum((1, 2)), source.sum((1, 2)), rtol=1e-3, atol=1e-3)

    def test_resplit_gives_a_third_of_training_language(self, tmp_path: Path) -> None:
        dataset = store.write(import_dataset("mfn", MMMO, resplit=1), tmp_path / "mmmo.h5")
        assert [len(split) for split in dataset.splits.values()] == [220, 40, 80]
        for split in dataset.splits.values():
            assert abs(split.present[:, 0].mean() - 120 / 340) < 0.02
