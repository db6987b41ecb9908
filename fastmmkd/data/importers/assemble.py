"""What every importer does with the arrays it found: clean, detect padding and absence, pack, name, count.

Shape legend: N samples, T_m frames and d_m features of modality m.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fastmmkd.data.importers.array_in_file import ArrayInFile
from fastmmkd.data.importers.padding import Span, given_span, inside, occupied_span, side_counts, union_span
from fastmmkd.data.packing import Sliceable, blocks
from fastmmkd.data.store import Dataset, Split
from fastmmkd.errors import UserError
from fastmmkd.modalities import MODALITIES

COUNTED = ("nonfinite", "absent", "padding", "length_misfits")
"""What the report counts per split, and in it per modality (padding of an aligned set: for all, as `shared`)."""


@dataclass
class RawSplit:
    """One split as a source gives it. `assemble` takes its features out one by one, so that they can be freed."""

    features: dict[str, Sliceable]
    """Modality -> `[N, T_m, d_m]` of any number dtype, padded on any side; a modality the split lacks has no key."""
    labels: np.ndarray
    """`[N]` scores or `[N, 4]` emotions, already in the store's order and scale."""
    ids: Sequence[str] | None = None
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    """Modality -> `[N]` lengths that the source gives; they are believed where they leave only zeros outside."""
    tokens: np.ndarray | None = None
    """`[N, T_language]` token mask of the language sequence, where the source has one; frames outside are not real."""


def assemble(
    raw: Mapping[str, RawSplit], *, source: str, importer: str, label_kind: str = "score", label_map: str = "identity"
) -> Dataset:
    """Turn the splits of a source into a data set of the store's layout.

    Padding: a modality's frames are real from its first to its last frame that is not all zero, or as `lengths` or
    `tokens` say. In an aligned set (one T for all modalities, no lengths) the present modalities of a sample share
    the smallest span that covers all of theirs, so that a zero frame inside or at the end of one modality is a missing
    frame. A modality that is all zero in a sample, or that its split lacks, is absent (length 0).

    NaN and infinities become 0, repeated ids get a suffix, missing ids are made; all of it is counted in `report`.

    Raises:
        UserError: arrays disagree in their number of samples or, between splits, in T or d; no modality exists at all,
            or no sample has a frame.
    """
    shapes = _common_shapes(raw, source)
    # Lengths of its own for one modality say that the modalities have different time axes.
    aligned = len({shape[0] for shape in shapes.values()}) == 1 and not any(split.lengths for split in raw.values())
    notes = _notes(raw, shapes)
    report: dict[str, Any] = {"aligned": aligned, **{key: {} for key in COUNTED}}
    splits = {}
    for name in raw:
        counted: dict[str, dict[str, Any]] = {key: {} for key in COUNTED}
        splits[name] = _assemble_split(raw[name], shapes, aligned, counted)
        for key in COUNTED:
            report[key][name] = counted[key]
    if not any(split.lengths.any() for split in splits.values()):
        raise UserError(f"{source}: no sample has a frame of any modality, every feature is zero")
    report["ids"] = _name_samples(raw, splits)
    report["notes"] = notes
    return Dataset(
        splits=splits, label_kind=label_kind, source=source, importer=importer, label_map=label_map, report=report
    )


def _notes(raw: Mapping[str, RawSplit], shapes: Mapping[str, Any]) -> list[str]:
    nowhere = [f"the source has no {modality} at all" for modality in MODALITIES if modality not in shapes]
    return nowhere + [
        f"the source's {name} split has no {modality}"
        for name in raw
        for modality in shapes
        if modality not in raw[name].features
    ]


