"""What every store guarantees: a checked layout, a normalisation of the training split, a hash of the contents."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fastmmkd.data.dataset import EMOTIONS, SPLITS, Dataset, Split
from fastmmkd.data.packing import blocks, unpack
from fastmmkd.errors import UserError
from fastmmkd.labels import LABEL_KINDS, SCORE_LIMITS
from fastmmkd.modalities import CONDITIONS, MODALITIES

_SPLIT = re.compile("(?!meta$)[A-Za-z0-9_-]{1,64}")
_ID = re.compile("[^\0\ud800-\udfff]+")
LONGEST_ID = 4096
"""Characters: a store takes as many bytes for every id as the longest of a split has."""
CONTENT = (*(f"features/{m}" for m in MODALITIES), "lengths", "present", "labels", "ids")
"""Arrays of a split that the content hash is over."""


def validate(dataset: Dataset) -> None:
    """Check a data set against the layout in `fastmmkd.data.store`: one that can be trained on.

    Raises:
        UserError: names the first array that breaks it, its shape or value, and what was expected.
    """
    require_trainable(dataset.splits, dataset.label_kind)
    validate_samples(dataset)


def require_trainable(splits: Collection[str], label_kind: str) -> None:
    """Raises UserError where a data set lacks a split or labels, which training and evaluation need."""
    hint = "as it is, `fastmmkd predict` takes it (`data import --format samples`)"
    if tuple(splits) != SPLITS:
        raise UserError(f"data set has the splits {', '.join(splits) or 'none'}, expected {', '.join(SPLITS)}; {hint}")
    if not label_kind:
        raise UserError(f"data set has no labels, expected one of {', '.join(LABEL_KINDS)}; {hint}")


def validate_samples(dataset: Dataset) -> None:
    """Check a data set that need not have labels (`label_kind` "") or more than one split, of any name: what can be
    predicted. Raises what `validate` raises, but for that."""
    names = dataset.splits
    if not names or any(not _SPLIT.fullmatch(name) for name in names):
        raise UserError(
            f"data set has the splits {', '.join(map(ascii, names)) or 'none'}, expected names of letters, digits, _ "
            "and -, and not 'meta'"
        )
    if dataset.label_kind not in ("", *LABEL_KINDS):
        raise UserError(f"label_kind is {dataset.label_kind!r}, expected one of {', '.join(LABEL_KINDS)}")
    for name, split in dataset.splits.items():
        _check_labels(name, split, dataset.label_kind)
        _check_modalities(name, split)
        validate_frames(name, split, dataset.feature_dims)
        if not split.lengths.any():
            raise UserError(f"{name} has no frame of any modality")
        _check_ideal(name, split, dataset.ideal_support)
    _check_ids(dataset)


def validate_frames(name: str, split: Split, widths: Sequence[int]) -> None:
    """Check what a split says of its frames, and that all their features are finite.

    Args:
        name: stands before the array's key in an error message.
        widths: d of language, audio, visual.

    Raises:
        UserError: names the first array that breaks the layout, where it does, and what was expected.
    """
    _check_modalities(name, split)
    _check_presence(name, split)
    for modality, width in zip(MODALITIES, widths, strict=True):
        _check_features(name, split, modality, width)


def validate_normalisation(dataset: Dataset) -> None:
    """Check the statistics that features are scaled by.

    Raises:
        UserError: names the first that is not finite, or a standard deviation that is not positive; or their number
            is not that of the features.
    """
    for modality, width in zip(dataset.normalisation, dataset.feature_dims, strict=False):
        for moment, values in zip(("mean", "std"), dataset.normalisation[modality], strict=True):
            if values.shape != (width,):
                raise UserError(f"meta/normalisation/{modality}/{moment} is {list(values.shape)}, expected [{width}]")
            good = np.isfinite(values) & ((values > 0) | (moment == "mean"))
            if not good.all():
                i = int(np.argmin(good))
                wanted = "a finite number" if moment == "mean" else "a positive number"
                raise UserError(f"meta/normalisation/{modality}/{moment}[{i}] is {values[i]:g}, expected {wanted}")


def array_hashes(dataset: Dataset) -> dict[str, str]:
    """Key of every array in the store -> SHA-256 (hex) over its shape and its values, features as float32.

    They do not depend on compression or container; a float16 store hashes its rounded values.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, split in dataset.splits.items():
        arrays |= {f"{name}/features/{m}": split.features[m] for m in MODALITIES}
        arrays |= {f"{name}/lengths": split.lengths, f"{name}/present": split.present, f"{name}/labels": split.labels}
        arrays[f"{name}/ids"] = np.frombuffer(json.dumps(split.ids).encode(), np.uint8)
        arrays |= {f"{name}/ideal/{condition}": p for condition, p in split.ideal.items()}
    for m, (mean, std) in dataset.normalisation.items():
        arrays |= {f"meta/normalisation/{m}/mean": mean, f"meta/normalisation/{m}/std": std}
    if dataset.ideal_support is not None:
        arrays["meta/ideal_support"] = dataset.ideal_support
    return {key: _array_hash(x) for key, x in arrays.items()}


