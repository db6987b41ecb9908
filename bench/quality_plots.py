"""Pictures of results, as PNG under `docs/quality`: every system on one data set, drawn from the records."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import quality
from fastmmkd.evaluation import metrics, tables
from fastmmkd.evaluation.plots import COLOURS, MARKERS, STYLE, save
from fastmmkd.evaluation.report import Run
from fastmmkd.files import make_directory
from fastmmkd.methods import METHODS

FOLDER = Path(__file__).parents[1] / "docs" / "quality"
KEY = "f1_non0"
OWN = tuple(method.title for method in METHODS.values() if not method.compared)
"""Drawn with thick, unbroken lines; the systems that their papers compare with are dashed."""
HUES = (*COLOURS, "#999999", "#882255", "#6B4C11")


def draw_all() -> None:
    """A picture of every data set on which more systems are recorded than the own ones."""
    for data in quality.COMPARISONS:
        runs = quality.runs_on(data)
        if len(runs) > len(OWN):
            draw(path_of(data), runs)


def path_of(data: str) -> Path:
    """The picture of a data set, as configs and records name it."""
    return FOLDER / f"{data}.png"


def draw(path: Path, runs: list[Run]) -> None:
    """Left: every model's average over the incomplete conditions, by system. Right: the systems' means against p."""
    make_directory(path.parent)
    runs = sorted(runs, key=lambda run: run[1].average.metrics[KEY].mean or 0.0)
    order = [*OWN, *(name for name in quality.FULL.values() if name not in OWN)]
    hues = {name: HUES[i] for i, name in enumerate(order) if name in dict(runs)}
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.6), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
        _averages(left, runs, hues)
        _curves(right, runs, hues)
        figure.suptitle(f"{metrics.title(KEY)}, {runs[0][1].data}", fontsize=12)
        save(figure, path)


def _averages(axis: Axes, runs: list[Run], hues: dict[str, str]) -> None:
    for place, (name, results) in enumerate(runs):
        statistic = results.average.metrics[KEY]
        if statistic.mean is None:
            continue
        values = [value for value in statistic.per_seed if value is not None]
        spread = np.linspace(-0.22, 0.22, len(values)) if len(values) > 1 else [0.0]
        axis.plot(values, place + np.asarray(spread), ".", color=hues[name], markersize=5, alpha=0.55, zorder=3)
        axis.errorbar(
            statistic.mean, place, xerr=statistic.std or 0.0, fmt="o" if name in OWN else "D", color=hues[name],
            markersize=7, capsize=3, zorder=4,
        )  # fmt: skip
    axis.set_yticks(range(len(runs)), [name for name, _ in runs])
    axis.set_title("Avg. over the six incomplete conditions: models, mean ± std", fontsize=10)
    for row in tables.metric_table(KEY, runs).references:
        value = row.cells[tables.COLUMNS.index("average")].mean
        if value is not None:
            axis.axvline(value, color="#555555", linestyle="--" if row.name.startswith("floor") else ":", linewidth=1.4)
            axis.text(value, -0.75, f" {row.name.split()[0]}", fontsize=9, color="#555555", va="center")
    axis.set_ylim(-1.1, len(runs) - 0.5)


def _curves(axis: Axes, runs: list[Run], hues: dict[str, str]) -> None:
    for i, name in enumerate(hues):
        points = [(point.p, point.metrics[KEY].mean) for point in dict(runs)[name].sweep if KEY in point.metrics]
        p, mean = np.array([(q, value) for q, value in points if value is not None]).reshape(-1, 2).T
        own = name in OWN
        axis.plot(
            p, mean, color=hues[name], linestyle="-" if own else "--", linewidth=2.4 if own else 1.3,
            marker=MARKERS[i % len(MARKERS)], markersize=5 if own else 4, label=name, zorder=4 if own else 3,
        )  # fmt: skip
    axis.set_title("against the ratio p of missing frames, means", fontsize=10)
    axis.set(xlabel="p", xticks=np.linspace(0, 1, 6))
    axis.legend(fontsize=9, ncols=2, loc="lower left")
