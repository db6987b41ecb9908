"""MFN folders that somebody else made."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from layouts import padded, random_clips, write_mfn

from fastmmkd.data.dataset import SPLITS
from fastmmkd.data.importers import import_dataset
from fastmmkd.errors import UserError
from fastmmkd.modalities import MODALITIES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for name in SPLITS:
        clips = random_clips(rng, 4)
        write_mfn(tmp_path, name, {m: padded(clips, m, 5, "left") for m in MODALITIES}, np.array([-2.0, 0, 1, 2]))
    return tmp_path


def replace(make: Callable[[h5py.File], object]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        with h5py.File(path, "a") as file:
            del file["d1"]
            make(file)

    return change


def put(value: object) -> Callable[[Path], None]:
    return replace(lambda file: file.__setitem__("d1", value))


def in_its_place(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        path.unlink()
        make(path)

    return change


def virtual(file: h5py.File) -> None:
    file.create_virtual_dataset("d1", h5py.VirtualLayout((4, 5, 4), "f8"))


def huge(file: h5py.File) -> None:
    file.create_dataset("d1", (1 << 36, 5, 4), "f8", chunks=(1 << 10, 5, 4))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("audio_train.h5", put(h5py.ExternalLink("y_train.h5", "d1")), "d1 is a link to another place"),
        ("audio_train.h5", put(h5py.SoftLink("/d1")), "d1 is a link to another place"),
        ("audio_train.h5", replace(virtual), "d1 lies in another file"),
        ("audio_train.h5", replace(huge), "d1 is [68719476736, 5, 4], but only parts of it are stored"),
        ("audio_train.h5", put(h5py.Empty("f8")), "d1 holds nothing, expected an array"),
        ("audio_train.h5", put(np.array([b"x"] * 4)), "holds |S1 [4], expected features [N, T, d]"),
        ("audio_train.h5", in_its_place(os.mkfifo), "not a file, expected features of train"),
        ("audio_train.h5", in_its_place(os.mkdir), "not a file, expected features of train"),
        ("y_test.h5", replace(lambda file: file.create_group("d1")), "no data set d1 or data, found d1"),
        ("y_test.h5", put(["a", "b", "c", "d"]), "labels are object [4], expected one number per sample"),
        ("y_test.h5", in_its_place(os.mkfifo), "no such file, expected the labels of test"),
        ("y_test.h5", in_its_place(lambda path: path.write_text("x" * 3000)), "damaged or no HDF5 ("),
    ],
)
def test_what_is_refused(folder: Path, name: str, change: Callable[[Path], None], message: str) -> None:
    change(folder / name)
    with pytest.raises(UserError) as caught:
        import_dataset("mfn", folder)
    assert str(caught.value).startswith(f"{folder / name}: {message}")
    assert "\n" not in str(caught.value)


def test_ids_that_are_a_pipe(folder: Path) -> None:
    os.mkfifo(folder / "ids.json")
    with pytest.raises(UserError, match=r"ids\.json: not a file; expected \{\"train\""):
        import_dataset("mfn", folder)
