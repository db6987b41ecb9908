from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmkd.data import store
from fastmmkd.data.integrity import array_hashes, content_hash
from fastmmkd.data.store import Dataset, Split
from fastmmkd.errors import UserError
from fastmmkd.modalities import MODALITIES
from tests.handmade import lacking

Make = Callable[..., Dataset]


def assert_same(a: Dataset, b: Dataset) -> None:
    for name in store.SPLITS:
        x, y = a.splits[name], b.splits[name]
        for m in MODALITIES:
            np.testing.assert_array_equal(x.features[m], y.features[m])
            assert x.features[m].dtype == y.features[m].dtype == np.float32
        for key in ("lengths", "present", "labels"):
            np.testing.assert_array_equal(getattr(x, key), getattr(y, key))
            assert getattr(x, key).dtype == getattr(y, key).dtype
        assert x.ids == y.ids
        assert x.ideal.keys() == y.ideal.keys()
        for condition in x.ideal:
            np.testing.assert_array_equal(x.ideal[condition], y.ideal[condition])
    for m in MODALITIES:
        for left, right in zip(a.normalisation[m], b.normalisation[m], strict=True):
            np.testing.assert_array_equal(left, right)
    for key in ("label_kind", "source", "importer", "label_map", "report", "content_hash", "path"):
        assert getattr(a, key) == getattr(b, key)


