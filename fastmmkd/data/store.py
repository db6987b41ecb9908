"""The one on-disk format: an HDF5 file that holds every split of a data set.

Layout (format version 2)::

    /                                   attrs: format = "fastmmkd", version = 2
    /meta                               attrs: source, importer, importer_version, label_kind, label_names (JSON),
                                               label_map, content_hash, hashes (JSON: SHA-256 of every array),
                                               report (JSON: what the importer counted)
    /meta/normalisation/<modality>      mean [d_m], std [d_m] float64, over the training split's present frames
    /<split>/features/<modality>        [R_m, d_m] float16 or float32: the real frames of all samples, packed
    /<split>/lengths                    [N, 3] int32, rows of each sample per modality, 0 exactly where absent
    /<split>/present                    [N, 3] bool, whether the sample has the modality at all
    /<split>/labels                     [N] float32 (score) or [N, 4] float32 in {0, 1} (emotions)
    /<split>/ids                        [N] UTF-8 strings of one width
    /<split>/ideal/<condition>          [N, C] float32, posterior of the label (synthetic data only)
    /meta/ideal_support                 [C] float32, label values (score) or class indices (emotions)

The rows of sample i are those from sum(lengths[:i]) on, in time order; R_m is the sum of all lengths of modality m.
Features are stored raw: NaN and infinities replaced by 0, no normalisation applied. An all-zero row is a missing
frame; `Split.frame_mask` says so.

What is only to be predicted (`write_samples`) may have one split or several of other names, and no labels: `label_kind`
is "" then, and there are no arrays of labels. Without a training split there is no normalisation either.

Version 1 is read too: features `[N, T_m, d_m]`, padded on the left, everything else the same. Its `content_hash` is
over the padded arrays and is reported as it is, so that what was trained on such a file still knows it; written again,
the data get the hash of version 2, which is over the packed rows and so does not depend on T.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np

from fastmmkd.data.checked_hdf5 import array, fixed, in_one_line, member, set_text, strings, text
from fastmmkd.data.dataset import DTYPES, EMOTIONS, SPLITS, Dataset, Split
from fastmmkd.data.integrity import (
    array_hashes,
    content_hash,
    normalisation,
    padded_content_hash,
    require_trainable,
    validate,
    validate_normalisation,
    validate_samples,
)
from fastmmkd.data.packing import blocks, pack
from fastmmkd.errors import UserError
from fastmmkd.files import replacing
from fastmmkd.modalities import CONDITIONS, MODALITIES

__all__ = [
    "EMOTIONS",
    "SPLITS",
    "Dataset",
    "Header",
    "Split",
    "read",
    "read_header",
    "read_samples",
    "write",
    "write_samples",
]

FORMAT = "fastmmkd"
VERSION = 2
IMPORTER_VERSION = 2
"""Raised when an importer turns the same source into another data set than before."""
LIBVER = ("v110", "v110")
"""Of HDF5's file format: the first in which what it says about arrays has checksums."""
CHUNK_BYTES = 256 * 1024
"""Aim for a chunk: always whole rows, at least one."""


def write(dataset: Dataset, path: Path | str, dtype: str = "float32") -> Dataset:
    """Validate a data set, compute its normalisation and hash, and write it as one HDF5 file.

    The file is made in memory, written beside its place, and renamed: it appears under its name only when complete.

    Args:
        dataset: features `[R_m, d_m]` of any float dtype; `normalisation`, `content_hash` and `path` are ignored.
        path: the file to make or replace.
        dtype: `"float32"` or `"float16"` (half the size; every value must fit).

    Returns:
        The data set as `read(path)` gives it: float32 features (rounded through float16 where asked),
        with `normalisation`, `content_hash` and `path` filled in.

    Raises:
        UserError: a shape, id, label or feature breaks the layout, float16 cannot hold the values, or the
            file cannot be written.
    """
    return _write(dataset, Path(path), dtype, validate)


def write_samples(dataset: Dataset, path: Path | str, dtype: str = "float32") -> Dataset:
    """The same of a data set that is only to be predicted: any splits, with labels or without (`label_kind` "")."""
    return _write(dataset, Path(path), dtype, validate_samples)


