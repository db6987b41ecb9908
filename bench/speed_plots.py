"""Pictures of speed, as PNG under `docs/speed`: the cost of a step along an axis, and a step's stages by contender."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import records
from fastmmkd.evaluation.plots import COLOURS, MARKERS, STYLE, save
from fastmmkd.files import make_directory

FOLDER = Path(__file__).parents[1] / "docs" / "speed"

Record = dict[str, Any]


def draw_all() -> None:
    """Every picture of the newest records."""
    newest = records.newest()
    for (kind, _), record in newest.items():
        if kind.startswith("scaling_"):
            write(record, scaling)
        if kind.startswith("train_step_") and record["variants"]:
            write(record, stages)


def path_of(record: Record) -> Path:
    """The picture of a record."""
    return FOLDER / f"{record['kind']}_{records.slug(record['device'])}.png"


def write(record: Record, draw: Any) -> None:
    """Draw one panel and save it."""
    make_directory(FOLDER)
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.2), layout="constrained")
        draw(figure.subplots(), record)
        figure.suptitle(f"{record['config']}, {records.described(record)}", fontsize=9)
        save(figure, path_of(record))


def scaling(axis: Axes, record: Record) -> None:
    """Milliseconds against the axis, both logarithmic, with bands from p20 to p80."""
    points = record["points"]
    values = [point["value"] for point in points]
    for i, name in enumerate(points[0]["step ms"]):
        low, middle, high = (np.array([point["step ms"][name][q] for point in points]) for q in ("p20", "p50", "p80"))
        axis.plot(values, middle, color=COLOURS[i], marker=MARKERS[i], label=name, zorder=3)
        axis.fill_between(values, low, high, color=COLOURS[i], alpha=0.18, linewidth=0)
    axis.set(xscale="log", yscale="log", xlabel=record["axis"], ylabel="ms per step")
    _plain_ticks(axis, values, few=axis.get_ylim()[1] < 10 * axis.get_ylim()[0])
    axis.legend()


def stages(axis: Axes, record: Record) -> None:
    """One bar per contender, for one model's step, divided into its stages."""
    variants = record["variants"]
    names = [v["name"] if v["models"] == 1 else f"{v['name']}, each of {v['models']}" for v in variants]
    left = np.zeros(len(variants))
    for i, stage in enumerate(dict.fromkeys(stage for v in variants for stage in v["stages ms"])):
        width = np.array([v["stages ms"].get(stage, 0.0) / v["models"] for v in variants])
        axis.barh(names, width, left=left, color=COLOURS[i], label=stage)
        left += width
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    axis.set(xlabel="ms per step")
    axis.legend(ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize=9)


def _plain_ticks(axis: Axes, values: Iterable[int], few: bool) -> None:
    """Numbers without exponents; between the decades too where there are `few`."""
    axis.set_xticks(list(values), [str(value) for value in values])
    axis.xaxis.minorticks_off()
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}" if few else "")
    axis.tick_params(axis="y", which="minor", labelsize=8)
