"""Stores that were damaged, edited or made up: one line that says where, or a data set that is valid; nothing else."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastmmkd.data import store
from fastmmkd.data.integrity import array_hashes, content_hash, validate, validate_normalisation
from fastmmkd.data.store import Dataset
from fastmmkd.errors import UserError

Make = Callable[..., Dataset]
Edit = Callable[[h5py.File], None]


@pytest.fixture
def path(make_dataset: Make, tmp_path: Path) -> Path:
    dataset = make_dataset()
    dataset.ideal_support = np.array([-1.0, 1.0], np.float32)
    for split in dataset.splits.values():
        split.ideal = {"la": np.full((len(split), 2), 0.5, np.float32)}
    store.write(dataset, tmp_path / "a.h5")
    return tmp_path / "a.h5"


def edited(path: Path, edit: Edit) -> str:
    """What reading says after a change."""
    with h5py.File(path, "a") as file:
        edit(file)
    with pytest.raises(UserError) as error:
        store.read(path)
    said = str(error.value)
    assert said.startswith(f"{path}: ")
    assert "\n" not in said
    return said.removeprefix(f"{path}: ")


def setting(key: str, at: Any, value: Any) -> Edit:
    def edit(file: h5py.File) -> None:
        file[key][at] = value

    return edit


def replaced(key: str, **made: Any) -> Edit:
    """Another data set under a key, as `create_dataset` makes it."""

    def edit(file: h5py.File) -> None:
        del file[key]
        file.create_dataset(key, **made)

    return edit


def sealed(edit: Edit) -> Edit:
    """With hashes that fit: what a program that does not check would have written."""

    def edit_and_seal(file: h5py.File) -> None:
        edit(file)
        dataset = store._read_meta(file)
        dataset.splits = {name: store._read_split(file, name, dataset.label_kind, 2) for name in store.SPLITS}
        hashes = array_hashes(dataset)
        file["meta"].attrs.update(hashes=json.dumps(hashes), content_hash=content_hash(hashes))

    return edit_and_seal


@pytest.mark.parametrize(
    ("key", "at", "value"),
    [
        ("train/features/language", (0, 0), 0.25),
        ("valid/labels", 0, 0.25),
        ("test/ids", 0, "another"),
        ("meta/normalisation/audio/mean", 0, 0.25),
        ("meta/normalisation/visual/std", 1, 0.25),
        ("test/ideal/la", (0, 0), 0.25),
        ("meta/ideal_support", 0, 0.25),
    ],
)
def test_every_array_is_held_to_its_hash(path: Path, key: str, at: Any, value: Any) -> None:
    said = edited(path, setting(key, at, value))
    assert said == f"{key} does not match its stored hash; the file was damaged or edited; import it again"


@pytest.mark.parametrize("attribute", ["content_hash", "hashes"])
def test_the_hashes_are_held_to_each_other(path: Path, attribute: str) -> None:
    def edit(file: h5py.File) -> None:
        file["meta"].attrs[attribute] = file["meta"].attrs[attribute].replace(b"a", b"b")

    assert edited(path, edit).endswith("; the file was damaged or edited; import it again")


def _shift(file: h5py.File) -> None:
    """The first two samples of training with language: one gives a frame to the other."""
    lengths = file["train/lengths"][()]
    lengths[np.flatnonzero(lengths[:, 0] > 1)[0], 0] -= 1
    lengths[np.flatnonzero(lengths[:, 0] > 0)[-1], 0] += 1
    file["train/lengths"][...] = lengths


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (setting("valid/labels", 2, 100), r"valid/labels\[2\] is 100, expected a score in \[-3, 3\]"),
        (setting("valid/labels", 2, np.nan), r"valid/labels\[2\] is nan, expected a score"),
        (
            setting("train/features/audio", (3, 1), np.inf),
            r"train/features/audio\[3, 1\] \(sample \d, frame \d\) is inf",
        ),
        (setting("test/ids", 1, ""), r"test/ids holds '', expected a non-empty string"),
        (setting("meta/normalisation/audio/std", 1, 0), r"meta/normalisation/audio/std\[1\] is 0, expected a positive"),
        (setting("meta/normalisation/audio/std", 1, -2), r"audio/std\[1\] is -2, expected a positive number"),
        (setting("meta/normalisation/audio/mean", 0, np.nan), r"audio/mean\[0\] is nan, expected a finite number"),
        (setting("test/ideal/la", (4, 0), 1.5), r"test/ideal/la\[4\] is \[1.5, 0.5\], expected probabilities"),
    ],
)
def test_values_are_checked_even_where_the_hashes_fit(path: Path, edit: Edit, message: str) -> None:
    assert re.search(message + ".*; import it again$", edited(path, sealed(edit)))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (setting("valid/lengths", (1, 0), 9), r"valid/features/language is float32 \[\d+, 6\], expected .* \[\d+, d\]"),
        (setting("valid/lengths", (1, 0), -1), r"valid/features/language is float32 \[\d+, 6\], expected"),
        (
            setting("valid/present", (1, 0), False),
            r"valid/lengths\[1\] gives language 4 frames although present is Fal",
        ),
        (_shift, r"train/lengths does not match its stored hash"),
        (
            replaced("test/labels", data=np.zeros(4, np.float32)),
            r"test/labels is float32 \[4\], expected float32 \[5\]",
        ),
        (replaced("test/labels", data=np.zeros(5)), r"test/labels is float64 \[5\], expected float32 \[5\]"),
        (
            replaced("test/labels", data=np.zeros((5, 4), "f4")),
            r"test/labels is float32 \[5, 4\], expected float32 \[5\]",
        ),
        (replaced("test/present", data=np.zeros((5, 3), "u1")), r"test/present is uint8 \[5, 3\], expected bool"),
        (replaced("test/ids", data=np.arange(5)), r"test/ids is int64 \[5\], expected str \[N\]"),
        (replaced("test/labels", dtype="f4", shape=None), r"test/labels is float32 \[\], expected float32 \[5\]"),
        (replaced("test/lengths", data="text"), r"test/lengths is str \[\], expected int32 \[5, 3\]"),
        (replaced("train/features/audio", data=np.zeros((0, 0), "f4")), r"train/features/audio is float32 \[0, 0\]"),
        (
            replaced("meta/normalisation/audio/std", data=np.ones(5)),
            r"audio/std is \[5\], expected \[4\]",
        ),
    ],
)
def test_structure_is_checked(path: Path, edit: Edit, message: str) -> None:
    assert re.search(message, edited(path, edit))


def _attribute(key: str, value: Any) -> Edit:
    def edit(file: h5py.File) -> None:
        file["meta"].attrs[key] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_attribute("source", 5), "attribute source of /meta is int64 [], expected text"),
        (_attribute("label_kind", "stars"), "label_kind is 'stars'"),
        (_attribute("report", "[]"), "attribute report of /meta holds a list, expected an object"),
        (_attribute("report", "{"), "damaged or no HDF5 (JSONDecodeError"),
        (_attribute("report", "[" * 50_000), "damaged or no HDF5 (RecursionError"),
        (_attribute("hashes", "3"), "damaged or no HDF5"),
        (_attribute("label_map", np.bytes_(b"\xff\xfe")), "damaged or no HDF5 (UnicodeDecodeError"),
    ],
)
def test_attributes_are_checked(path: Path, edit: Edit, message: str) -> None:
    assert message in edited(path, edit)


@pytest.mark.parametrize("version", [0, -1, 2.0, "2", [1, 2]])
def test_a_version_that_never_was(path: Path, version: Any) -> None:
    def edit(file: h5py.File) -> None:
        file.attrs["version"] = version

    assert edited(path, edit).startswith("format version ")


def _link(key: str, link: Callable[[h5py.File], Any]) -> Edit:
    def edit(file: h5py.File) -> None:
        del file[key]
        file[key] = link(file)

    return edit


def _raw(file: h5py.File) -> None:
    """Features whose bytes are those of another file."""
    shape = file["test/features/audio"].shape
    del file["test/features/audio"]
    outside = [("/etc/passwd", 0, h5py.h5f.UNLIMITED)]
    file["test/features"].create_dataset("audio", shape=shape, dtype="f4", external=outside)


def _virtual(file: h5py.File) -> None:
    shape = file["test/features/audio"].shape
    del file["test/features/audio"]
    layout = h5py.VirtualLayout(shape=shape, dtype="f4")
    layout[:] = h5py.VirtualSource("/etc/passwd", "x", shape=shape)
    file["test/features"].create_virtual_dataset("audio", layout)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_link("test/labels", lambda _: h5py.ExternalLink("other.h5", "/x")), "test/labels is a link to another place"),
        (_link("test/labels", lambda _: h5py.SoftLink("/test/labels")), "test/labels is a link to another place"),
        (_link("test/features", lambda _: h5py.SoftLink("/test/features")), "test/features/language is a link"),
        (_link("test/ideal", lambda _: h5py.SoftLink("/train/ideal")), "test/ideal is a link to another place"),
        (_link("test/labels", lambda file: file["train"]), "test/labels is a group, expected an array"),
        (_link("test/features", lambda file: file["train/labels"]), "there is no test/features/language"),
        (_raw, "test/features/audio lies in another file"),
        (_virtual, "test/features/audio lies in another file"),
    ],
)
def test_links_lead_nowhere(path: Path, edit: Edit, message: str) -> None:
    assert message in edited(path, edit)


def _huge(shape: tuple[int, ...], chunked: bool) -> Edit:
    def edit(file: h5py.File) -> None:
        for name in store.SPLITS:
            del file[f"{name}/features/audio"], file[f"{name}/lengths"]
            file.create_dataset(f"{name}/features/audio", shape, "f4", chunks=(1000, 4) if chunked else None)
            lengths = np.full((len(file[f"{name}/labels"]), 3), 2**31 - 1, np.int32)
            file[f"{name}/lengths"] = lengths

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        _huge((12 * (2**31 - 1), 4), chunked=False),
        _huge((12 * (2**31 - 1), 4), chunked=True),
        replaced("test/ids", shape=(1 << 40,), dtype=h5py.string_dtype()),
        replaced("test/ids", shape=(1 << 40,), dtype=h5py.string_dtype(), chunks=(10,)),
        replaced("meta/ideal_support", shape=(1 << 40,), dtype="f4"),
        replaced("test/lengths", shape=(5, 3), dtype="i4", maxshape=(None, None), chunks=(1 << 14, 1 << 14)),
    ],
)
def test_small_files_that_claim_to_be_large(path: Path, edit: Edit) -> None:
    started = time.perf_counter()
    edited(path, edit)
    assert time.perf_counter() - started < 10


def test_one_long_text_that_every_sample_points_to(path: Path) -> None:
    with h5py.File(path, "a") as file:
        del file["train/ids"]
        ids = file.create_dataset("train/ids", data=["x" * 100_000] + ["y"] * 20_000, dtype=h5py.string_dtype())
        at, size = ids.id.get_offset(), ids.id.get_storage_size()
    content = bytearray(path.read_bytes())
    content[at : at + size] = content[at : at + size // 20_001] * 20_001
    path.write_bytes(content)
    assert edited(path, lambda file: None).startswith("train/ids are longer than the file")


def test_a_store_that_another_program_writes(path: Path) -> None:
    with path.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # as HDF5 holds what it writes
        with pytest.raises(UserError, match=r"a\.h5: another program is writing to it"):
            store.read(path)


@pytest.mark.parametrize("name", ["a\0b.h5", "x" * 300 + ".h5"])
def test_paths_that_no_file_can_have(tmp_path: Path, name: str) -> None:
    for read in (store.read, store.read_header):
        with pytest.raises(UserError):
            read(tmp_path / name)


def test_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.h5")
    with pytest.raises(UserError, match="no such file, expected"):
        store.read(tmp_path / "a.h5")


KEYS = st.sampled_from(
    [
        "meta",
        "meta/normalisation",
        "meta/normalisation/audio/std",
        "meta/ideal_support",
        "train",
        "train/features",
        "train/features/language",
        "valid/lengths",
        "valid/present",
        "test/labels",
        "test/ids",
        "test/ideal/la",
    ]
)
DTYPES = st.sampled_from(["f2", "f4", "f8", "i1", "i4", "u8", "?", "c8", ">f4", "S3", h5py.string_dtype(), "i4,f4"])
SHAPES = st.one_of(
    st.none(), st.lists(st.sampled_from([0, 1, 2, 3, 5, 7, 12, 1 << 20, 1 << 40]), max_size=3).map(tuple)
)
VALUES = st.one_of(st.integers(-(2**40), 2**40), st.floats(width=32), st.booleans())
TEXTS = st.one_of(
    st.none(), st.integers(-5, 5), st.floats(), st.text(max_size=8), st.binary(max_size=8), st.lists(st.integers(0, 3))
)
ATTRIBUTES = st.sampled_from(
    ["content_hash", "hashes", "label_kind", "label_map", "source", "importer", "report", "format", "version"]
)
EDITS = st.one_of(
    st.tuples(st.just("delete"), KEYS),
    st.tuples(st.just("replace"), KEYS, DTYPES, SHAPES),
    st.tuples(st.just("set"), KEYS, st.integers(0, 200), VALUES),
    st.tuples(st.just("link"), KEYS, st.sampled_from(["soft", "external", "hard"]), KEYS),
    st.tuples(st.just("attribute"), ATTRIBUTES, TEXTS),
)


def _mutate(file: h5py.File, kind: str, *how: Any) -> None:
    match kind, how:
        case "delete", (key,):
            del file[key]
        case "replace", (key, dtype, shape):
            del file[key]
            file.create_dataset(key, data=None, shape=shape, dtype=dtype)
        case "set", (key, at, value) if file[key].size < 1000:  # writing to a huge one would fill the disk
            flat = np.unravel_index(at % file[key].size, file[key].shape)
            file[key][tuple(map(int, flat))] = value
        case "link", (key, link, other):
            target = {"soft": h5py.SoftLink("/" + other), "external": h5py.ExternalLink("b.h5", other)}
            made = file[other] if link == "hard" else target[link]
            del file[key]
            file[key] = made
        case "attribute", (key, value):
            attrs = file.attrs if key in ("format", "version") else file["meta"].attrs
            if value is None:
                del attrs[key]
            else:
                attrs[key] = value


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(EDITS, min_size=1, max_size=3), seal=st.booleans())
def test_mutated_stores_are_refused_in_one_line_or_valid(path: Path, edits: list[tuple], seal: bool) -> None:
    mutated = path.with_name("mutated.h5")
    shutil.copy(path, mutated)
    with h5py.File(mutated, "a") as file:
        for edit in edits:
            with suppress(Exception):  # h5py refuses some by itself
                _mutate(file, *edit)
        if seal:
            with suppress(Exception):  # the arrays cannot be read at all
                sealed(lambda file: None)(file)
    refusals = []
    for read in (store.read_header, store.read):
        try:
            found = read(mutated)
        except UserError as error:
            refusals.append(str(error))
        else:
            if isinstance(found, Dataset):
                validate(found)
                validate_normalisation(found)
    assert all(said.startswith(f"{mutated}: ") and "\n" not in said for said in refusals)