def _write(dataset: Dataset, path: Path, dtype: str, check: Callable[[Dataset], None]) -> Dataset:
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, expected {' or '.join(DTYPES)}")
    check(dataset)
    stored = replace(dataset, splits={name: _as_stored(name, split, dtype) for name, split in dataset.splits.items()})
    stored.normalisation = normalisation(stored.splits["train"]) if "train" in stored.splits else {}
    hashes = array_hashes(stored)
    stored.content_hash = content_hash(hashes)
    stored.path = path
    image = io.BytesIO()
    with h5py.File(image, "w", libver=LIBVER) as file:
        _write_meta(file, stored, hashes)
        for name, split in stored.splits.items():
            _write_split(file.create_group(name), split, dtype, bool(dataset.label_kind))
    # Not straight to the file: HDF5 ends the process where the disk is full.
    with replacing(path) as part:
        part.write_bytes(image.getbuffer())
    return stored


def read(path: Path | str) -> Dataset:
    """Read a whole store into memory, features as float32, and check all of it against `validate` and its hashes.

    Hashing and checking take about a second per GB of features, reading and unpacking them several.

    Raises:
        UserError: the file is missing, not HDF5, truncated or damaged, another program's HDF5, written by a newer
            version, lacks a part of the layout, breaks it, or does not match its hashes; what is wrong is named by
            split, array and row; or it cannot be trained on, because it lacks a split or labels.
    """
    with _open(Path(path)) as file:
        require_trainable(_splits(file), text(file["meta"], "label_kind"))
        return _read(file, Path(path), validate)


def read_samples(path: Path | str) -> Dataset:
    """The same of a store that need not have labels or more than one split."""
    with _open(Path(path)) as file:
        return _read(file, Path(path), validate_samples)


def _read(file: h5py.File, path: Path, check: Callable[[Dataset], None]) -> Dataset:
    dataset = _read_meta(file)
    dataset.path = path
    version = int(file.attrs["version"])
    for name in _splits(file):
        dataset.splits[name] = _read_split(file, name, dataset.label_kind, version)
    check(dataset)
    validate_normalisation(dataset)
    _verify(file, dataset, version)
    return dataset


@dataclass(frozen=True)
class Header:
    """What a store says about itself without its arrays."""

    content_hash: str
    label_kind: str
    source: str
    importer: str
    samples: dict[str, int]
    """Split -> N."""


def read_header(path: Path | str) -> Header:
    """Read hash, label kind and sizes only (milliseconds, whatever the size). Raises what `read` raises, but for what
    only the arrays' values tell."""
    with _open(Path(path)) as file:
        require_trainable(_splits(file), text(file["meta"], "label_kind"))
        return Header(
            content_hash=text(file["meta"], "content_hash"),
            label_kind=text(file["meta"], "label_kind"),
            source=text(file["meta"], "source"),
            importer=text(file["meta"], "importer"),
            samples={name: len(array(file, f"{name}/ids", ("str",), ("N",))) for name in SPLITS},
        )


def _as_stored(name: str, split: Split, dtype: str) -> Split:
    """The split as it will be read back: float32, after rounding to the file's dtype."""
    return replace(
        split,
        features={m: _rounded(f"{name}/features/{m}", split.features[m], dtype) for m in MODALITIES},
        lengths=split.lengths.astype(np.int32, copy=False),
        labels=split.labels.astype(np.float32, copy=False),
        ideal={condition: p.astype(np.float32, copy=False) for condition, p in split.ideal.items()},
    )


