"""Pictures of results: curves against the ratio of missing frames, and confusion matrices.

Figures are built without pyplot, so nothing here needs a display or touches global state.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from fastmmkd.evaluation import metrics, tables
from fastmmkd.evaluation.schema import Confusion, Results
from fastmmkd.files import replacing
from fastmmkd.modalities import CONDITIONS, condition_label
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

STAR = -0.07
"""Where the ideal on complete data stands: beside p = 0, whose points it would cover."""


MOST_IN_ONE_PANEL = 6
"""Runs whose bands can be told apart."""
COLUMNS = 5


def curves(path: Path, results: Results | Sequence[tuple[str, Results]]) -> None:
    """Metrics against the ratio p of missing frames, as PNG.

    One line per run with a band of one standard deviation over its seeds, the floor dashed, and the ideal on complete
    data as a star beside p = 0 where it is known. Panels: the headline F1 of scores, and MAE of regressions;
    one F1 per emotion; F1 of the single label. Of more runs than `MOST_IN_ONE_PANEL` each has panels of its own, with
    the others behind it in grey.

    Args:
        path: the PNG to write.
        results: one `results.json`, or (name, results) pairs that share their data and kind of labels.

    Raises:
        UserError: the file cannot be written.
    """
    runs = [(results.method, results)] if isinstance(results, Results) else list(results)
    keys = list(dict.fromkeys(key for _, content in runs for key in _curve_keys(Task(content.task))))
    if len(runs) > MOST_IN_ONE_PANEL:
        _curves_apart(path, runs, keys)
        return
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
        if any(statistic.std for _, content in runs for point in content.sweep for statistic in point.metrics.values()):
            handles.append(Patch(color="#777777", alpha=0.3, linewidth=0))
            names.append("± standard deviation over seeds")
        figure.suptitle(_shortened(runs[0][1].data), fontsize=12)
        figure.legend(handles, names, loc="outside lower center", ncols=_legend_columns(names, width))
        save(figure, path)


def _curves_apart(path: Path, runs: Sequence[tuple[str, Results]], keys: Sequence[str]) -> None:
    """A panel for every metric and run that has it; the panels of a metric share their axes."""
    having = {key: tables.with_metric(key, runs) for key in keys}
    rows = {key: -(-len(members) // COLUMNS) for key, members in having.items()}
    with rc_context(STYLE):
        figure = Figure(figsize=(3.0 * COLUMNS, 2.5 * sum(rows.values()) + 0.7), layout="constrained")
        grid = figure.add_gridspec(sum(rows.values()), COLUMNS)
        top = 0
        for key, members in having.items():
            first: Axes | None = None
            for i, (name, results) in enumerate(members):
                axis = figure.add_subplot(grid[top + i // COLUMNS, i % COLUMNS], sharex=first, sharey=first)
                first = first or axis
                for other in (content for _, content in members if content is not results):
                    p, mean, _ = _points(other, key)
                    axis.plot(p, mean, color="#c8c8c8", linewidth=1, zorder=2)
                _curve(axis, 0, name, *_points(results, key))
                for row in tables.metric_table(key, [(name, results)]).references:
                    value = row.cells[tables.COLUMNS.index("lav")].mean
                    if value is not None and row.name.startswith("floor"):
                        axis.axhline(value, color="#555555", linestyle="--", linewidth=1.2)
                axis.set_title(_shortened(name, 32), fontsize=11)
                if i % COLUMNS == 0:
                    axis.set_ylabel(metrics.title(key) + ("" if metrics.higher_is_better(key) else "\nlower is better"))
            top += rows[key]
        figure.suptitle(_shortened(runs[0][1].data), fontsize=12)
        figure.supxlabel(
            "ratio p of missing frames; ± standard deviation over seeds; the others in grey, the floor dashed",
            fontsize=11,
        )
        save(figure, path)


def confusion(path: Path, results: Results) -> None:
    """Confusion matrices of every condition as PNG: what share of each true class was decided to be what, all seeds.

    A panel per condition; of the four binary emotions a row of panels each.

    Args:
        path: the PNG to write.
        results: of a version that counts them, with at least one condition that has samples.

    Raises:
        UserError: the file cannot be written.
    """
    keys = metrics.CONFUSED[Task(results.task).name]
    counted = {c: results.conditions[c].confusion for c in CONDITIONS}
    classes = max(len(metrics.confused_classes(key)) for key in keys)
    columns = len(CONDITIONS) if len(keys) > 1 else 4
    rows = len(keys) if len(keys) > 1 else 2
    side = 1.9 if classes < 4 else 2.6
    with rc_context({**STYLE, "axes.grid": False, "axes.spines.top": True, "axes.spines.right": True}):
        figure = Figure(figsize=(side * columns + 1.2, (side + 0.2) * rows + 1.3), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        panels = [(key, condition) for key in keys for condition in CONDITIONS]
        for i, (axis, (key, condition)) in enumerate(zip(axes, panels, strict=False)):
            matrices = counted[condition]
            names = metrics.confused_classes(key) if i % columns == 0 else ()
            _confusion_panel(axis, condition_label(condition), matrices[key] if matrices else None, names)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        for first in range(0, len(axes), columns):
            axes[first].set_ylabel("true")
        seeds = len(results.seeds)
        figure.suptitle(f"{results.method}: {_shortened(results.data)}", fontsize=12)
        classed = f"classes of {metrics.title(keys[0]).removesuffix(' (%)')}" if len(keys) == 1 else "each emotion"
        note = f"decided; {classed}, percent of each true class, {seeds} seed{'s' * (seeds > 1)}"
        figure.supxlabel(note, fontsize=11)
        save(figure, path)


def _confusion_panel(axis: Axes, title: str, matrix: Confusion | None, rows: Sequence[str]) -> None:
    """One matrix; its rows are named where names are given."""
    axis.set_title(title, fontsize=11)
    axis.set(xticks=[], yticks=[])
    if matrix is None:
        axis.text(0.5, 0.5, "no samples", ha="center", va="center", transform=axis.transAxes)
        return
    counts = np.array(matrix.counts, dtype=np.float64)
    total = counts.sum(axis=1, keepdims=True)
    share = np.divide(counts, total, out=np.full_like(counts, np.nan), where=total > 0)
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    small = 7 if len(counts) > 4 else 9
    for (i, j), value in np.ndenumerate(share):
        if np.isfinite(value):
            axis.text(
                j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=small,
                color="white" if value > 0.6 else "black",
            )  # fmt: skip
    ticks = range(len(counts))
    slanted: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if len(counts) < 6 else {}
    axis.set_xticks(ticks, matrix.classes, fontsize=small, **slanted)
    axis.tick_params(length=0)
    if rows:
        axis.set_yticks(ticks, rows, fontsize=small)


def _shortened(text: str, most: int = 70) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _curve_keys(task: Task) -> list[str]:
    if task.is_regression:
        return [metrics.primary(task), metrics.error(task)]
    if task.name == "emotions-binary":
        return list(metrics.of_emotions(task))
    return [metrics.primary(task)]


def _curve_panel(axis: Axes, key: str, runs: Sequence[tuple[str, Results]]) -> None:
    for i, (name, results) in enumerate(runs):
        if key not in metrics.keys(Task(results.task)):
            continue
        _curve(axis, i, name, *_points(results, key))
    axis.set(
        xlabel="ratio p of missing frames",
        title=metrics.title(key) + ("" if metrics.higher_is_better(key) else ", lower is better"),
        xlim=(STAR - 0.03, 1.03),
        xticks=np.linspace(0, 1, 6),
    )


def _points(results: Results, key: str) -> np.ndarray:
    """Ratio, mean and standard deviation of a metric at every point of a sweep, `[3, P]`."""
    known = [(point.p, point.metrics[key]) for point in results.sweep if key in point.metrics]
    return np.array([(p, s.mean, s.std or 0.0) for p, s in known if s.mean is not None]).reshape(-1, 3).T


def _curve(axis: Axes, i: int, name: str, p: np.ndarray, mean: np.ndarray, deviation: np.ndarray) -> None:
    colour, marker = COLOURS[i % len(COLOURS)], MARKERS[(i + i // len(COLOURS)) % len(MARKERS)]
    axis.plot(p, mean, color=colour, marker=marker, markersize=5, linewidth=1.8, label=name, zorder=3)
    axis.fill_between(p, mean - deviation, mean + deviation, color=colour, alpha=0.18, linewidth=0)


def _draw_references(axis: Axes, key: str, runs: Sequence[tuple[str, Results]]) -> None:
    for row in tables.metric_table(key, runs).references:
        value = row.cells[tables.COLUMNS.index("lav")].mean
        if value is not None and row.name.startswith("floor"):
            axis.axhline(value, color="#555555", linestyle="--", linewidth=1.4, label=f"{row.name} (no features)")
        elif value is not None:
            axis.plot(
                STAR, value, marker="*", markersize=15, color="#F0E442", markeredgecolor="black", linestyle="none",
                label=f"{row.name}, complete data", zorder=2.5, clip_on=False,
            )  # fmt: skip


def _legend_columns(names: Sequence[str], width: float) -> int:
    """As many columns as fit into `width` inches, by the length of the longest name."""
    widest = 0.8 + 0.085 * max(len(name) for name in names)
    return max(1, min(len(names), int(width / widest)))


def save(figure: Figure, path: Path) -> None:
    """Write a figure as PNG.

    Raises:
        UserError: the file cannot be written.
    """
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
