"""What every store guarantees: a checked layout, a normalisation of the training split, a hash of the contents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from fastmmkd.data.dataset import EMOTIONS, SPLITS, Dataset, Split
from fastmmkd.errors import UserError
from fastmmkd.modalities import CONDITIONS, MODALITIES

SCORE_LIMIT = 3.0
"""Sentiment scores lie in [-3, 3]."""
ROWS = 512
"""Samples at a time where a float64 copy of everything would double the memory."""


def validate(dataset: Dataset) -> None:
    """Check a data set against the layout in `fastmmkd.data.store`.

    Raises:
        UserError: names the first array that breaks it, its shape or value, and what was expected.
    """
    if tuple(dataset.splits) != SPLITS:
        raise UserError(f"data set has the splits {', '.join(dataset.splits) or 'none'}, expected {', '.join(SPLITS)}")
    if dataset.label_kind not in ("score", "emotions"):
        raise UserError(f"label_kind is {dataset.label_kind!r}, expected 'score' or 'emotions'")
    for name, split in dataset.splits.items():
        _check_labels(name, split, dataset.label_kind)
        if set(split.features) != set(MODALITIES):
            raise UserError(f"{name} has features {sorted(split.features)}, expected {', '.join(MODALITIES)}")
        _check_presence(name, split)
        for modality in MODALITIES:
            _check_features(name, split, modality, dataset.splits["train"].features[modality].shape)
        _check_ideal(name, split, dataset.ideal_support)
    _check_ids(dataset)


def content_hash(dataset: Dataset) -> str:
    """SHA-256 (hex) over features as float32, lengths, presence, labels and ids, in a fixed order.

    It does not depend on compression or container; a float16 store hashes its rounded values.
    """
    digest = hashlib.sha256()
    for name in SPLITS:
        split = dataset.splits[name]
        arrays = {f"features/{m}": split.features[m].astype("<f4", copy=False) for m in MODALITIES}
        arrays["lengths"] = split.lengths.astype("<i4")
        arrays["present"] = split.present.astype("u1")
        arrays["labels"] = split.labels.astype("<f4")
        for key, array in arrays.items():
            # Names and shapes are hashed too, so that no two different layouts share a byte stream.
            digest.update(f"{name}/{key}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array).data)
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
    width, frames = x.shape[2], int(mask.sum())
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
    found = {}
    for modality in MODALITIES:
        if (known := moments(train, modality)) is None:
            width = train.features[modality].shape[2]
            found[modality] = np.zeros(width), np.ones(width)
        else:
            # A std that underflows to 0 must not divide either.
            found[modality] = known.mean, np.where(known.constant | (known.std == 0), 1.0, known.std)
    return found


def _present_rows(x: np.ndarray, mask: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(x), ROWS):
        rows = x[start : start + ROWS][mask[start : start + ROWS]]
        if len(rows):
            yield rows.astype(np.float64)


def _check_labels(name: str, split: Split, kind: str) -> None:
    labels, expected = split.labels, "[N]" if kind == "score" else f"[N, {len(EMOTIONS)}]"
    if labels.ndim == 0 or len(labels) == 0:
        raise UserError(f"{name} has no samples")
    if labels.shape[1:] != (() if kind == "score" else (len(EMOTIONS),)):
        raise UserError(f"{name}/labels are {list(labels.shape)}, expected {expected} for label_kind {kind!r}")
    good = np.abs(labels) <= SCORE_LIMIT if kind == "score" else (labels == 0) | (labels == 1)
    if not good.all():
        where = tuple(int(i) for i in np.argwhere(~good)[0])
        wanted = "a score in [-3, 3]" if kind == "score" else "0 or 1"
        raise UserError(f"{name}/labels{list(where)} is {labels[where]:g}, expected {wanted}")


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
    if (wrong := (split.lengths > 0) != split.present).any():
        i, m = np.argwhere(wrong)[0]
        raise UserError(
            f"{name}/lengths[{i}] gives {MODALITIES[m]} {split.lengths[i, m]} frames although present is "
            f"{bool(split.present[i, m])}; expected 0 exactly where the modality is absent"
        )


def _check_features(name: str, split: Split, modality: str, train_shape: tuple[int, ...]) -> None:
    x, key = split.features[modality], f"{name}/features/{modality}"
    if x.ndim != 3 or len(x) != len(split) or 0 in x.shape:
        raise UserError(f"{key} is {list(x.shape)}, expected [{len(split)}, T, d]")
    if x.shape[1:] != train_shape[1:]:
        raise UserError(
            f"{key} is {list(x.shape)}, expected [N, T, d] = [N, {train_shape[1]}, {train_shape[2]}] as in train"
        )
    if not np.isfinite(x).all():
        i, t, d = np.argwhere(~np.isfinite(x))[0]
        raise UserError(f"{key}[{i}, {t}, {d}] is {x[i, t, d]}, expected finite values")
    lengths, steps = split.lengths[:, MODALITIES.index(modality)], x.shape[1]
    if (lengths > steps).any():
        i = int(np.argmax(lengths > steps))
        raise UserError(f"{name}/lengths[{i}] gives {modality} {lengths[i]} frames, {key} has {steps}")
    padding = np.arange(steps)[None, :] < steps - lengths[:, None]
    if (stray := padding & (x != 0).any(-1)).any():
        i, t = np.argwhere(stray)[0]
        raise UserError(
            f"{key}[{i}, {t}] is not zero, but lies before the last {lengths[i]} frames; expected left padding"
        )


def _check_ids(dataset: Dataset) -> None:
    seen: dict[str, str] = {}
    for name, split in dataset.splits.items():
        if len(split.ids) != len(split):
            raise UserError(f"{name} has {len(split.ids)} ids for {len(split)} samples")
        for sample in split.ids:
            if not isinstance(sample, str) or not sample or "\0" in sample:
                raise UserError(f"{name}/ids holds {sample!r}, expected a non-empty string without NUL")
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