def _array_hash(x: np.ndarray) -> str:
    digest = hashlib.sha256(str(x.shape).encode())
    dtype = np.dtype(np.float32) if x.dtype == np.float16 else x.dtype
    for part in blocks(x.shape):
        digest.update(np.ascontiguousarray(x[part], dtype.newbyteorder("<")).data)
    return digest.hexdigest()


def content_hash(hashes: Mapping[str, str]) -> str:
    """SHA-256 (hex) over what `array_hashes` says of features, lengths, presence, labels and ids: of what was measured,
    not of what is computed from it."""
    splits = [key.removesuffix("/lengths") for key in hashes if key.endswith("/lengths")]
    keys = [f"{name}/{part}" for name in splits for part in CONTENT]
    return hashlib.sha256("".join(f"{key} {hashes[key]}\n" for key in keys).encode()).hexdigest()


def padded_content_hash(dataset: Dataset, steps: Mapping[str, int]) -> str:
    """The content hash of version 1 of the store: over `[N, T_m, d_m]`, padded on the left to these T_m."""
    digest = hashlib.sha256()
    for name in SPLITS:
        split = dataset.splits[name]
        for i, m in enumerate(MODALITIES):
            x, starts = split.features[m], split.starts(m)
            shape = (len(split), steps[m], x.shape[1])
            digest.update(f"{name}/features/{m}{shape}".encode())
            for samples in blocks(shape):
                rows = x[starts[samples.start] : starts[samples.stop]]
                digest.update(unpack(rows, split.lengths[samples, i], steps[m]).astype("<f4", copy=False).data)
        for key, array in (("lengths", split.lengths), ("present", split.present), ("labels", split.labels)):
            digest.update(f"{name}/{key}{array.shape}".encode())
            digest.update(array.astype({"lengths": "<i4", "present": "u1", "labels": "<f4"}[key]).data)
        digest.update(json.dumps(split.ids).encode())
    return digest.hexdigest()


@dataclass(frozen=True)
class Moments:
    """Statistics of each feature over present frames, `[d]` each."""

    mean: np.ndarray
    std: np.ndarray
    """Population standard deviation."""
    constant: np.ndarray
    """bool, True where the feature has a single value."""


def moments(split: Split, modality: str) -> Moments | None:
    """float64 statistics of a modality over the split's present frames; None if there is no such frame."""
    x, mask = split.features[modality], split.frame_mask(modality)
    width, frames = x.shape[1], int(mask.sum())
    if frames == 0:
        return None
    total, low, high = np.zeros(width), np.full(width, np.inf), np.full(width, -np.inf)
    for rows in _present_rows(x, mask):
        total += rows.sum(0)
        low, high = np.minimum(low, rows.min(0)), np.maximum(high, rows.max(0))
    mean = total / frames
    squares = np.zeros(width)
    for rows in _present_rows(x, mask):
        squares += np.square(rows - mean).sum(0)
    # Not by the std: rounding leaves a constant feature one of about 1e-17.
    return Moments(mean, np.sqrt(squares / frames), low == high)


