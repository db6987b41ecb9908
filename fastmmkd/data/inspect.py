"""`fastmmkd data inspect`: what is in a data set, and what is odd about it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from fastmmkd.data.dataset import EMOTIONS, Dataset, Split
from fastmmkd.data.integrity import moments
from fastmmkd.labels import sims_classes
from fastmmkd.modalities import MODALITIES

QUANTILES = {"min": 0.0, "q25": 0.25, "median": 0.5, "q75": 0.75, "max": 1.0}
BAR_WIDTH = 24
SIMS_CLASS_NAMES = ("to -0.7", "to -0.1", "to 0.1", "to 0.7", "to 1")


def quality(dataset: Dataset) -> dict[str, Any]:
    """The numbers of the report; JSON-able.

    Returns:
        `modalities`: per modality `longest` T_m, frames of the longest sequence of all splits, `features` d_m, over the
        first split's (training's) present frames `constant` (indices of features with a single value) and `scale`
        (`largest_mean` of |mean|, `largest_std`, `smallest_std`, over the others, each `[feature index, value]`; None
        without frames).
        `splits`: per split `samples`; `present` and `nonfinite` per modality; `combinations` such as `{"la": 3}`
        (`"none"` for a sample with nothing); `lengths` per modality, quantiles over the samples that have it (None
        without any); `labels`, a histogram of scores rounded half to even (of CH-SIMS: of its five classes), or of
        emotions that hold (empty where there are no labels);
        `zero_frames` per modality, all-zero frames inside the real part of a sequence, and `real_frames`, the total.

        `nonfinite` is what the importer replaced, in the splits of the source (before any re-split).
    """
    return {
        "modalities": {
            m: _modality_quality(next(iter(dataset.splits.values())), m, longest)
            for m, longest in zip(MODALITIES, dataset.longest, strict=True)
        },
        "splits": {
            name: _split_quality(split, dataset, dataset.report.get("nonfinite", {}).get(name, {}))
            for name, split in dataset.splits.items()
        },
    }


def describe(dataset: Dataset, ascii_only: bool = False) -> RenderableType:
    """The report for people: print it with a `rich.console.Console`, which may know ASCII alone."""
    numbers = quality(dataset)
    return Group(
        _head(dataset),
        _presence_table(numbers),
        _frames_table(numbers),
        *([_label_table(numbers, "#" if ascii_only else "█")] if dataset.label_kind else []),
        _feature_table(numbers),
        *_remarks(dataset, numbers),
    )


def _modality_quality(first: Split, modality: str, longest: int) -> dict[str, Any]:
    width = first.features[modality].shape[1]
    quality: dict[str, Any] = {"longest": longest, "features": width, "constant": [], "scale": None}
    if (known := moments(first, modality)) is None:
        return quality
    quality["constant"] = np.flatnonzero(known.constant).tolist()
    if not known.constant.all():
        size, std = np.abs(known.mean), known.std
        quality["scale"] = {
            "largest_mean": _extreme(size, np.where(known.constant, -1, size).argmax()),
            "largest_std": _extreme(std, np.where(known.constant, -1, std).argmax()),
            "smallest_std": _extreme(std, np.where(known.constant, np.inf, std).argmin()),
        }
    return quality


def _extreme(values: np.ndarray, index: np.intp) -> list[float]:
    return [int(index), float(values[index])]


def _split_quality(split: Split, dataset: Dataset, nonfinite: dict[str, dict[str, int]]) -> dict[str, Any]:
    letters = np.array([modality[0] for modality in MODALITIES])
    combinations = Counter("".join(letters[row]) or "none" for row in split.present)
    real = {m: int(split.lengths[:, i].sum()) for i, m in enumerate(MODALITIES)}
    return {
        "samples": len(split),
        "present": {m: int(split.present[:, i].sum()) for i, m in enumerate(MODALITIES)},
        "combinations": dict(combinations.most_common()),
        "lengths": {m: _quantiles(split.lengths[split.present[:, i], i]) for i, m in enumerate(MODALITIES)},
        "labels": _histogram(split.labels, dataset.label_kind),
        "real_frames": real,
        "zero_frames": {m: real[m] - int(split.frame_mask(m).sum()) for m in MODALITIES},
        "nonfinite": {m: sum(nonfinite.get(m, {}).values()) for m in MODALITIES},
    }


def _quantiles(lengths: np.ndarray) -> dict[str, float] | None:
    return {name: float(np.quantile(lengths, q)) for name, q in QUANTILES.items()} if len(lengths) else None


def _histogram(labels: np.ndarray, kind: str) -> dict[str, int]:
    if not kind:
        return {}
    if kind == "emotions":
        return {emotion: int(labels[:, i].sum()) for i, emotion in enumerate(EMOTIONS)}
    if kind == "sims":
        classes = sims_classes(labels, len(SIMS_CLASS_NAMES))
        return {name: int((classes == i).sum()) for i, name in enumerate(SIMS_CLASS_NAMES)}
    rounded = np.round(labels).astype(int)
    return {f"{score:+d}" if score else "0": int((rounded == score).sum()) for score in range(-3, 4)}


def _head(dataset: Dataset) -> RenderableType:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    rows = {
        "file": str(dataset.path or "not written yet"),
        "source": dataset.source,
        "labels": f"{dataset.label_kind} ({dataset.label_map})" if dataset.label_kind else "none",
        "sequences": "word-aligned: a sample's modalities are of one length" if dataset.aligned else "not aligned",
        "hash": dataset.content_hash or "not computed",
    }
    for key, value in rows.items():
        table.add_row(Text(key, style="bold"), Text(value, overflow="fold"))
    return table


def _table(title: str, columns: list[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", header_style="")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right")
    return table


def _presence_table(numbers: dict[str, Any]) -> Table:
    table = _table("Samples and the modalities they have", ["split", "samples", *MODALITIES, "combinations"])
    table.columns[-1].justify = "left"
    for name, split in numbers["splits"].items():
        combinations = ", ".join(f"{key} {count}" for key, count in split["combinations"].items())
        present = [f"{split['present'][m]}" for m in MODALITIES]
        table.add_row(name, str(split["samples"]), *present, combinations)
    return table


def _frames_table(numbers: dict[str, Any]) -> Table:
    table = _table("Frames", ["split", "modality", *QUANTILES, "zero frames", "share", "NaN or inf in source"])
    for name, split in numbers["splits"].items():
        for m in MODALITIES:
            lengths, real, zero = split["lengths"][m], split["real_frames"][m], split["zero_frames"][m]
            quantiles = [f"{value:g}" for value in lengths.values()] if lengths else ["-"] * len(QUANTILES)
            share = f"{100 * zero / real:.1f} %" if real else "-"
            table.add_row(name, m, *quantiles, str(zero), share, str(split["nonfinite"][m]))
    return table


def _label_table(numbers: dict[str, Any], bar: str) -> Table:
    splits = numbers["splits"]
    first = next(iter(splits))
    table = _table("Labels", ["label", *splits, f"share of {first}"])
    table.columns[-1].justify = "left"
    for label in splits[first]["labels"]:
        counts = [split["labels"][label] for split in splits.values()]
        share = counts[0] / splits[first]["samples"]
        table.add_row(label, *map(str, counts), f"{bar * round(share * BAR_WIDTH)} {100 * share:.1f} %")
    return table


def _feature_table(numbers: dict[str, Any]) -> Table:
    columns = ["modality", "longest", "features", "constant", "largest |mean|", "largest std", "smallest std"]
    first = next(iter(numbers["splits"]))
    table = _table(f"Features over present frames of {first} (feature index: value)", columns)
    for m, quality in numbers["modalities"].items():
        scale = quality["scale"] or {}
        extremes = [f"{scale[key][0]}: {scale[key][1]:.3g}" if key in scale else "-" for key in _SCALES]
        table.add_row(m, str(quality["longest"]), str(quality["features"]), str(len(quality["constant"])), *extremes)
    return table


_SCALES = ("largest_mean", "largest_std", "smallest_std")


def _remarks(dataset: Dataset, numbers: dict[str, Any]) -> list[Text]:
    """What a reader should know before trusting the data, one line each."""
    report = dataset.report
    lines = list(report.get("notes", []))
    for m, quality in numbers["modalities"].items():
        if quality["constant"]:
            lines.append(f"{m} features without variation in training: {', '.join(map(str, quality['constant']))}")
    for name, misfits in report.get("length_misfits", {}).items():
        for m, count in misfits.items():
            lines.append(f"{count} {m} lengths in {name} contradict the data; the zero frames decided")
    if repeated := report.get("ids", {}).get("repeated"):
        lines.append(f"{repeated} repeated ids were renamed, such as {report['ids']['repeated_examples'][0]}")
    if again := report.get("resplit"):
        by_video = " by video" * (again.get("by") == "video")
        lines.append(f"re-split with seed {again['seed']}{by_video}; counts of NaN and inf are of the source's splits")
        if again["videos_in_several_splits"]:
            lines.append(f"{again['videos_in_several_splits']} videos have segments in several splits")
    return [Text(f"! {line}", style="yellow") for line in lines]
