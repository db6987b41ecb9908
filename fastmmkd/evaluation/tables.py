"""The papers' table layout: one table per metric, runs in rows, {l} {a} {v} {l,a} {l,v} {a,v} Avg. {l,a,v} across."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from fastmmkd.evaluation import metrics
from fastmmkd.evaluation.markdown import NONE, markdown_table
from fastmmkd.evaluation.schema import Entry, Results, Statistic
from fastmmkd.labels import EMOTIONS
from fastmmkd.modalities import INCOMPLETE_CONDITIONS, condition_label
from fastmmkd.tasks import Task

COLUMNS = (*INCOMPLETE_CONDITIONS, "average", "lav")
"""Column keys in the papers' order."""

HEADERS = tuple("Avg." if c == "average" else condition_label(c) for c in COLUMNS)


@dataclass(frozen=True)
class Cell:
    mean: float | None
    std: float | None = None
    best: bool = False
    printed: str | None = None
    """What stands there in place of the formatted mean: a number that others have rounded, with its mark."""


@dataclass(frozen=True)
class Row:
    name: str
    cells: list[Cell]
    """One per column of `COLUMNS`."""


@dataclass(frozen=True)
class MetricTable:
    """One metric of several runs on the same data."""

    key: str
    runs: list[Row]
    references: list[Row]
    """Floor, and ideal where it is known; one row each, or several that name their runs where runs disagree."""
    samples: list[int]
    """What the metric was computed on: see `Entry.used`."""
    published: list[Row] = field(default_factory=list)
    """The papers' numbers on the same data."""

    @property
    def title(self) -> str:
        return metrics.title(self.key) + ("" if metrics.higher_is_better(self.key) else " (lower is better)")


def shown_metrics(task: Task) -> list[str]:
    """Metrics that get a table: all for scores; for emotions F1 of each, and the overall accuracy."""
    names = metrics.keys(task)
    if task.has_scores:
        return list(names)
    return [key for key in names if key.startswith("f1") or not any(e in key for e in EMOTIONS)]


def with_metric(key: str, runs: Sequence[tuple[str, Results]]) -> list[tuple[str, Results]]:
    """The runs whose task has the metric."""
    return [(name, results) for name, results in runs if key in metrics.keys(Task(results.task))]


def metric_table(key: str, runs: Sequence[tuple[str, Results]], published: Sequence[Row] = ()) -> MetricTable:
    """Arrange one metric of named results (same data); the best run per column is marked if there are two.

    Runs whose task lacks the metric are left out; at least one has it. One that an earlier version evaluated, which did
    not know the metric, has cells without a value.
    """
    runs = with_metric(key, runs)
    rows = [Row(name, [_cell(entry.metrics.get(key)) for entry in _entries(results)]) for name, results in runs]
    return MetricTable(
        key,
        _mark_best(key, rows) if len(rows) > 1 else rows,
        _references(key, "floor", runs) + _references(key, "ideal", runs),
        _samples(key, runs),
        list(published),
    )


def format_number(key: str, value: float | None) -> str:
    """Two decimals for percentages, three for MAE and correlation, as the papers print them."""
    if value is None:
        return NONE
    return f"{value:.2f}" if metrics.is_percent(key) else f"{value:.3f}"


def format_cell(key: str, mean: float | None, std: float | None, plus_minus: str = " ± ") -> str:
    """`"81.20 ± 0.41"`, without a deviation where there is none."""
    text = format_number(key, mean)
    return text if mean is None or std is None else f"{text}{plus_minus}{format_number(key, std)}"


def signed(key: str, value: float | None) -> str:
    """A difference, with its sign."""
    text = format_number(key, value)
    return text if value is None or text.startswith("-") else f"+{text}"


def cell_text(key: str, cell: Cell, plus_minus: str = " ± ") -> str:
    """What a cell prints, whether or not it is the best."""
    return cell.printed if cell.printed is not None else format_cell(key, cell.mean, cell.std, plus_minus)


def markdown_metric(table: MetricTable) -> str:
    """One metric as Markdown, the best run per column bold."""

    def text(cell: Cell) -> str:
        plain = cell_text(table.key, cell)
        return f"**{plain}**" if cell.best else plain

    rows = [[row.name, *map(text, row.cells)] for row in table.runs + table.published + table.references]
    return markdown_table(["", *HEADERS], [*rows, ["samples", *map(str, table.samples)]])


def empty_conditions(results: Results) -> list[str]:
    """Incomplete conditions without any sample; "Avg." is taken over the others."""
    return [c for c in INCOMPLETE_CONDITIONS if results.conditions[c].samples == 0]


def average_note(results: Results) -> str:
    """What "Avg." leaves out, as a clause; empty where it is over all six conditions."""
    empty = empty_conditions(results)
    if not empty:
        return ""
    have = len(INCOMPLETE_CONDITIONS) - len(empty)
    without = ", ".join(map(condition_label, empty))
    return f"Avg. is over {have} of {len(INCOMPLETE_CONDITIONS)} conditions: no sample can be tested under {without}"


def _entries(results: Results) -> list[Entry]:
    return [results.average if c == "average" else results.conditions[c] for c in COLUMNS]


def _samples(key: str, runs: Sequence[tuple[str, Results]]) -> list[int]:
    """Of a run that says what the metric used; of any where none does, which counts all that were evaluated."""
    told = [results for _, results in runs if key in (results.average.used or {})]
    return [(entry.used or {}).get(key, entry.samples) for entry in _entries((told or [runs[0][1]])[0])]


def _references(key: str, kind: Literal["floor", "ideal"], runs: Sequence[tuple[str, Results]]) -> list[Row]:
    """The runs' floor or ideal: one row if all that know it print the same, else one per value, naming its runs.

    Both follow from the data alone, whatever the task; they differ between files of different versions at most.
    """
    of_printed: dict[tuple[str, ...], tuple[list[Cell], list[str]]] = {}
    for name, results in runs:
        entries = _entries(results)
        references = [entry.floor if kind == "floor" else entry.ideal for entry in entries]
        if all(
            key not in (values or {}) for values in references
        ):  # real data's ideal, or a file older than the metric
            continue
        cells = [Cell((values or {}).get(key)) for values in references]
        printed = tuple(format_number(key, cell.mean) for cell in cells)
        of_printed.setdefault(printed, (cells, []))[1].append(name)
    if len(of_printed) == 1:
        return [Row(kind, cells) for cells, _ in of_printed.values()]
    return [Row(f"{kind} of {', '.join(names)}", cells) for cells, names in of_printed.values()]


def _cell(statistic: Statistic | None) -> Cell:
    return Cell(statistic.mean, statistic.std) if statistic else Cell(None)


def _mark_best(key: str, rows: list[Row]) -> list[Row]:
    """Bold by the printed number, so that values that look equal are marked alike."""
    pick = max if metrics.higher_is_better(key) else min
    marked: list[list[Cell]] = [[] for _ in rows]
    for column in zip(*(row.cells for row in rows), strict=True):
        known = [c.mean for c in column if c.mean is not None]
        top = format_number(key, pick(known)) if known else None
        for cells, c in zip(marked, column, strict=True):
            cells.append(Cell(c.mean, c.std, c.mean is not None and format_number(key, c.mean) == top))
    return [Row(row.name, cells) for row, cells in zip(rows, marked, strict=True)]
