"""Pickles that are not what the importers expect: other kinds of files, bombs, keys of other types, other layouts."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import pickle
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layouts import dump, mmsa_split, mult_split, random_clips

from fastmmkd.cli import main
from fastmmkd.data import store
from fastmmkd.data.importers import import_dataset, restricted_pickle
from fastmmkd.errors import UserError
from fastmmkd.modalities import MODALITIES

STEPS = dict.fromkeys(MODALITIES, 5)
LABELS = {"train": [-2.0, 0.5, 1, 2], "valid": [1.0, -1, 2, 3], "test": [0.0, 1, -2, 3]}


def mmsa() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: mmsa_split(random_clips(rng, 4), labels, name, STEPS) for name, labels in LABELS.items()}


def mult() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {name: mult_split(random_clips(rng, 4), np.array(y)[:, None, None], STEPS) for name, y in LABELS.items()}


def refusal(path: Path, format: str = "mmsa") -> str:
    with pytest.raises(UserError) as caught:
        import_dataset(format, path)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{path}: ")


def nested(levels: int, width: int) -> list[Any]:
    """A few lists that hold each other again and again: `width ** levels` entries."""
    inner: list[Any] = [0] * width
    for _ in range(levels):
        inner = [inner] * width
    return inner


def itself() -> list[Any]:
    around: list[Any] = []
    around.append([around])
    return around


KEYS = ("id", "text", "audio", "text_bert", "regression_labels", "audio_lengths", "raw_text")


class TestBombs:
    """Of a few hundred bytes."""

    @pytest.mark.parametrize("key", KEYS)
    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (nested(25, 10), "refused, its containers hold each other so often that they are far larger than the file"),
            (nested(6, 10), "refused, its containers hold each other so often that they are far larger than the file"),
            (nested(100, 1), "refused, it has containers within containers, more than 32 levels"),
            (itself(), "refused, a container holds itself"),
        ],
    )
    def test_they_are_refused_at_once(self, tmp_path: Path, key: str, value: list[Any], message: str) -> None:
        content = mmsa()
        content["train"][key] = value
        path, start = dump(content, tmp_path / "a.pkl"), time.perf_counter()
        assert refusal(path) == message
        assert time.perf_counter() - start < 5

    def test_in_object_arrays(self, tmp_path: Path) -> None:
        array = np.empty(10, object)
        array[:] = nested(20, 10)
        content = mmsa()
        content["train"]["id"] = array
        assert refusal(dump(content, tmp_path / "a.pkl")).startswith("refused, its containers hold each other so often")

    def test_keys_that_take_for_ever_to_hash(self, tmp_path: Path) -> None:
        """Tuples do not remember their hashes."""
        inner = b")"  # an empty tuple
        for _ in range(60):
            inner += b"2\x86"  # twice the same
        for pickled in (
            b"\x80\x02}" + inner + b"K\x01s.",
            b"\x80\x04\x8f(" + inner + b"\x90.",
            b"\x80\x04(" + inner + b"\x91.",
        ):
            (tmp_path / "a.pkl").write_bytes(pickled)
            start = time.perf_counter()
            assert refusal(tmp_path / "a.pkl").startswith("refused, the pickle asks for a key that is a tuple of cont")
            assert time.perf_counter() - start < 5

    @pytest.mark.parametrize("name", ["str", "int", "list", "tuple", "dict", "float"])
    def test_what_no_plain_container_calls(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "a.pkl").write_bytes(f"cbuiltins\n{name}\n)R.".encode())
        assert refusal(tmp_path / "a.pkl").startswith(
            f"refused, the pickle asks for builtins.{name}; only NumPy arrays"
        )

    @pytest.mark.parametrize("protocol", range(6))
    def test_plain_containers_are_read(self, tmp_path: Path, protocol: int) -> None:
        content = {
            "sets": [{1, "a"}, frozenset([(1, "b")]), set()],
            "bytes": [b"", b"\xff\x00", bytearray(b"x")],
            "numbers": [1, -(2**70), 1.5, 1 + 2j, True, None],
            ("a", 1): {"shared": [[1, 2]] * 3},
        }
        assert restricted_pickle.load(dump(content, tmp_path / "a.pkl", protocol)) == content


def saved_by_torch(legacy: bool) -> bytes:
    file = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def saved_by_numpy(archive: bool) -> bytes:
    file = io.BytesIO()
    (np.savez if archive else np.save)(file, np.zeros(3))
    return file.getvalue()


def hdf5() -> bytes:
    file = io.BytesIO()
    with h5py.File(file, "w") as opened:
        opened["a"] = 1
    return file.getvalue()


EXPECTED = ", expected a pickle (.pkl)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", f"is empty{EXPECTED}"),
        (gzip.compress(b"x", mtime=0), f"compressed by gzip; unpack it first{EXPECTED}"),
        (bz2.compress(b"x"), f"compressed by bzip2; unpack it first{EXPECTED}"),
        (lzma.compress(b"x"), f"compressed by xz; unpack it first{EXPECTED}"),
        (saved_by_torch(legacy=False), "a zip archive, such as NumPy's .npz and torch.save write; what it holds"),
        (saved_by_torch(legacy=True), f"written by torch.save; what it holds is not read{EXPECTED}"),
        (saved_by_numpy(archive=True), "a zip archive, such as NumPy's .npz and torch.save write; what it holds"),
        (saved_by_numpy(archive=False), f"an array of NumPy's (.npy){EXPECTED}"),
        (hdf5(), f"an HDF5 file{EXPECTED}"),
        (b"<!DOCTYPE html>", f"a page of HTML or XML; was the download refused?{EXPECTED}"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS; fetch the file itself (git lfs pull)"),
        (b'{"a": 1}', f"JSON or text{EXPECTED}"),
        (pickle.dumps(mmsa(), 0).replace(b"\n", b"\r\n"), "its line ends were changed in a transfer as text; fetch it"),
        (pickle.dumps(mmsa())[:-50], "not a whole pickle file ("),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "content",
)  # fmt: skip
def test_other_kinds_of_files(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.pkl").write_bytes(content)
    assert refusal(tmp_path / "a.pkl").startswith(message)


def test_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pkl")
    assert refusal(tmp_path / "a.pkl") == f"not a file{EXPECTED}"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("id", 5, "train id is int, expected a list of as many as there are samples"),
        ("id", "abcd", "train id is str, expected a list of as many as there are samples"),
        ("text", 5, "train text is int64 [], expected numbers [N, T, d]"),
        ("text", [[1, 2], [3]], "train text is ragged, expected one array"),
        ("text_bert", [[1, 2], [3]], "train text_bert is ragged, expected one array"),
        ("regression_labels", [[1, 2], [3]], "train regression_labels is ragged, expected one array"),
        ("regression_labels", [10**400] * 4, "train regression_labels are object [4], expected one number per sample"),
        ("audio_lengths", [[1, 2], [3]], "train audio_lengths is ragged, expected one array"),
        ("audio_lengths", [1, 2, np.nan, 3], "train audio_lengths[2] is nan, expected a number of frames"),
        ("audio_lengths", [1, 1e30, 2, 3], "train audio_lengths[1] is 1e+30, expected a number of frames"),
        ("audio", np.zeros((4, 0, 3)), "MMSA a.pkl: train audio is [4, 0, 3], expected [N, T, d]"),
    ],
)
def test_values_of_another_type(tmp_path: Path, key: str, value: object, message: str) -> None:
    content = mmsa()
    content["train"][key] = value
    assert refusal(dump(content, tmp_path / "a.pkl")) == message


def without_labels(content: dict[str, Any]) -> dict[str, Any]:
    return {name: {k: x for k, x in split.items() if "label" not in k} for name, split in content.items()}


def of_the_sdk(content: dict[str, Any]) -> dict[str, Any]:
    labels = {name: {k: y for k, y in split.items() if "labels" in k} for name, split in content.items()}
    return {name: split | {"FACET 4.2": 1} for name, split in labels.items()}


@pytest.mark.parametrize("format", ["mmsa", "mult"])
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda c: list(c.values()), "holds a list, expected a dict of train, valid, test"),
        (lambda c: {name: [] for name in c}, "train is a list, expected a dict of arrays"),
        (lambda c: {"train": c["train"]}, "no split 'valid', found train, expected train, valid, test"),
        (without_labels, "train has no '"),
        (of_the_sdk, "train has no features, found FACET 4.2, "),
    ],
)
def test_other_layouts_say_what_was_found_and_expected(tmp_path: Path, format: str, made: Any, message: str) -> None:
    content = mmsa() if format == "mmsa" else mult()
    said = refusal(dump(made(content), tmp_path / "a.pkl"), format)
    assert said.startswith(message)
    assert "expected " in said


def test_the_middle_split_may_be_called_dev(tmp_path: Path) -> None:
    content = mmsa()
    expected = import_dataset("mmsa", dump(content, tmp_path / "a.pkl")).splits["valid"]
    content["dev"] = content.pop("valid")
    assert import_dataset("mmsa", dump(content, tmp_path / "a.pkl")).splits["valid"].ids == expected.ids


def test_numbers_beyond_single_precision_are_not_called_infinite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = mmsa()
    content["train"]["audio"][0, 0, :3] = 1e300, -1e39, np.inf
    path, out = dump(content, tmp_path / "a.pkl"), tmp_path / "a.h5"
    assert main(["data", "import", "--format", "mmsa", str(path), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert "audio: 1 NaN or infinite values set to 0\n" in text
    assert "audio: 2 values too large for single precision set to 0\n" in text


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a\ud800", "train/ids holds 'a\\ud800', expected a non-empty string without NUL or surrogates"),
        ("a\0", "train/ids holds 'a\\x00', expected a non-empty string without NUL or surrogates"),
        ("x" * 5000, "train/ids holds one of 5000 characters, expected at most 4096"),
    ],
)
def test_names_that_no_store_takes(tmp_path: Path, name: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = mmsa()
    content["train"]["id"][1] = name
    path, out = dump(content, tmp_path / "a.pkl"), tmp_path / "a.h5"
    assert main(["data", "import", "--format", "mmsa", str(path), "--out", str(out)]) == 2
    assert capsys.readouterr().err == f"error: {path}: {message}\n"
    assert not out.exists()


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.binary(max_size=3)
NAMES = st.text(max_size=2)


def test_a_file_whose_name_is_no_utf_8(tmp_path: Path) -> None:
    out = tmp_path / "a\udcff.h5"
    words = ["data", "import", "--format", "mmsa", str(dump(mmsa(), tmp_path / "b\udcff.pkl")), "--out", str(out)]
    assert main(words) == 0
    assert store.read(out).source == "MMSA b\\udcff.pkl"


VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=3) | st.tuples(inner),
    max_leaves=8,
)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(key=st.sampled_from(KEYS), value=VALUES, split=st.sampled_from(["train", "test"]))
def test_whatever_a_key_holds(tmp_path: Path, key: str, value: object, split: str) -> None:
    content = mmsa()
    content[split][key] = value
    with suppress(UserError):
        import_dataset("mmsa", dump(content, tmp_path / "a.pkl"))
