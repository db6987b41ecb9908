"""Pictures: curves against the ratio of missing frames, and the t-SNE map of joint representations.

Figures are built without pyplot, so nothing here needs a display or touches global state.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.manifold import TSNE

from fastmmkd.evaluation import metrics, tables
from fastmmkd.evaluation.schema import Results
from fastmmkd.files import replacing
from fastmmkd.labels import EMOTIONS
from fastmmkd.tasks import Task

# Okabe and Ito's palette: told apart with every common kind of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

STYLE: dict[Any, Any] = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "figure.constrained_layout.w_pad": 0.12,
    "figure.constrained_layout.h_pad": 0.06,
    "text.parse_math": False,  # names and titles come from users and may hold a "$"
    "savefig.dpi": 150,
}

SCORE_CLASSES = (("negative", "#d62728", "v"), ("neutral", "#2ca02c", "o"), ("positive", "#1f77b4", "^"))
"""Name, colour (the papers' red, green, blue) and marker (so that red and green differ in shape too)."""
EMOTION_CLASSES = tuple(
    (name, colour, marker)
    for name, colour, marker in zip(EMOTIONS, ("#E69F00", "#0072B2", "#D55E00", "#7f7f7f"), "^vso", strict=True)
)

SAMPLES_PER_CLASS = 100
MIN_EMBEDDED = 4
"""t-SNE of fewer points shows nothing."""


def curves(path: Path, results: Results | Sequence[tuple[str, Results]]) -> None:
    """Metrics against the ratio p of missing frames, as PNG.

    One line per run with a band of one standard deviation over its seeds, the floor dashed, and the ideal on complete
    data as a star at p = 0 where it is known. Panels: the headline F1 of scores, and MAE of regressions;
    one F1 per emotion; F1 of the single label.

    Args:
        path: the PNG to write.
        results: one `results.json`, or (name, results) pairs that share their data and kind of labels.

    Raises:
        UserError: the file cannot be written.
    """
    runs = [(results.method, results)] if isinstance(results, Results) else list(results)
    keys = list(dict.fromkeys(key for _, content in runs for key in _curve_keys(Task(content.task))))
    columns = min(2, len(keys))
    rows = -(-len(keys) // columns)
    width = 5.2 * columns if columns > 1 else 6.4
    with rc_context(STYLE):
        figure = Figure(figsize=(width, 3.6 * rows + 0.7), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis, key in zip(axes, keys, strict=True):
            _curve_panel(axis, key, runs)
            _draw_references(axis, key, runs)
        handles, names = axes[0].get_legend_handles_labels()
        data = runs[0][1].data
        title = data if len(data) <= 70 else data[:69] + "…"
        figure.suptitle(title, fontsize=12)
        figure.legend(handles, names, loc="outside lower center", ncols=_legend_columns(names, width))
        save(figure, path)


def embedding(path: Path, representations: np.ndarray, labels: np.ndarray, title: str) -> None:
    """t-SNE map of joint representations, up to 100 samples per class, as PNG; the same input gives the same picture.

    Args:
        path: the PNG to write.
        representations: `[N, D]`, N >= 0; with fewer than 4 samples the picture says so instead of showing a map.
        labels: `[N]` scores (classes negative, neutral, positive: red, green, blue) or `[N, 4]` emotion indicators
            (class: the first that holds).
        title: printed above.

    Raises:
        ValueError: the shapes do not fit each other, or representations hold NaN or infinity.
        UserError: the file cannot be written.
    """
    representations, labels = np.asarray(representations, dtype=np.float64), np.asarray(labels)
    if representations.ndim != 2 or len(representations) != len(labels):
        raise ValueError(f"representations {representations.shape} and labels {labels.shape}, expected [N, D] and [N]")
    if not np.isfinite(representations).all():
        raise ValueError("representations hold NaN or infinity")
    classes, styles = _classes(labels)
    chosen = _choose(classes, len(styles))
    with rc_context({**STYLE, "axes.grid": False, "axes.spines.bottom": False, "axes.spines.left": False}):
        figure = Figure(figsize=(5.6, 5.4), layout="constrained")
        axis = figure.subplots()
        axis.set(xticks=[], yticks=[], title=title)
        if len(chosen) < MIN_EMBEDDED:
            note = f"{len(chosen)} samples: too few for a map"
            axis.text(0.5, 0.5, note, ha="center", va="center", transform=axis.transAxes)
        else:
            points = _tsne(representations[chosen])
            _scatter(axis, points, classes[chosen], styles)
            figure.legend(
                *axis.get_legend_handles_labels(), loc="outside lower center", ncols=len(styles), fontsize=10,
                handletextpad=0.1, columnspacing=1.0,
            )  # fmt: skip
        save(figure, path)


def _curve_keys(task: Task) -> list[str]:
    if task.is_regression:
        return [metrics.primary(task), metrics.error(task)]
    if task.name == "emotions-binary":
        return [f"f1_{emotion}" for emotion in EMOTIONS]
    return [metrics.primary(task)]


def _curve_panel(axis: Axes, key: str, runs: Sequence[tuple[str, Results]]) -> None:
    for i, (name, results) in enumerate(runs):
        if key not in metrics.keys(Task(results.task)):
            continue
        known = [(point.p, point.metrics[key]) for point in results.sweep if key in point.metrics]
        points = [(q, s.mean, s.std or 0.0) for q, s in known if s.mean is not None]
        p, mean, deviation = np.array(points).reshape(-1, 3).T
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        axis.plot(p, mean, color=colour, marker=marker, markersize=5, linewidth=1.8, label=name, zorder=3)
        axis.fill_between(p, mean - deviation, mean + deviation, color=colour, alpha=0.18, linewidth=0)
    axis.set(
        xlabel="ratio p of missing frames",
        title=metrics.title(key) + ("" if metrics.higher_is_better(key) else ", lower is better"),
        xlim=(-0.03, 1.03),
        xticks=np.linspace(0, 1, 6),
    )


def _draw_references(axis: Axes, key: str, runs: Sequence[tuple[str, Results]]) -> None:
    for row in tables.metric_table(key, runs).references:
        value = row.cells[tables.COLUMNS.index("lav")].mean
        if value is not None and row.name.startswith("floor"):
            axis.axhline(value, color="#555555", linestyle="--", linewidth=1.4, label=f"{row.name} (no features)")
        elif value is not None:
            axis.plot(
                0, value, marker="*", markersize=15, color="#F0E442", markeredgecolor="black", linestyle="none",
                label=f"{row.name}, complete data", zorder=2.5, clip_on=False,
            )  # fmt: skip


def _legend_columns(names: Sequence[str], width: float) -> int:
    """As many columns as fit into `width` inches, by the length of the longest name."""
    widest = 0.8 + 0.085 * max(len(name) for name in names)
    return max(1, min(len(names), int(width / widest)))


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
    # The PCA start divides by the spread, which one feature or equal points do not have.
    spread = points.shape[1] > 1 and bool(np.ptp(points, axis=0).any())
    perplexity = min(30.0, (len(points) - 1) / 3)
    model = TSNE(perplexity=perplexity, init="pca" if spread else "random", random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return model.fit_transform(points)


def _scatter(axis: Axes, points: np.ndarray, classes: np.ndarray, styles: Sequence[tuple[str, str, str]]) -> None:
    for i, (name, colour, marker) in enumerate(styles):
        x, y = points[classes == i].T
        axis.scatter(
            x, y, s=34, c=colour, marker=marker, alpha=0.75, edgecolors="white", linewidths=0.5,
            label=f"{name} ({len(x)})",
        )  # fmt: skip


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG.

    Raises:
        UserError: the file cannot be written.
    """
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
