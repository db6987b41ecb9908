"""The one on-disk format: an HDF5 file that holds every split of a data set.

Layout (format version 1)::

    /                                   attrs: format = "fastmmkd", version = 1
    /meta                               attrs: source, importer, importer_version, label_kind, label_names (JSON),
                                               label_map, content_hash, report (JSON: what the importer counted)
    /meta/normalisation/<modality>      mean [d_m], std [d_m] float64, over the training split's present frames
    /<split>/features/<modality>        [N, T_m, d_m] float16 or float32, left-padded, chunks of whole samples
    /<split>/lengths                    [N, 3] int32, real frames (present or missing) per modality, 0 where absent
    /<split>/present                    [N, 3] bool, whether the sample has the modality at all
    /<split>/labels                     [N] float32 (score) or [N, 4] float32 in {0, 1} (emotions)
    /<split>/ids                        [N] UTF-8 strings
    /<split>/ideal/<condition>          [N, C] float32, posterior of the label (synthetic data only)
    /meta/ideal_support                 [C] float32, label values (score) or class indices (emotions)

Features are stored raw: NaN and infinities replaced by 0, no normalisation applied. An all-zero frame inside the
real part of a sequence is a missing frame; `Split.frame_mask` says so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import h5py
import numpy as np

from fastmmkd.data.dataset import DTYPES, EMOTIONS, SPLITS, Dataset, Split
from fastmmkd.data.integrity import content_hash, normalisation, validate
from fastmmkd.errors import UserError
from fastmmkd.files import replacing
from fastmmkd.modalities import MODALITIES

__all__ = ["EMOTIONS", "SPLITS", "Dataset", "Header", "Split", "content_hash", "read", "read_header", "write"]

FORMAT = "fastmmkd"
VERSION = 1
IMPORTER_VERSION = 1
"""Raised when an importer turns the same source into another data set than before."""
CHUNK_BYTES = 256 * 1024
"""Aim for a chunk: always whole samples, at least one."""
_PARTS = (
    "meta",
    *(f"meta/normalisation/{m}/{moment}" for m in MODALITIES for moment in ("mean", "std")),
    *(f"{name}/{key}" for name in SPLITS for key in ("lengths", "present", "labels", "ids")),
    *(f"{name}/features/{m}" for name in SPLITS for m in MODALITIES),
)


def write(dataset: Dataset, path: Path | str, dtype: str = "float32") -> Dataset:
    """Validate a data set, compute its normalisation and hash, and write it as one HDF5 file.

    The file appears under its name only when complete: it is written beside it and renamed.

    Args:
        dataset: features `[N, T_m, d_m]` of any float dtype; `normalisation`, `content_hash` and `path` are ignored.
        path: the file to make or replace; its folder is made where it is missing.
        dtype: `"float32"` or `"float16"` (half the size; every value must fit).

    Returns:
        The data set as `read(path)` gives it: float32 features (rounded through float16 where asked),
        with `normalisation`, `content_hash` and `path` filled in.

    Raises:
        UserError: a shape, id, label or feature breaks the layout, float16 cannot hold the values, or the
            file cannot be written.
    """
    path = Path(path)
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}, expected {' or '.join(DTYPES)}")
    validate(dataset)
    stored = replace(dataset, splits={name: _as_stored(name, split, dtype) for name, split in dataset.splits.items()})
    stored.normalisation = normalisation(stored.splits["train"])
    stored.content_hash = content_hash(stored)
    stored.path = path
    try:
        with replacing(path) as part, h5py.File(part, "w") as file:
            _write_meta(file, stored)
            for name, split in stored.splits.items():
                _write_split(file.create_group(name), split, dtype)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
    return stored


def read(path: Path | str, verify: bool = False) -> Dataset:
    """Read a whole store into memory, features as float32.

    Args:
        path: a file that `write` made.
        verify: also recompute the content hash (about a second per GB) and compare it with the stored one.

    Raises:
        UserError: the file is missing, not HDF5, truncated or damaged, another program's HDF5, written by a newer
            version, lacks a part of the layout, or (with `verify`) does not match its hash.
    """
    path = Path(path)
    with _open(path) as file:
        dataset = _read_meta(file)
        dataset.splits = {name: _read_split(file[name]) for name in SPLITS}
    dataset.path = path
    if verify and content_hash(dataset) != dataset.content_hash:
        raise UserError(f"{path}: the contents do not match the stored hash; the file was damaged or edited")
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
    shapes: dict[str, tuple[int, int]]
    """Modality -> (T_m, d_m)."""


def read_header(path: Path | str) -> Header:
    """Read hash, label kind and sizes only (milliseconds, whatever the size). Raises what `read` raises."""
    with _open(Path(path)) as file:
        attrs, features = file["meta"].attrs, file["train/features"]
        return Header(
            content_hash=attrs["content_hash"],
            label_kind=attrs["label_kind"],
            source=attrs["source"],
            importer=attrs["importer"],
            samples={name: len(file[name]["labels"]) for name in SPLITS},
            shapes={modality: features[modality].shape[1:] for modality in MODALITIES},
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
    with np.errstate(over="ignore"):
        rounded = x.astype(dtype).astype(np.float32)
    hint = "; use --dtype float32" if dtype == "float16" else ""
    if not np.isfinite(rounded).all():
        raise UserError(f"{key} reaches {np.abs(x).max():g}, {dtype} ends at {np.finfo(dtype).max:g}{hint}")
    # A frame that underflows to all zero would turn from present to missing.
    if lost := int(((x != 0).any(-1) & ~(rounded != 0).any(-1)).sum()):
        raise UserError(f"{key} has {lost} frames too small for {dtype} (they would become zero){hint}")
    return rounded


def _write_meta(file: h5py.File, dataset: Dataset) -> None:
    file.attrs.update(format=FORMAT, version=VERSION)
    meta = file.create_group("meta")
    meta.attrs.update(
        source=dataset.source,
        importer=dataset.importer,
        importer_version=IMPORTER_VERSION,
        label_kind=dataset.label_kind,
        label_names=json.dumps(list(EMOTIONS) if dataset.label_kind == "emotions" else ["sentiment"]),
        label_map=dataset.label_map,
        content_hash=dataset.content_hash,
        report=json.dumps(dataset.report),
    )
    for modality, (mean, std) in dataset.normalisation.items():
        group = meta.create_group(f"normalisation/{modality}")
        group["mean"], group["std"] = mean, std
    if dataset.ideal_support is not None:
        meta["ideal_support"] = dataset.ideal_support.astype(np.float32)


def _write_split(group: h5py.Group, split: Split, dtype: str) -> None:
    for modality in MODALITIES:
        x = split.features[modality]
        samples = max(1, min(len(x), CHUNK_BYTES // max(1, x[0].nbytes)))
        group.create_dataset(
            f"features/{modality}",
            data=x.astype(dtype, copy=False),
            chunks=(samples, *x.shape[1:]),
            compression="gzip",
            compression_opts=1,
            shuffle=True,
        )
    group["lengths"], group["present"], group["labels"] = split.lengths, split.present, split.labels
    group.create_dataset("ids", data=split.ids, dtype=h5py.string_dtype())
    for condition, posterior in split.ideal.items():
        group[f"ideal/{condition}"] = posterior


def _read_meta(file: h5py.File) -> Dataset:
    meta = file["meta"]
    return Dataset(
        splits={},
        label_kind=meta.attrs["label_kind"],
        source=meta.attrs["source"],
        importer=meta.attrs["importer"],
        label_map=meta.attrs["label_map"],
        report=json.loads(meta.attrs["report"]),
        normalisation={
            m: (meta[f"normalisation/{m}/mean"][()], meta[f"normalisation/{m}/std"][()]) for m in MODALITIES
        },
        ideal_support=meta["ideal_support"][()] if "ideal_support" in meta else None,
        content_hash=meta.attrs["content_hash"],
    )


def _read_split(group: h5py.Group) -> Split:
    return Split(
        features={m: group[f"features/{m}"].astype(np.float32)[()] for m in MODALITIES},
        lengths=group["lengths"][()],
        present=group["present"][()],
        labels=group["labels"][()],
        ids=group["ids"].asstr()[()].tolist(),
        ideal={condition: p[()] for condition, p in group.get("ideal", {}).items()},
    )


@contextmanager
def _open(path: Path) -> Iterator[h5py.File]:
    """Open a store and turn every way in which it can be wrong into one line."""
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}, expected a fastmmkd HDF5 store")
    try:
        if not h5py.is_hdf5(path):
            raise UserError(f"{path}: not an HDF5 file; make a store with `fastmmkd data import`")
        with h5py.File(path, "r") as file:
            if file.attrs.get("format") != FORMAT:
                raise UserError(f"{path}: an HDF5 file, but not a fastmmkd store; make one with `fastmmkd data import`")
            if (version := int(file.attrs["version"])) > VERSION:
                raise UserError(
                    f"{path}: format version {version}, this fastmmkd reads up to {VERSION}; update fastmmkd"
                )
            if missing := next((part for part in _PARTS if part not in file), None):
                raise UserError(f"{path}: the store has no {missing}; import it again")
            yield file
    except KeyError as error:  # an attribute
        raise UserError(f"{path}: a part of the store is missing ({error.args[0]})") from error
    except OSError as error:
        reason = "truncated" if "truncated" in str(error) else f"damaged or unreadable ({error})"
        raise UserError(f"{path}: {reason}; copy or import it again") from error