def _rounded(key: str, x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values that `dtype` holds exactly; refuses what would become infinite or vanish."""
    if np.can_cast(x.dtype, dtype):
        return x.astype(np.float32, copy=False)
    rounded, lost = np.empty(x.shape, np.float32), 0
    hint = "; use --dtype float32" if dtype == "float16" else ""
    for rows in blocks(x.shape):
        with np.errstate(over="ignore"):
            rounded[rows] = x[rows].astype(dtype)
        if not np.isfinite(rounded[rows]).all():
            raise UserError(f"{key} reaches {np.abs(x).max():g}, {dtype} ends at {np.finfo(dtype).max:g}{hint}")
        lost += int((x[rows].any(axis=-1) & ~rounded[rows].any(axis=-1)).sum())
    # A frame that underflows to all zero would turn from present to missing.
    if lost:
        raise UserError(f"{key} has {lost} frames too small for {dtype} (they would become zero){hint}")
    return rounded


def _write_meta(file: h5py.File, dataset: Dataset, hashes: Mapping[str, str]) -> None:
    set_text(file, "format", FORMAT)
    file.attrs["version"] = VERSION
    meta = file.create_group("meta")
    meta.attrs["importer_version"] = IMPORTER_VERSION
    texts = {
        "source": dataset.source,
        "importer": dataset.importer,
        "label_kind": dataset.label_kind,
        "label_names": json.dumps(EMOTIONS if dataset.label_kind == "emotions" else ["sentiment"]),
        "label_map": dataset.label_map,
        "content_hash": dataset.content_hash,
        "hashes": json.dumps(hashes),
        "report": json.dumps(dataset.report),
    }
    for key, value in texts.items():
        set_text(meta, key, value)
    for modality, (mean, std) in dataset.normalisation.items():
        group = meta.create_group(f"normalisation/{modality}")
        group["mean"], group["std"] = mean, std
    if dataset.ideal_support is not None:
        meta["ideal_support"] = dataset.ideal_support.astype(np.float32)


def _write_split(group: h5py.Group, split: Split, dtype: str, labelled: bool) -> None:
    for modality in MODALITIES:
        x = split.features[modality].astype(dtype, copy=False)
        rows = min(len(x), max(1, CHUNK_BYTES // (x.shape[1] * x.itemsize)))
        packed = {"chunks": (rows, x.shape[1]), "compression": "gzip", "compression_opts": 1, "shuffle": True}
        # HDF5 has no chunks of nothing.
        group.create_dataset(f"features/{modality}", data=x, **(packed if rows else {}))
    group["lengths"], group["present"] = split.lengths, split.present
    if labelled:
        group["labels"] = split.labels
    group.create_dataset("ids", data=fixed(split.ids), compression="gzip", compression_opts=1, shuffle=True)
    for condition, posterior in split.ideal.items():
        group[f"ideal/{condition}"] = posterior


def _read_meta(file: h5py.File) -> Dataset:
    report = json.loads(text(file["meta"], "report"))
    if not isinstance(report, dict):
        raise UserError(f"attribute report of /meta holds a {type(report).__name__}, expected an object")
    support = None
    if "ideal_support" in file["meta"]:
        support = array(file, "meta/ideal_support", ("float32",), ("C",))[()]
    return Dataset(
        splits={},
        label_kind=text(file["meta"], "label_kind"),
        source=text(file["meta"], "source"),
        importer=text(file["meta"], "importer"),
        label_map=text(file["meta"], "label_map"),
        report=report,
        normalisation={m: (_moment(file, m, "mean"), _moment(file, m, "std")) for m in _scaled(file)},
        ideal_support=support,
        content_hash=text(file["meta"], "content_hash"),
    )


def _splits(file: h5py.File) -> list[str]:
    """Names of the splits: those that training knows first, in its order."""
    found = [name for name in file if name != "meta"]
    return [name for name in SPLITS if name in found] + [name for name in found if name not in SPLITS]


def _scaled(file: h5py.File) -> tuple[str, ...]:
    """The modalities that there is a normalisation of: all, where there is a training split."""
    return MODALITIES if "train" in file else ()


def _parts(file: h5py.File) -> Iterator[str]:
    """What must be there, each where it belongs."""
    yield from (f"meta/normalisation/{m}/{moment}" for m in _scaled(file) for moment in ("mean", "std"))
    labelled = ["labels"] if text(member(file, "meta"), "label_kind") else []
    for name in _splits(file):
        yield from (f"{name}/{key}" for key in ("lengths", "present", "ids", *labelled))
        yield from (f"{name}/features/{m}" for m in MODALITIES)


def _moment(file: h5py.File, modality: str, moment: str) -> np.ndarray:
    return array(file, f"meta/normalisation/{modality}/{moment}", ("float64",), ("d",))[()]


def _read_split(file: h5py.File, name: str, label_kind: str, version: int) -> Split:
    ids = strings(file, f"{name}/ids")
    n = len(ids)
    lengths = array(file, f"{name}/lengths", ("int32",), (n, len(MODALITIES)))[()]
    labels = np.zeros(n, np.float32)
    if label_kind:
        classes = (len(EMOTIONS),) if label_kind == "emotions" else ()
        labels = array(file, f"{name}/labels", ("float32",), (n, *classes))[()]
    return Split(
        features={
            m: _read_features(file, f"{name}/features/{m}", lengths[:, i], version) for i, m in enumerate(MODALITIES)
        },
        lengths=lengths,
        present=array(file, f"{name}/present", ("bool",), (n, len(MODALITIES)))[()],
        labels=labels,
        ids=ids,
        ideal=_read_ideal(file, name, n),
    )


def _read_features(file: h5py.File, key: str, lengths: np.ndarray, version: int) -> np.ndarray:
    """`[R, d]` float32."""
    if version == 1:
        return pack(array(file, key, DTYPES, (len(lengths), "T", "d")), lengths, key, np.float32)
    return array(file, key, DTYPES, (int(lengths.sum()), "d")).astype(np.float32)[()]


def _read_ideal(file: h5py.File, name: str, samples: int) -> dict[str, np.ndarray]:
    if "ideal" not in member(file, name):
        return {}
    conditions = list(member(file, f"{name}/ideal"))
    if unknown := [condition for condition in conditions if condition not in CONDITIONS]:
        raise UserError(f"{name}/ideal holds {unknown[0]!a}, expected {', '.join(CONDITIONS)}")
    return {c: array(file, f"{name}/ideal/{c}", ("float32",), (samples, "C"))[()] for c in conditions}


def _verify(file: h5py.File, dataset: Dataset, version: int) -> None:
    """Raises UserError where what was read does not match the hashes that were stored with it."""
    if version == 1:
        steps = {m: file[f"train/features/{m}"].shape[1] for m in MODALITIES}
        if padded_content_hash(dataset, steps) != dataset.content_hash:
            raise UserError("the contents do not match the stored hash; the file was damaged or edited")
        return
    stored, hashes = json.loads(text(file["meta"], "hashes")), array_hashes(dataset)
    if stored != hashes:
        key = next((key for key in hashes if stored.get(key) != hashes[key]), "an array")
        raise UserError(f"{key} does not match its stored hash; the file was damaged or edited")
    if content_hash(hashes) != dataset.content_hash:
        raise UserError("the stored content hash is not that of the contents; the file was damaged or edited")


@contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    """Open a store and turn every way in which it, or what is read from it, can be wrong into one line."""
    with in_one_line(path):
        if not path.is_file():
            raise UserError(f"{'is a folder' if path.is_dir() else 'no such file'}, expected a fastmmkd HDF5 store")
        if not h5py.is_hdf5(path):
            raise UserError("not an HDF5 file; make a store with `fastmmkd data import`")
        with h5py.File(path, "r") as file:
            _refuse_other_formats(file)
            try:
                for part in _parts(file):
                    member(file, part)
                yield file
            except UserError as error:
                raise UserError(f"{error}; import it again") from error


def _refuse_other_formats(file: h5py.File) -> None:
    declared = file.attrs.get("format")
    if not isinstance(declared, (str, bytes)) or declared not in (FORMAT, FORMAT.encode()):
        raise UserError("an HDF5 file, but not a fastmmkd store; make one with `fastmmkd data import`")
    version = file.attrs.get("version")
    if not isinstance(version, np.integer) or version < 1:
        raise UserError(f"format version {version!a}, expected 1 to {VERSION}; import it again")
    if version > VERSION:
        raise UserError(f"format version {version}, this fastmmkd reads up to {VERSION}; update fastmmkd")
