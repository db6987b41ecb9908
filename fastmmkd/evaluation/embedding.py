"""The map of joint representations (t-SNE): placed once per run, drawn by itself and beside those of other runs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pydantic import NonNegativeInt, ValidationError, model_validator

from fastmmkd.errors import UserError, first_problem
from fastmmkd.evaluation.plots import STYLE, save
from fastmmkd.evaluation.schema import Block
from fastmmkd.files import read_json, write_text
from fastmmkd.labels import EMOTIONS

SCORE_CLASSES = (("negative", "#d62728", "v"), ("neutral", "#2ca02c", "o"), ("positive", "#1f77b4", "^"))
"""Name, colour (the papers' red, green, blue) and marker (so that red and green differ in shape too)."""
EMOTION_CLASSES = tuple(
    (name, colour, marker)
    for name, colour, marker in zip(EMOTIONS, ("#E69F00", "#0072B2", "#D55E00", "#7f7f7f"), "^vso", strict=True)
)
_STYLES = {tuple(name for name, *_ in styles): styles for styles in (SCORE_CLASSES, EMOTION_CLASSES)}

SAMPLES_PER_CLASS = 100
MIN_EMBEDDED = 4
"""t-SNE of fewer points shows nothing."""
COLUMNS = 3
"""Of panels, where several maps share a figure."""


class Embedding(Block):
    """`embedding.json`: what `embedding.png` shows."""

    version: Literal[1]
    seed: int
    """The model whose representations are mapped."""
    condition: str
    """What the samples kept."""
    classes: list[str]
    chosen: NonNegativeInt
    """Samples that were to be placed; where they are too few, the lists below are empty."""
    samples: list[NonNegativeInt]
    """Row in the test split, and by point:"""
    class_of: list[NonNegativeInt]
    """index into `classes`,"""
    x: list[float]
    y: list[float]
    """where t-SNE has placed it. Only distances between the points of one map mean something."""

    @model_validator(mode="after")
    def consistent(self) -> Embedding:
        if tuple(self.classes) not in _STYLES:
            known = " or ".join(", ".join(names) for names in _STYLES)
            raise ValueError(f"classes are {', '.join(self.classes)}, expected {known}")
        counts = {name: len(getattr(self, name)) for name in ("samples", "class_of", "x", "y")}
        expected = self.chosen if self.chosen >= MIN_EMBEDDED else 0
        if set(counts.values()) != {expected}:
            said = ", ".join(f"{count} {name}" for name, count in counts.items())
            raise ValueError(f"has {said}, expected {expected} of each")
        if self.class_of and max(self.class_of) >= len(self.classes):
            raise ValueError(f"class_of has a {max(self.class_of)}, there are {len(self.classes)} classes")
        return self


def place(representations: np.ndarray, labels: np.ndarray, rows: np.ndarray, seed: int, condition: str) -> Embedding:
    """t-SNE of joint representations, up to 100 samples per class; the same input gives the same map.

    Args:
        representations: `[N, D]`, N >= 0; fewer than 4 samples are not placed.
        labels: `[N]` scores (classes negative, neutral, positive: red, green, blue) or `[N, 4]` emotion indicators
            (class: the first that holds).
        rows: `[N]` int, which samples of the test split they are.
        seed: of the model.
        condition: what the samples kept, in words.

    Raises:
        ValueError: the shapes do not fit each other, or representations hold NaN or infinity.
    """
    representations, labels = np.asarray(representations, dtype=np.float64), np.asarray(labels)
    if representations.ndim != 2 or not len(representations) == len(labels) == len(rows):
        raise ValueError(
            f"representations {representations.shape}, labels {labels.shape} and rows {np.shape(rows)}, expected "
            "[N, D], [N] and [N]"
        )
    if not np.isfinite(representations).all():
        raise ValueError("representations hold NaN or infinity")
    classes, styles = _classes(labels)
    chosen = _choose(classes, len(styles))
    placed = chosen if len(chosen) >= MIN_EMBEDDED else chosen[:0]
    points = _tsne(representations[placed]) if len(placed) else np.zeros((0, 2))
    x, y = np.round(points.astype(np.float64), 4).T.tolist()
    return Embedding(
        version=1,
        seed=seed,
        condition=condition,
        classes=[name for name, *_ in styles],
        chosen=len(chosen),
        samples=np.asarray(rows)[placed].tolist(),
        class_of=classes[placed].tolist(),
        x=x,
        y=y,
    )


def write(path: Path, embedding: Embedding) -> None:
    """Write `embedding.json`.

    Raises:
        UserError: the file cannot be written.
    """
    write_text(path, json.dumps(embedding.model_dump(), allow_nan=False) + "\n")


def read(path: Path) -> Embedding:
    """Read an `embedding.json`.

    Raises:
        UserError: missing, not JSON, or not as `Embedding` says.
    """
    value = read_json(path, "a run's map of representations")
    try:
        return Embedding.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{path}: {first_problem(error)}") from None


def draw(path: Path, maps: Sequence[tuple[str, Embedding]]) -> None:
    """Maps side by side as PNG, a panel each; axes have no scale, as t-SNE's have none.

    Args:
        path: the PNG to write.
        maps: title and map of each panel, all with the same classes; at least one.

    Raises:
        UserError: the file cannot be written.
    """
    columns = min(COLUMNS, len(maps))
    rows = -(-len(maps) // columns)
    size = (5.6, 5.4) if len(maps) == 1 else (4.4 * columns, 4.3 * rows + 0.5)
    with rc_context({**STYLE, "axes.grid": False, "axes.spines.bottom": False, "axes.spines.left": False}):
        figure = Figure(figsize=size, layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis in axes:
            axis.set(xticks=[], yticks=[])
        for axis, (title, embedding) in zip(axes, maps, strict=False):
            _panel(axis, title, embedding)
        drawn = next((axis for axis in axes if axis.collections), None)
        if drawn is not None:
            figure.legend(
                *drawn.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=10,
                handletextpad=0.1, columnspacing=1.0,
            )  # fmt: skip
        save(figure, path)


def _panel(axis: Axes, title: str, embedding: Embedding) -> None:
    axis.set(title=title)
    if not embedding.samples:
        note = f"{embedding.chosen} samples: too few for a map"
        axis.text(0.5, 0.5, note, ha="center", va="center", transform=axis.transAxes)
        return
    x, y, class_of = np.array(embedding.x), np.array(embedding.y), np.array(embedding.class_of)
    for i, (name, colour, marker) in enumerate(_STYLES[tuple(embedding.classes)]):
        of_class = class_of == i
        axis.scatter(
            x[of_class], y[of_class], s=34, c=colour, marker=marker, alpha=0.75, edgecolors="white", linewidths=0.5,
            label=f"{name} ({of_class.sum()})",
        )  # fmt: skip


def _classes(labels: np.ndarray) -> tuple[np.ndarray, tuple[tuple[str, str, str], ...]]:
    if labels.ndim == 2:
        return labels.argmax(axis=1), EMOTION_CLASSES
    return np.sign(labels).astype(np.int64) + 1, SCORE_CLASSES


def _choose(classes: np.ndarray, count: int) -> np.ndarray:
    """Indices of up to `SAMPLES_PER_CLASS` samples of each class, drawn with a fixed seed."""
    generator = np.random.default_rng(0)
    drawn = [generator.permutation(np.flatnonzero(classes == c))[:SAMPLES_PER_CLASS] for c in range(count)]
    return np.sort(np.concatenate(drawn))


def _tsne(points: np.ndarray) -> np.ndarray:
    """`[n, D]` -> `[n, 2]`, n >= 4. The perplexity is 30, or a third of the neighbours where there are fewer."""
    from sklearn.manifold import TSNE  # seconds, which drawing a stored map need not wait for

    largest = float(np.abs(points).max())
    if 0 < largest < 1e-10:  # their squares would be 0 in float32
        points = points / largest
    # The PCA start divides by the spread, which one feature or equal points do not have.
    spread = points.shape[1] > 1 and bool(np.ptp(points, axis=0).any())
    perplexity = min(30.0, (len(points) - 1) / 3)
    model = TSNE(perplexity=perplexity, init="pca" if spread else "random", random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return model.fit_transform(points)