@pytest.mark.parametrize("kind", ["score", "emotions"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_write_then_read_gives_the_same(make_dataset: Make, tmp_path: Path, kind: str, dtype: str) -> None:
    dataset = make_dataset(kind=kind)
    dataset.ideal_support = np.array([-1.0, 1.0], np.float32)
    for split in dataset.splits.values():
        split.ideal = {"la": np.full((len(split), 2), 0.5, np.float32)}
    written = store.write(dataset, tmp_path / "a.h5", dtype)
    back = store.read(tmp_path / "a.h5")
    assert_same(written, back)
    np.testing.assert_array_equal(back.ideal_support, dataset.ideal_support)
    expected = dataset.splits["test"].features["audio"].astype(dtype).astype(np.float32)
    np.testing.assert_array_equal(back.splits["test"].features["audio"], expected)


def test_header_tells_sizes_without_the_arrays(make_dataset: Make, tmp_path: Path) -> None:
    written = store.write(make_dataset(), tmp_path / "a.h5")
    header = store.read_header(tmp_path / "a.h5")
    assert header.content_hash == written.content_hash
    assert header.samples == {"train": 12, "valid": 6, "test": 5}
    assert (header.label_kind, header.source, header.importer) == ("score", "random numbers", "synthetic")


def test_disk_has_packed_rows_in_chunks_of_whole_rows(make_dataset: Make, tmp_path: Path) -> None:
    store.write(make_dataset(), tmp_path / "a.h5", "float16")
    with h5py.File(tmp_path / "a.h5") as file:
        audio = file["train/features/audio"]
        assert audio.dtype == np.float16
        assert audio.shape == (file["train/lengths"][:, 1].sum(), 4)
        assert audio.chunks == audio.shape


def test_normalisation_is_of_present_training_frames_only(make_dataset: Make, tmp_path: Path) -> None:
    dataset = make_dataset()
    train = dataset.splits["train"]
    audio = [[1, 5, 0.1, -2], [0, 0, 0, 0], [3, 5, 0.1, 2]]  # the middle frame is missing
    train.features["audio"] = np.array(audio, np.float32)
    train.present[:, 1] = train.lengths[:, 1] = 0
    train.present[0, 1], train.lengths[0, 1] = True, 3
    dataset.splits["valid"].features["audio"] *= 1000
    mean, std = store.write(dataset, tmp_path / "a.h5").normalisation["audio"]
    assert mean.dtype == std.dtype == np.float64
    np.testing.assert_allclose(mean, [2, 5, np.float32(0.1), 0])
    np.testing.assert_allclose(std, [1, 1, 1, 2])  # features 1 and 2 are constant


def test_normalisation_of_a_modality_that_training_lacks(make_dataset: Make, tmp_path: Path) -> None:
    dataset = make_dataset()
    dataset.splits["train"] = lacking(dataset.splits["train"], "language", slice(None))
    mean, std = store.write(dataset, tmp_path / "a.h5").normalisation["language"]
    assert mean.tolist() == [0] * 6
    assert std.tolist() == [1] * 6


def test_normalisation_agrees_with_numpy_beyond_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastmmkd.data import packing
    from fastmmkd.data.integrity import moments

    monkeypatch.setattr(packing, "BLOCK_BYTES", 7 * 3 * 8)
    x = np.random.default_rng(0).normal(100, 0.01, (40, 3)).astype(np.float32)
    lengths = np.full((20, 3), 2, np.int32)
    split = Split({"audio": x}, lengths, lengths > 0, labels=np.zeros(20, np.float32), ids=[])
    found = moments(split, "audio")
    assert found is not None
    np.testing.assert_allclose(found.mean, x.mean(0, dtype=np.float64), rtol=1e-12)
    np.testing.assert_allclose(found.std, x.std(0, dtype=np.float64), rtol=1e-9)


def _changed(dataset: Dataset, what: str) -> Dataset:
    split = dataset.splits["valid"]
    i = int(np.flatnonzero(split.present.all(1) & (split.lengths[:, 1] > 1))[0])
    if what == "value":
        split.features["visual"][split.starts("visual")[i], 0] += 1
    elif what == "label":
        split.labels[i] = -split.labels[i] if split.labels[i] else 1
    elif what == "id":
        split.ids[i] += "x"
    elif what == "order":
        split.ids[0], split.ids[1] = split.ids[1], split.ids[0]
    else:  # a modality of one zero frame, or none
        dataset.splits["valid"] = lacking(split, "audio", slice(i, i + 1))
        if what == "length":
            split, at = dataset.splits["valid"], split.starts("audio")[i]
            split.features["audio"] = np.insert(split.features["audio"], at, 0, axis=0)
            split.lengths[i, 1] = split.present[i, 1] = 1
    return dataset


@pytest.mark.parametrize("what", ["value", "label", "id", "order", "length", "presence"])
def test_hash_changes_with_every_part(make_dataset: Make, tmp_path: Path, what: str) -> None:
    before = store.write(make_dataset(), tmp_path / "a.h5").content_hash
    after = store.write(_changed(make_dataset(), what), tmp_path / "b.h5").content_hash
    assert before != after
    assert store.write(make_dataset(), tmp_path / "c.h5").content_hash == before


def test_hash_tells_length_from_presence(make_dataset: Make) -> None:
    length, presence = (array_hashes(_changed(make_dataset(), what)) for what in ("length", "presence"))
    assert content_hash(length) != content_hash(presence)


def test_hash_does_not_depend_on_the_container(make_dataset: Make, tmp_path: Path) -> None:
    dataset = make_dataset()
    for split in dataset.splits.values():
        split.features = {m: np.round(x * 8) / 8 for m, x in split.features.items()}  # exact in float16
    as_float32 = store.write(dataset, tmp_path / "a.h5", "float32")
    as_float16 = store.write(dataset, tmp_path / "b.h5", "float16")
    assert as_float32.content_hash == as_float16.content_hash


def _one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def test_reading_a_missing_file_or_a_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing\.h5: no such file") as error:
        store.read(tmp_path / "nothing.h5")
    _one_line(error)
    with pytest.raises(UserError, match="is a folder"):
        store.read(tmp_path)


@pytest.mark.parametrize("content", [b"", b"id,label\n1,2\n"])
def test_reading_another_kind_of_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.h5").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.h5: not an HDF5 file"):
        store.read(tmp_path / "a.h5")


@settings(deadline=None, max_examples=15)
@given(share=st.floats(0.05, 0.999))
def test_reading_a_truncated_file(share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "whole.h5"
    if not path.exists():
        store.write(_tiny(), path)
    cut = path.with_name("cut.h5")
    whole = path.read_bytes()
    cut.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"cut\.h5: truncated"):
        store.read(cut)


def _tiny() -> Dataset:
    def split(name: str) -> Split:
        return Split(
            features={m: np.ones((6, 2), np.float32) for m in MODALITIES},
            lengths=np.full((2, 3), 3, np.int32),
            present=np.ones((2, 3), bool),
            labels=np.zeros(2, np.float32),
            ids=[f"{name}0", f"{name}1"],
        )

    return Dataset({name: split(name) for name in store.SPLITS}, "score", "ones", "synthetic")


def test_reading_foreign_hdf5(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "a.h5", "w") as file:
        file["d1"] = np.zeros(3)
    with pytest.raises(UserError, match="not a fastmmkd store") as error:
        store.read(tmp_path / "a.h5")
    _one_line(error)


def test_reading_a_newer_version(tmp_path: Path) -> None:
    store.write(_tiny(), tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file.attrs["version"] = store.VERSION + 1
    with pytest.raises(UserError, match="format version 3, this fastmmkd reads up to 2"):
        store.read(tmp_path / "a.h5")


@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("train", "data set has the splits valid, test, expected train, valid, test; "),
        ("valid/ids", "there is no valid/ids"),
        ("test/features/audio", "there is no test/features/audio"),
        ("meta/normalisation/visual/std", "there is no meta/normalisation/visual/std"),
        ("meta", "there is no meta"),
    ],
)
def test_reading_a_store_without_a_part(tmp_path: Path, part: str, said: str) -> None:
    store.write(_tiny(), tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file[part]
    for read in (store.read, store.read_header):
        with pytest.raises(UserError, match=rf"a\.h5: {said}") as error:
            read(tmp_path / "a.h5")
        _one_line(error)


def test_reading_a_store_without_an_attribute(tmp_path: Path) -> None:
    store.write(_tiny(), tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        del file["meta"].attrs["content_hash"]
    with pytest.raises(
        UserError, match=r"a\.h5: attribute content_hash of /meta is missing, expected text; import it again"
    ):
        store.read(tmp_path / "a.h5")


@pytest.mark.parametrize("moment", ["in memory", "on disk"])
def test_an_interrupted_write_leaves_what_was_there(
    make_dataset: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    before = store.write(make_dataset(), tmp_path / "a.h5")
    write_bytes = Path.write_bytes

    def interrupted(*arguments: Any) -> None:
        if moment == "on disk":
            write_bytes(arguments[0], arguments[1][:100])
        raise KeyboardInterrupt

    monkeypatch.setattr(*((store, "_write_split") if moment == "in memory" else (Path, "write_bytes")), interrupted)
    for target in ("a.h5", "new.h5"):
        with pytest.raises(KeyboardInterrupt):
            store.write(make_dataset(seed=1), tmp_path / target)
    assert os.listdir(tmp_path) == ["a.h5"]
    assert store.read(tmp_path / "a.h5").content_hash == before.content_hash


FULL_DISK = """
import resource, sys
from fastmmkd.data import store
from fastmmkd.errors import UserError
data = store.read(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    store.write(data, sys.argv[2])
except UserError as error:
    print(error)
"""


def test_a_full_disk(make_dataset: Make, tmp_path: Path) -> None:
    """A limit on the size of files stands for it: the same errors, at the same calls."""
    written = store.write(make_dataset(), tmp_path / "a.h5")
    assert written.path.stat().st_size > 5000
    new = tmp_path / "new.h5"
    ended = subprocess.run([sys.executable, "-c", FULL_DISK, written.path, new], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"{new}: cannot write this file (File too large)\n"
    assert os.listdir(tmp_path) == ["a.h5"]


def test_writing_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write this file"):
        store.write(_tiny(), tmp_path / "file" / "a.h5")


def _break(dataset: Dataset, how: str) -> None:
    train, valid = dataset.splits["train"], dataset.splits["valid"]
    match how:
        case "no test":
            del dataset.splits["test"]
        case "kind":
            dataset.label_kind = "stars"
        case "no audio":
            del valid.features["audio"]
        case "flat":
            valid.features["audio"] = valid.features["audio"][:, 0]
        case "width":
            valid.features["audio"] = valid.features["audio"][:, :3]
        case "rows":
            valid.features["audio"] = valid.features["audio"][:-1]
        case "nan":
            valid.features["audio"][valid.starts("audio")[3], 2] = np.nan
        case "no width":
            train.features["audio"] = train.features["audio"][:, :0]
        case "length":
            valid.lengths[3, 1] += 1
        case "absent length":
            valid.present[3, 1] = False
        case "negative length":
            valid.lengths[3, 1], valid.present[3, 1] = -1, False
        case "lengths shape":
            valid.lengths = valid.lengths[:, :2]
        case "present dtype":
            valid.present = valid.present.astype(np.int32)
        case "label range":
            train.labels[3] = 3.5
        case "label nan":
            train.labels[3] = np.nan
        case "label shape":
            train.labels = train.labels[:, None]
        case "empty":
            train.labels = train.labels[:0]
        case "ids":
            valid.ids.pop()
        case "same id":
            valid.ids[2] = train.ids[0]
        case "empty id":
            valid.ids[2] = ""
        case "surrogate":
            valid.ids[2] = "a\udc80b"
        case "no frames":
            dataset.splits["test"] = Split(
                {m: x[:0] for m, x in train.features.items()},
                np.zeros((2, 3), np.int32),
                np.zeros((2, 3), bool),
                train.labels[:2],
                ["a", "b"],
            )
        case "ideal values":
            dataset.ideal_support = np.zeros(2)
            valid.ideal = {"la": np.full((6, 2), 0.5, np.float32)}
            valid.ideal["la"][3, 1] = np.nan
        case "ideal":
            valid.ideal = {"la": np.zeros((6, 2), np.float32)}
        case "ideal shape":
            dataset.ideal_support = np.zeros(3)
            valid.ideal = {"la": np.zeros((6, 2), np.float32)}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no test", "splits train, valid, expected train, valid, test"),
        ("kind", "label_kind is 'stars'"),
        ("no audio", r"valid has features \['language', 'visual'\]"),
        ("flat", r"valid/features/audio is \[21\], expected \[R, d\] with R = 21, the sum of its lengths"),
        ("width", r"valid/features/audio is \[21, 3\], expected \[R, d\] = \[21, 4\] as in train"),
        ("no width", r"train/features/audio is \[\d+, 0\], expected \[R, d\] with R = \d+"),
        ("rows", r"valid/features/audio is \[20, 4\], expected \[R, d\] with R = 21"),
        ("nan", r"valid/features/audio\[5, 2\] \(sample 3, frame 0\) is nan"),
        ("length", r"valid/features/audio is \[21, 4\], expected \[R, d\] with R = 22, the sum of its lengths"),
        ("absent length", r"valid/lengths\[3\] gives audio 6 frames although present is False"),
        ("negative length", r"valid/lengths\[3\] gives audio -1 frames although present is False"),
        ("lengths shape", r"valid/lengths are int32 \[6, 2\], expected int \[6, 3\]"),
        ("present dtype", r"valid/present is int32 \[6, 3\], expected bool"),
        ("label range", r"train/labels\[3\] is 3.5, expected a score in \[-3, 3\]"),
        ("label nan", r"train/labels\[3\] is nan"),
        ("label shape", r"train/labels are \[12, 1\], expected \[N\]"),
        ("empty", "train has no samples"),
        ("ids", "valid has 5 ids for 6 samples"),
        ("same id", r"id 'train\[0\] ünï' occurs in train and again in valid"),
        ("empty id", "valid/ids holds ''"),
        ("surrogate", r"valid/ids holds 'a\\udc80b', expected a non-empty string without NUL or surrogates"),
        ("no frames", "test has no frame of any modality"),
        ("ideal", "ideal_support is missing"),
        ("ideal values", r"valid/ideal/la\[3\] is \[0.5, nan\], expected probabilities"),
        ("ideal shape", r"valid/ideal/la is \[6, 2\], expected \[6, 3\]"),
    ],
)
def test_write_refuses_what_breaks_the_layout(make_dataset: Make, tmp_path: Path, how: str, message: str) -> None:
    dataset = make_dataset()
    _break(dataset, how)
    with pytest.raises(UserError, match=message) as error:
        store.write(dataset, tmp_path / "a.h5")
    _one_line(error)
    assert os.listdir(tmp_path) == []


def test_emotion_labels_are_indicators(make_dataset: Make, tmp_path: Path) -> None:
    dataset = make_dataset(kind="emotions")
    dataset.splits["test"].labels[2, 1] = 0.5
    with pytest.raises(UserError, match=r"test/labels\[2, 1\] is 0.5, expected 0 or 1"):
        store.write(dataset, tmp_path / "a.h5")


@pytest.mark.parametrize(("value", "message"), [(1e6, "reaches 1e\\+06, float16 ends at 65504"), (1e-9, "too small")])
def test_float16_refuses_what_it_cannot_hold(make_dataset: Make, tmp_path: Path, value: float, message: str) -> None:
    dataset = _tiny()
    dataset.splits["train"].features["audio"][2] = value
    with pytest.raises(UserError, match=message):
        store.write(dataset, tmp_path / "a.h5", "float16")
    store.write(dataset, tmp_path / "a.h5", "float32")


def test_write_does_not_change_its_argument(make_dataset: Make, tmp_path: Path) -> None:
    dataset = make_dataset()
    copy = replace(dataset)
    features = dataset.splits["train"].features["audio"].copy()
    store.write(dataset, tmp_path / "a.h5", "float16")
    assert dataset == copy
    np.testing.assert_array_equal(dataset.splits["train"].features["audio"], features)
    assert dataset.path is None


@pytest.mark.parametrize("dtype", ["float64", "int8"])
def test_unknown_dtype(tmp_path: Path, dtype: str) -> None:
    with pytest.raises(UserError, match="expected float32 or float16"):
        store.write(_tiny(), tmp_path / "a.h5", dtype)