def _common_shapes(raw: Mapping[str, RawSplit], source: str) -> dict[str, tuple[int, int]]:
    """Modality -> (T_m, d_m), the same in every split that has it."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, split in raw.items():
        if len(split.labels) == 0:
            raise UserError(f"{source}: {name} has no samples")
        if split.ids is not None and len(split.ids) != len(split.labels):
            raise UserError(f"{source}: {name} has {len(split.ids)} ids for {len(split.labels)} labels")
        for modality, x in split.features.items():
            if len(x.shape) != 3 or 0 in x.shape[1:]:
                raise UserError(f"{source}: {name} {modality} is {list(x.shape)}, expected [N, T, d]")
            if x.shape[0] != len(split.labels):
                raise UserError(f"{source}: {name} {modality} has {x.shape[0]} samples, its labels {len(split.labels)}")
            if shapes.setdefault(modality, (x.shape[1], x.shape[2])) != x.shape[1:]:
                raise UserError(
                    f"{source}: {name} {modality} is {list(x.shape)}, expected [N, {shapes[modality][0]}, "
                    f"{shapes[modality][1]}] as in the other splits"
                )
    if not shapes:
        raise UserError(f"{source}: has none of the modalities {', '.join(MODALITIES)}")
    return shapes


def _assemble_split(
    split: RawSplit, shapes: dict[str, tuple[int, int]], aligned: bool, counted: dict[str, dict[str, Any]]
) -> Split:
    samples = len(split.labels)
    spans: dict[str, Span] = {}
    present = np.zeros((samples, len(MODALITIES)), bool)
    for m, modality in enumerate(MODALITIES):
        if modality not in split.features:
            counted["absent"][modality] = samples
            continue
        occupied, counts = _occupied(split, modality)
        if counts:
            counted["nonfinite"][modality] = counts
        present[:, m] = occupied.any(1)
        if absent := int((~present[:, m]).sum()):
            counted["absent"][modality] = absent
        spans[modality] = _own_span(split, modality, occupied, counted["length_misfits"])
    spans = {m: _emptied(span, present[:, MODALITIES.index(m)]) for m, span in spans.items()}
    if aligned and spans:
        shared = union_span(list(spans.values()))
        counted["padding"]["shared"] = side_counts(shared, next(iter(shapes.values()))[0])
        spans = {m: _emptied(shared, present[:, MODALITIES.index(m)]) for m in spans}
    features: dict[str, np.ndarray] = {}
    lengths = np.zeros((samples, len(MODALITIES)), np.int32)
    for m, modality in enumerate(MODALITIES):
        if modality not in spans:
            features[modality] = np.zeros((0, shapes.get(modality, (1, 1))[1]), np.float32)
            continue
        span = spans[modality]
        if not aligned:
            counted["padding"][modality] = side_counts(span, shapes[modality][0])
        lengths[:, m] = span[1] - span[0]
        features[modality] = _packed(split, modality, span)
        del split.features[modality]
    return Split(features=features, lengths=lengths, present=present, labels=split.labels.astype(np.float32), ids=[])


def _occupied(split: RawSplit, modality: str) -> tuple[np.ndarray, dict[str, int]]:
    """`[N, T]` bool, True where a frame is not all zero once it is clean; and what `finite_float32` counted."""
    x, spoken = split.features[modality], _spoken(split, modality)
    occupied, counts = spoken.copy(), Counter[str]()
    for samples in blocks(x.shape):
        block, replaced = finite_float32(x[samples])
        occupied[samples] &= block.any(-1)
        counts.update(replaced)
    return occupied, dict(counts)


def _packed(split: RawSplit, modality: str, span: Span) -> np.ndarray:
    """`[R, d]` float32: the clean frames in the span of each sample."""
    x, spoken = split.features[modality], _spoken(split, modality)
    real = inside(span, x.shape[1])
    packed = np.empty((int(real.sum()), x.shape[2]), np.float32)
    stop = 0
    for samples in blocks(x.shape):
        frames, _ = finite_float32(x[samples][real[samples]])
        start, stop = stop, stop + len(frames)
        frames[~spoken[samples][real[samples]]] = 0
        packed[start:stop] = frames
    return packed


def _spoken(split: RawSplit, modality: str) -> np.ndarray:
    """`[N, T]` bool, False where the token mask says padding: BERT gives padding tokens a vector too."""
    if modality == "language" and split.tokens is not None:
        return split.tokens | ~split.tokens.any(1, keepdims=True)
    return np.ones(split.features[modality].shape[:2], bool)


def _own_span(split: RawSplit, modality: str, occupied: np.ndarray, misfits: dict[str, Any]) -> Span:
    if modality == "language" and split.tokens is not None:
        start, stop = occupied_span(occupied)
        first, last = occupied_span(split.tokens)
        none = last == first  # a mask without tokens says nothing
        return np.where(none, start, first), np.where(none, stop, last)
    if modality in split.lengths:
        span, misfit = given_span(occupied, split.lengths[modality])
        if count := int((misfit & occupied.any(1)).sum()):
            misfits[modality] = count
        return span
    return occupied_span(occupied)


def _emptied(span: Span, present: np.ndarray) -> Span:
    return np.where(present, span[0], 0), np.where(present, span[1], 0)


def finite_float32(x: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """`x` as float32 with what is not finite replaced by 0 (`x` itself where that changes nothing), and their numbers:
    keys `nan`, `inf`, and `beyond` for numbers that float32 does not reach; absent when 0."""
    wide = x
    with np.errstate(over="ignore"):
        x = wide.astype(np.float32, copy=False)
    if (finite := np.isfinite(x)).all():
        return x, {}
    nan, beyond = int(np.isnan(x).sum()), int((~finite & np.isfinite(wide)).sum())
    counts = {"nan": nan, "inf": int((~finite).sum()) - nan - beyond, "beyond": beyond}
    return np.where(finite, x, np.float32(0)), {kind: count for kind, count in counts.items() if count}


def _name_samples(raw: Mapping[str, RawSplit], splits: Mapping[str, Split]) -> dict[str, Any]:
    """Fill in ids, unique over all splits; say which were made or renamed."""
    taken: set[str] = set()
    repeats: Counter[str] = Counter()
    generated = []
    for name, split in splits.items():
        ids = raw[name].ids
        if ids is None:
            generated.append(name)
            ids = [f"{name}-{i:05d}" for i in range(len(split))]
        for wanted in ids:
            unique = wanted
            while unique in taken:
                repeats[wanted] += 1
                unique = f"{wanted}#{repeats[wanted] + 1}"
            taken.add(unique)
            split.ids.append(unique)
    return {"generated": generated, "repeated": repeats.total(), "repeated_examples": sorted(repeats)[:5]}


def require_scores(labels: np.ndarray, where: str) -> np.ndarray:
    """`[N]`, `[N, 1]` or `[N, 1, 1]` numbers -> `[N]` float64; all finite, N >= 1.

    Raises:
        UserError: another shape or dtype, no label, or one that is not finite.
    """
    labels = plain_array(labels, where)
    if labels.size == 0 or labels.ndim == 0 or labels.size != len(labels) or labels.dtype.kind not in "iuf":
        raise UserError(f"{where} are {labels.dtype} {list(labels.shape)}, expected one number per sample")
    labels = labels.reshape(-1).astype(np.float64)
    if not np.isfinite(labels).all():
        raise UserError(f"{where}[{int(np.argmin(np.isfinite(labels)))}] is not finite, expected a score")
    return labels


def numeric(x: object, where: str) -> Sliceable:
    """An array of numbers, whatever holds them; one that is still in its file stays there.

    Raises:
        UserError: ragged, empty or not numbers.
    """
    array = x if isinstance(x, ArrayInFile) else plain_array(x, where)
    if array.dtype.kind not in "iuf" or not array.shape:
        raise UserError(f"{where} is {array.dtype} {list(array.shape)}, expected numbers [N, T, d]")
    return array


def plain_array(x: object, where: str) -> np.ndarray:
    """What `np.asarray` makes of it.

    Raises:
        UserError: ragged.
    """
    try:
        return np.asarray(x)
    except (ValueError, OverflowError):
        raise UserError(f"{where} is ragged, expected one array") from None


def text_ids(ids: object, where: str) -> list[str]:
    """Ids of any spelling as text: bytes are decoded, the parts of a tuple or row joined with `_`.

    Raises:
        UserError: no list, tuple or array.
    """
    if isinstance(ids, ArrayInFile):
        ids = np.asarray(ids)
    if not isinstance(ids, (list, tuple, np.ndarray)) or (isinstance(ids, np.ndarray) and not ids.ndim):
        raise UserError(f"{where} is {type(ids).__name__}, expected a list of as many as there are samples")
    return [_as_text(entry) for entry in ids]


def _as_text(entry: object) -> str:
    if isinstance(entry, bytes):
        return entry.decode("utf-8", "replace")
    if isinstance(entry, np.ndarray) and not entry.ndim:
        return _as_text(entry[()])
    if isinstance(entry, (list, tuple, np.ndarray)):
        return "_".join(_as_text(part) for part in entry)
    return str(entry)