def normalisation(train: Split) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Modality -> (mean `[d_m]`, std `[d_m]`) in float64 over the split's present frames.

    A constant feature, and every feature of a modality without a present frame, has std 1; without a present
    frame the mean is 0.
    """
    of_modality = {}
    for modality in MODALITIES:
        if (known := moments(train, modality)) is None:
            width = train.features[modality].shape[1]
            of_modality[modality] = np.zeros(width), np.ones(width)
        else:
            # A std that underflows to 0 must not divide either.
            of_modality[modality] = known.mean, np.where(known.constant | (known.std == 0), 1.0, known.std)
    return of_modality


def _present_rows(x: np.ndarray, mask: np.ndarray) -> Iterator[np.ndarray]:
    for rows in blocks(x.shape):
        if len(present := x[rows][mask[rows]]):
            yield present.astype(np.float64)


def _check_labels(name: str, split: Split, kind: str) -> None:
    labels, limit = split.labels, SCORE_LIMITS.get(kind or "score")
    expected = f"[N, {len(EMOTIONS)}]" if limit is None else "[N]"
    if labels.ndim == 0 or len(labels) == 0:
        raise UserError(f"{name} has no samples")
    if labels.shape[1:] != ((len(EMOTIONS),) if limit is None else ()):
        raise UserError(f"{name}/labels are {list(labels.shape)}, expected {expected} for label_kind {kind!r}")
    good = (labels == 0) | (labels == 1) if limit is None else np.abs(labels) <= limit
    if not good.all():
        where = tuple(int(i) for i in np.argwhere(~good)[0])
        wanted = "0 or 1" if limit is None else f"a score in [{-limit:g}, {limit:g}]"
        raise UserError(f"{name}/labels{list(where)} is {labels[where]:g}, expected {wanted}")


def _check_modalities(name: str, split: Split) -> None:
    if set(split.features) != set(MODALITIES):
        raise UserError(f"{name} has features {sorted(split.features)}, expected {', '.join(MODALITIES)}")


def _check_presence(name: str, split: Split) -> None:
    expected = (len(split), len(MODALITIES))
    if split.lengths.shape != expected or not np.issubdtype(split.lengths.dtype, np.integer):
        raise UserError(
            f"{name}/lengths are {split.lengths.dtype} {list(split.lengths.shape)}, expected int {list(expected)}"
        )
    if split.present.shape != expected or split.present.dtype != bool:
        raise UserError(
            f"{name}/present is {split.present.dtype} {list(split.present.shape)}, expected bool {list(expected)}"
        )
    if (wrong := ((split.lengths > 0) != split.present) | (split.lengths < 0)).any():
        i, m = np.argwhere(wrong)[0]
        raise UserError(
            f"{name}/lengths[{i}] gives {MODALITIES[m]} {split.lengths[i, m]} frames although present is "
            f"{bool(split.present[i, m])}; expected 0 exactly where the modality is absent"
        )


def _check_features(name: str, split: Split, modality: str, train_width: int) -> None:
    x, key = split.features[modality], f"{name}/features/{modality}"
    rows = int(split.starts(modality)[-1])
    if x.ndim != 2 or len(x) != rows or x.shape[1] == 0:
        raise UserError(f"{key} is {list(x.shape)}, expected [R, d] with R = {rows}, the sum of its lengths")
    if x.shape[1] != train_width:
        raise UserError(f"{key} is {list(x.shape)}, expected [R, d] = [{rows}, {train_width}] as in train")
    for part in blocks(x.shape):
        if not (finite := np.isfinite(x[part])).all():
            row, d = np.argwhere(~finite)[0] + (part.start, 0)
            starts = split.starts(modality)
            sample = int(np.searchsorted(starts, row, side="right")) - 1
            named = f" (id {split.ids[sample]!a})" if sample < len(split.ids) else ""
            raise UserError(
                f"{key}[{row}, {d}] (sample {sample}, frame {row - starts[sample]}) is {x[row, d]}, expected finite "
                f"values{named}"
            )


def _check_ids(dataset: Dataset) -> None:
    seen: dict[str, str] = {}
    for name, split in dataset.splits.items():
        if len(split.ids) != len(split):
            raise UserError(f"{name} has {len(split.ids)} ids for {len(split)} samples")
        for sample in split.ids:
            if isinstance(sample, str) and len(sample) > LONGEST_ID:
                raise UserError(f"{name}/ids holds one of {len(sample)} characters, expected at most {LONGEST_ID}")
            if not isinstance(sample, str) or not sample or not _ID.fullmatch(sample):
                raise UserError(f"{name}/ids holds {sample!a}, expected a non-empty string without NUL or surrogates")
            if sample in seen:
                raise UserError(f"id {sample!r} occurs in {seen[sample]} and again in {name}, expected unique ids")
            seen[sample] = name


def _check_ideal(name: str, split: Split, support: np.ndarray | None) -> None:
    if split.ideal and support is None:
        raise UserError(f"{name} has an ideal posterior, but ideal_support is missing")
    for condition, posterior in split.ideal.items():
        if condition not in CONDITIONS:
            raise UserError(f"{name}/ideal/{condition} is no condition, expected {', '.join(CONDITIONS)}")
        if support is not None and posterior.shape != (len(split), len(support)):
            raise UserError(
                f"{name}/ideal/{condition} is {list(posterior.shape)}, expected {[len(split), len(support)]}"
            )
        if not ((posterior >= 0) & (posterior <= 1)).all():
            i = int(np.argmin(((posterior >= 0) & (posterior <= 1)).all(axis=1)))
            raise UserError(f"{name}/ideal/{condition}[{i}] is {posterior[i].tolist()}, expected probabilities")
