"""Folders of computational sequences that somebody else made: links, declared sizes, pipes, folds without an end."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from test_importers_csd import ENTRIES, NAMES, VIDEOS, write

from fastmmkd.data.importers import import_dataset
from fastmmkd.errors import UserError

Edit = Callable[[h5py.Group, Path], None]
FEATURES, INTERVALS = "data/va/features", "data/va/intervals"


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        import_dataset("csd", folder)
    assert "\n" not in str(caught.value)
    return str(caught.value).removeprefix(f"{folder}/")


def put(key: str, value: object) -> Edit:
    def edit(root: h5py.Group, folder: Path) -> None:
        if key in root:
            del root[key]
        root[key] = value

    return edit


def create(key: str, *args: object, **how: object) -> Edit:
    def edit(root: h5py.Group, folder: Path) -> None:
        del root[key]
        root.create_dataset(key, *args, **how)

    return edit


def elsewhere(key: str) -> Edit:
    """A link into another file, which is there."""

    def edit(root: h5py.Group, folder: Path) -> None:
        with h5py.File(folder / "other.h5", "w") as file:
            file["x"] = np.zeros((8, 3))
        put(key, h5py.ExternalLink(folder / "other.h5", "x"))(root, folder)

    return edit


def virtual(root: h5py.Group, folder: Path) -> None:
    layout = h5py.VirtualLayout((8, 3), "f4")
    layout[:] = h5py.VirtualSource(str(folder / "other.h5"), "x", shape=(8, 3))
    del root[FEATURES]
    root[FEATURES.rpartition("/")[0]].create_virtual_dataset("features", layout)


def system_file(root: h5py.Group, folder: Path) -> None:
    create(FEATURES, (8, 3), "f4", external=[("/etc/passwd", 0, 96)])(root, folder)


def cycle(root: h5py.Group, folder: Path) -> None:
    put(FEATURES, root["data"])(root, folder)


def ring(root: h5py.Group, folder: Path) -> None:
    """A hard link from below to above, where nobody looks."""
    root["data/va/up"] = root


LINK = "is a link to another place, expected the array itself"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (elsewhere(FEATURES), f"va/features {LINK}"),
        (elsewhere("data/vb/intervals"), f"data/vb/intervals {LINK}"),
        (put(FEATURES, h5py.SoftLink("/COVAREP/data/vb/features")), f"va/features {LINK}"),
        (put("data/vb", h5py.SoftLink("/COVAREP/data/va")), f"data/vb/features {LINK}"),
        (put("data/vb", h5py.SoftLink("/nowhere")), f"data/vb/features {LINK}"),
        (virtual, f"{FEATURES} lies in another file, expected its values in this one"),
        (system_file, f"{FEATURES} lies in another file, expected its values in this one"),
        (cycle, "not a computational sequence, the features of 'va' are no array [n, d]"),
        (
            create(FEATURES, (1 << 36, 3), "f4", chunks=(1 << 16, 3)),
            f"{FEATURES} is [68719476736, 3], but only parts of",
        ),
        (
            create(INTERVALS, (1 << 36, 2), "f4", chunks=(1 << 16, 2)),
            f"{INTERVALS} is [68719476736, 2], but only parts",
        ),
        (create(FEATURES, (1 << 40, 3), "f4"), f"{FEATURES} is [1099511627776, 3], 13194139533312 bytes, but 0 are"),
        (put(FEATURES, np.array([[b"x"] * 3] * 8)), "va has features of |S1, expected numbers"),
        (put(INTERVALS, np.array([[b"a", b"b"]] * 8)), "va has intervals of |S1, expected seconds"),
        (put(FEATURES, np.zeros(8, [("a", "f4")])), f"{FEATURES} is [('a', '<f4')] [8], expected numbers or text"),
        (put(FEATURES, np.float32(1)), "not a computational sequence, the features of 'va' are no array [n, d]"),
        (put("data/vb/features", h5py.Empty("f4")), "data/vb/features is no array, expected one with an axis of rows"),
        (put("data/va", np.zeros(3)), "not a computational sequence, its entries have no features"),
        (put("data", np.zeros(3)), "not a computational sequence, expected one group with data, found 'COVAREP'"),
    ],
)
def test_streams_that_are_refused(tmp_path: Path, edit: Edit, message: str) -> None:
    write(tmp_path)
    file = NAMES["audio"][0]
    with h5py.File(tmp_path / file, "a") as opened:
        edit(opened["COVAREP"], tmp_path)
    assert refusal(tmp_path).startswith(f"{file}: {message}")


def test_metadata_that_are_a_link(tmp_path: Path) -> None:
    write(tmp_path)
    file, root = NAMES["labels"]
    with h5py.File(tmp_path / file, "a") as opened:
        put("metadata/dataset name", h5py.SoftLink("/nowhere"))(opened[root], tmp_path)
    assert refusal(tmp_path) == f"{file}: metadata/dataset name {LINK}"


def test_metadata_of_another_kind_say_nothing(tmp_path: Path) -> None:
    write(tmp_path)
    file, root = NAMES["labels"]
    for value in (np.zeros(3), np.array([b"a", b"b"]), b"", h5py.Empty("S3")):
        with h5py.File(tmp_path / file, "a") as opened:
            put("metadata/dataset name", value)(opened[root], tmp_path)
        assert import_dataset("csd", tmp_path).source == f"CMU-MultimodalSDK {tmp_path.name}"


def test_a_cycle_where_nobody_looks(tmp_path: Path) -> None:
    write(tmp_path)
    with h5py.File(tmp_path / NAMES["audio"][0], "a") as opened:
        ring(opened["COVAREP"], tmp_path)
    assert import_dataset("csd", tmp_path).splits["train"].present.all()


def test_a_root_that_is_a_link(tmp_path: Path) -> None:
    write(tmp_path)
    with h5py.File(tmp_path / NAMES["audio"][0], "a") as opened:
        opened["alias"] = h5py.SoftLink("/COVAREP")
    assert refusal(tmp_path) == f"{NAMES['audio'][0]}: alias {LINK}"


def test_a_name_that_is_no_utf_8(tmp_path: Path) -> None:
    write(tmp_path)
    with h5py.File(tmp_path / NAMES["audio"][0], "a") as opened:
        opened["COVAREP/data"].move("va", b"v\xff")
    assert refusal(tmp_path) == f"{NAMES['audio'][0]}: the key b'v\\xff' is no UTF-8, expected the name of a video"


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_label_that_is_not_finite_names_its_file(tmp_path: Path, value: float) -> None:
    labels = np.array([[value], [1]], np.float32)
    entries = {v: (labels if v == "vb" else ENTRIES["labels"][0], ENTRIES["labels"][1]) for v in VIDEOS}
    write(tmp_path, labels=entries)
    assert refusal(tmp_path) == f"{NAMES['labels'][0]}: the label of vb[0] is {value}, expected a finite score"


def test_a_label_without_a_time(tmp_path: Path) -> None:
    times = np.array([[0, 2.9], [np.nan, 6]])
    write(tmp_path, labels=dict.fromkeys(VIDEOS, (ENTRIES["labels"][0], times)))
    assert refusal(tmp_path) == f"{NAMES['labels'][0]}: va has the interval [nan, 6.0], expected finite seconds"


def test_rows_without_a_time_are_left_out_and_counted(tmp_path: Path) -> None:
    features, times = ENTRIES["audio"]
    late = times.copy()
    late[3, 1] = np.nan
    dataset = import_dataset("csd", write(tmp_path, audio=dict.fromkeys(VIDEOS, (features, late))))
    assert dataset.splits["test"].features["audio"][1].tolist() == features[2].tolist()
    assert dataset.report["notes"] == ["4 rows of CMU_MOSI_COVAREP.csd begin or end at no finite time: left out"]


@pytest.mark.parametrize("name", ["x.csd", "splits.json", "cmu_mosi_std_folds.py"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_pipes_and_folders_in_place_of_files(tmp_path: Path, name: str, make: Callable[[Path], None]) -> None:
    """A pipe that nobody writes to is waited for for ever."""
    write(tmp_path)
    if name != "x.csd":
        (tmp_path / "splits.json").unlink()
    make(tmp_path / name)
    wanted = (
        "x.csd: not a file, expected a comp" if name == "x.csd" else "splits.json: no such file, expected the video"
    )
    assert refusal(tmp_path).startswith(wanted)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("splits.json", "[" * 200_000, "splits.json: not JSON of the folds, "),
        ("splits.json", json.dumps({"train": [9]})[:-3] + "9" * 5000 + "]}", "splits.json: not JSON of the folds, "),
        (
            "a_std_folds.py",
            "standard_train_fold=" + "[" * 10_000,
            "a_std_folds.py: not a list of folds (too many nested",
        ),
        ("a_std_folds.py", "standard_train_fold=" + "-" * 10_000 + "1", "a_std_folds.py: not a list of folds ("),
        ("a_std_folds.py", "a\0b", "a_std_folds.py: not a list of folds (source code "),
        ("a_std_folds.py", "standard_train_fold=open('x')", "a_std_folds.py: not a list of folds (malformed node"),
    ],
)
def test_folds_that_cannot_be_read(tmp_path: Path, name: str, text: str, message: str) -> None:
    write(tmp_path)
    (tmp_path / "splits.json").unlink()
    (tmp_path / name).write_text(text)
    assert refusal(tmp_path).startswith(message)
