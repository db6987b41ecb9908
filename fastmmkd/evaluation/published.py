"""The papers' tables as data, and runs held against them: are the published numbers reproduced?

The numbers lie in `docs/paper_results.json`, whose layout is `PaperResults`. A run is held against them where it was
evaluated on the test split that the papers were (`recognise`), or where the user says so.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError, model_validator
from scipy import stats

from fastmmkd.errors import UserError, first_problem
from fastmmkd.evaluation import floors, metrics, tables
from fastmmkd.evaluation.schema import Results, Statistic
from fastmmkd.evaluation.tables import COLUMNS, Cell, Row
from fastmmkd.files import read_json
from fastmmkd.tasks import Task

FILE = "paper_results.json"
BELOW_FLOOR = "†"
"""Stands behind a published number that a predictor without features betters."""
OF_SIGNS = ("f1_non0", "acc2_non0")
"""Metrics whose floor follows from how many labels have each sign."""
CONFIDENCE = 0.95
METHOD_NOTE = (
    "Difference of each run to the published numbers of its own method, whatever its config changes, and how large a "
    "difference seeds alone explain in 95 of 100 cases: Student's t with the run's standard deviation, which the "
    "published runs are taken to have too, as papers give none; nothing where a run has one seed. Every cell is judged "
    "by itself: of twenty, one is expected to fall outside by chance."
)
SYNTHETIC = "synthetic"
"""How `Results.data` begins where the data were generated."""


class Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="forbid")


class Paper(Part):
    title: str
    venue: str
    seeds: PositiveInt
    """How many each of its numbers is the mean of."""
    tables: dict[str, str]
    """Number -> what it shows."""
    notes: list[str]
    """What the text that was read leaves open."""


class Signs(Part):
    """How often each sign is among the test labels."""

    negative: int
    zero: int
    positive: int


class DataSet(Part):
    title: str
    labels: Literal["score", "emotions"]
    test_samples: dict[str, str]
    """Sizes of the test split by which it is recognised, and where each is from."""
    test_signs: Signs | None


class PaperRow(Part):
    """One method, or an ablation of it, in one metric, as a table prints it."""

    method: str
    variant: str | None = None
    """An ablation, as `Method.ablations` names it; None: the full method."""
    data: str
    metric: str
    paper: str
    table: int
    values: dict[str, float]
    """`tables.COLUMNS` -> value, with as many decimals as printed (trailing zeros apart)."""
    note: str | None = None


class PaperResults(Part):
    """`docs/paper_results.json`."""

    version: Literal[1]
    about: str
    methods: list[str]
    """In the order in which they are shown."""
    papers: dict[str, Paper]
    data_sets: dict[str, DataSet]
    rows: list[PaperRow]

    @model_validator(mode="after")
    def consistent(self) -> PaperResults:
        seen = set()
        for i, row in enumerate(self.rows):
            for key, name, known in (
                ("method", row.method, self.methods),
                ("data", row.data, self.data_sets),
                ("paper", row.paper, self.papers),
            ):
                if name not in known:
                    raise ValueError(f"rows.{i}.{key} is {name!r}, expected one of {', '.join(known)}")
            if str(row.table) not in self.papers[row.paper].tables:
                raise ValueError(f"rows.{i}.table is {row.table}, which papers.{row.paper}.tables does not have")
            if tuple(row.values) != COLUMNS:
                raise ValueError(f"rows.{i}.values has {', '.join(row.values)}, expected {', '.join(COLUMNS)}")
            limits = metrics.limits(row.metric)
            if limits is None:
                raise ValueError(f"rows.{i}.metric is {row.metric!r}, which is no metric")
            for column, value in row.values.items():
                if not limits[0] <= value <= limits[1]:
                    raise ValueError(f"rows.{i}.values.{column} is {value:g}, expected {limits[0]:g} to {limits[1]:g}")
            what = (row.method, row.variant, row.data, row.metric, row.paper, row.table)
            if what in seen:
                raise ValueError(f"rows.{i}: {' '.join(map(str, filter(None, what)))} is there twice")
            seen.add(what)
        return self


def path() -> Path:
    """Where the numbers lie: in an installed package, or in docs/ of a checkout (see setup.py).

    Raises:
        UserError: in neither.
    """
    package = Path(__file__).parents[1]
    places = [package / "_docs" / FILE, package.parent / "docs" / FILE]
    found = next((place for place in places if place.exists()), None)
    if found is None:
        raise UserError(f"{places[0]}: no such file; expected the published results that fastmmkd is installed with")
    return found


def read(file: Path) -> PaperResults:
    """Published results.

    Raises:
        UserError: the file is missing, not JSON, or not as `PaperResults` says.
    """
    value = read_json(file, "published results")
    try:
        return PaperResults.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{file}: {first_problem(error)}") from None


@cache
def shipped() -> PaperResults:
    """The published results that this package comes with."""
    return read(path())


@dataclass(frozen=True)
class Distance:
    """How far a run's mean is from a published one, and how far seeds alone may carry two such means apart."""

    difference: float
    """Ours - published."""
    margin: float | None
    """None for a single seed, whose scatter is unknown."""

    @property
    def within(self) -> bool | None:
        """Whether seeds explain the difference; None where nobody can tell."""
        return None if self.margin is None else abs(self.difference) <= self.margin


def distance(ours: Statistic, value: float, seeds: int) -> Distance | None:
    """Hold the mean of a run against a published mean over `seeds` seeds, whose spread was not published.

    Published runs are taken to scatter over seeds as ours do: then the difference of the two means has the standard
    error `std sqrt(1 / n + 1 / seeds)`, and Student's t with n - 1 degrees of freedom bounds it in 95 of 100 cases.
    Half a unit of the last printed digit is added, by which the published number may have been rounded.

    Returns:
        None where the run has no value.
    """
    if ours.mean is None:
        return None
    n, margin = len(ours.per_seed), None
    if ours.std is not None:
        error = ours.std * math.sqrt(1 / n + 1 / seeds)
        margin = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error + 0.5 * 10.0 ** -decimals([value])
    return Distance(ours.mean - value, margin)


def decimals(values: Sequence[float]) -> int:
    """How many a table prints, by the longest of its values."""
    return max(len(repr(value).partition(".")[2]) for value in values)


@dataclass(frozen=True)
class Published:
    """The published rows on one data set, to stand beside runs on it."""

    content: PaperResults
    data: str
    """A key of `PaperResults.data_sets`."""
    reason: str
    """Why the runs are held against these rows, as a clause."""
    ablated: Sequence[str] = ()
    """Methods whose ablation tables are shown too."""

    @property
    def title(self) -> str:
        return self.content.data_sets[self.data].title

    def rows_of(self, key: str) -> list[PaperRow]:
        """In the order of `PaperResults.methods`; one for several papers that print the same."""
        wanted = [row for row in self.content.rows if self._is_shown(row, [key])]
        distinct: dict[tuple[object, ...], PaperRow] = {}
        for row in sorted(wanted, key=lambda row: self.content.methods.index(row.method)):
            distinct.setdefault((row.method, row.variant, *row.values.values()), row)
        return list(distinct.values())

    def name(self, row: PaperRow) -> str:
        """`"HRLF, published"`; with the paper where papers disagree about a row."""
        what = (row.method, row.variant)
        alike = [other for other in self.rows_of(row.metric) if (other.method, other.variant) == what]
        return f"{' '.join(filter(None, what))}, published" + (f" in {row.paper}" if len(alike) > 1 else "")

    def seeds(self, key: str) -> dict[str, int]:
        """Name of every row of one metric -> how many seeds it is the mean over."""
        return {self.name(row): self.content.papers[row.paper].seeds for row in self.rows_of(key)}

    def table_rows(self, key: str, reference: Results) -> list[Row]:
        """The rows of one metric's table; numbers that the floor betters are marked.

        Args:
            reference: a run on the data, whose floor counts where the class balance is not known.
        """
        shown = []
        for row in self.rows_of(key):
            digits = decimals(list(row.values.values()))
            cells = []
            for column, value in row.values.items():
                floor = self.floor(key, column, reference)
                mark = f" {BELOW_FLOOR}" if floor is not None and metrics.better(key, floor, than=value) else ""
                cells.append(Cell(value, printed=f"{value:.{digits}f}{mark}"))
            shown.append(Row(self.name(row), cells))
        return shown

    def floor(self, key: str, column: str, reference: Results) -> float | None:
        """What a predictor without features reaches on the test split; None where that is not known.

        By the data set's balance of signs for F1 and Acc-2 non0, where it is known: those need no more. Else what the
        run was measured against.
        """
        signs = self.content.data_sets[self.data].test_signs
        if signs is not None and key in OF_SIGNS:
            return _floor_of_signs(signs.negative, signs.zero, signs.positive)[key]
        entry = reference.average if column == "average" else reference.conditions[column]
        return entry.floor.get(key)

    def counterparts(self, key: str, results: Results, variant: str | None) -> list[PaperRow]:
        """The published rows of a run's own method, or of the ablation that it is."""
        rows = (row for row in self.rows_of(key) if same_method(row.method, results.method))
        return [row for row in rows if row.variant == variant]

    def distances(self, row: PaperRow, results: Results) -> list[Distance | None]:
        """Of a run from a published row, by column."""
        entries = [results.average if c == "average" else results.conditions[c] for c in COLUMNS]
        seeds = self.content.papers[row.paper].seeds
        return [
            distance(statistic, row.values[column], seeds) if (statistic := entry.metrics.get(row.metric)) else None
            for column, entry in zip(COLUMNS, entries, strict=True)
        ]

    def legend(self, keys: Sequence[str]) -> str:
        """What the rows are, which data they were matched with, and what the mark means."""
        shown = {(row.paper, row.table): None for row in self.content.rows if self._is_shown(row, keys)}
        sources: dict[str, list[int]] = {}
        for paper, table in shown:
            sources.setdefault(paper, []).append(table)
        named = "; ".join(
            f"{paper} ({self.content.papers[paper].venue}), table{'s' * (len(numbers) > 1)} "
            f"{' and '.join(map(str, sorted(numbers)))}"
            for paper, numbers in sources.items()
        )
        if not named:
            reported = dict.fromkeys(row.metric for row in self.content.rows if row.data == self.data)
            there = ", ".join(metrics.title(key) for key in reported)
            return f"The papers do not print {', '.join(map(metrics.title, keys))} on {self.title}, but {there}."
        return (
            f"*published*: the papers' numbers on {self.title}, means over seeds without a spread, from {named}. "
            f"{self.reason[0].upper()}{self.reason[1:]}; features were not compared. "
            f"{BELOW_FLOOR}: worse than a predictor that sees no features: {self._floors_said(keys)}."
        )

    def _floors_said(self, keys: Sequence[str]) -> str:
        """Which floors published numbers are marked by, as a clause."""
        signs = self.content.data_sets[self.data].test_signs
        known = [key for key in keys if self.rows_of(key) and key in OF_SIGNS] if signs else []
        if signs is None or not known:
            return "the row *floor*"
        reached = " and ".join(
            f"{_floor_of_signs(signs.negative, signs.zero, signs.positive)[key]:.2f} of {metrics.title(key)}"
            for key in known
        )
        by = f"by the {signs.negative} negative and {signs.positive} positive test samples of {self.title}"
        others = any(self.rows_of(key) for key in keys if key not in known)
        return f"{reached}, {by}" + "; of other metrics the row *floor*" * others

    def _is_shown(self, row: PaperRow, keys: Sequence[str]) -> bool:
        if row.data != self.data or row.metric not in keys:
            return False
        return row.variant is None or any(same_method(row.method, method) for method in self.ablated)


@cache
def _floor_of_signs(negative: int, zero: int, positive: int) -> dict[str, float]:
    """The best that a constant reaches on so many labels of each sign."""
    return floors.constant(Task("classification-2"), np.repeat([-1.0, 0.0, 1.0], [negative, zero, positive]))


def same_method(one: str, other: str) -> bool:
    """Whether two spellings name one method: `"Self-MM"`, `"selfmm"`."""
    one, other = (re.sub(r"\W|_", "", name).lower() for name in (one, other))
    return one == other


def recognise(content: PaperResults, results: Results, ablated: Sequence[str] = ()) -> Published | None:
    """The published rows that a run may be held against; None where its data are not the papers'.

    They are by the number of test samples and the kind of labels. Data that were generated never are, whatever they
    imitate.
    """
    if is_synthetic(results) or results.folds:  # what folds sum up to is no test split
        return None
    samples = test_samples(results)
    for name, data_set in content.data_sets.items():
        origin = data_set.test_samples.get(str(samples))
        if origin is not None and data_set.labels == Task(results.task).label_kind:
            kind = {"score": "scores", "emotions": "emotions"}[data_set.labels]
            reason = f"matched by {samples} test samples ({origin}), labelled with {kind}"
            return Published(content, name, reason, ablated)
    return None


def why_not(data_sets: Sequence[DataSet], results: Results) -> str:
    """Why a run is not held against the papers, where neither of the two functions before has found rows."""
    if is_synthetic(results):
        return f"{results.data} was generated"
    if results.folds:
        return f"{results.data} are another division of the data than the papers'"
    known = "; ".join(f"{d.title}: {' or '.join(d.test_samples)}, {d.labels}" for d in data_sets)
    found = f"{test_samples(results)} test samples, labels {Task(results.task).label_kind}"
    return f"{results.data} has {found} (expected {known})"


def is_synthetic(results: Results) -> bool:
    """Whether the data were generated."""
    return results.data.startswith(SYNTHETIC) or results.average.ideal is not None


def test_samples(results: Results) -> int:
    """How many samples of the test split have a modality that a condition asks for."""
    return max(entry.samples for entry in results.conditions.values())


def refuse_unknown(data: str) -> None:
    """Find out whether the papers report on a data set that a user has named.

    Raises:
        UserError: they do not, or there are no published results.
    """
    known = shipped().data_sets
    if data not in known:
        raise UserError(f"--paper-data {data}: no such data set; expected one of {', '.join(known)}")


def as_told(content: PaperResults, results: Results, data: str, ablated: Sequence[str] = ()) -> Published | None:
    """The published rows on a data set that the user names, whatever a run was evaluated on.

    Args:
        data: a key of `PaperResults.data_sets`.

    Returns:
        None where the run's labels are of another kind.
    """
    if content.data_sets[data].labels != Task(results.task).label_kind:
        return None
    reason = f"set beside {results.data} because that was asked for"
    return Published(content, data, reason, ablated)


def reproduction_rows(
    published: Published, key: str, runs: Sequence[tuple[str, Results, str | None]]
) -> list[list[str]]:
    """Rows of a table in the papers' columns: per run its difference, what seeds explain of it, and the verdict.

    Args:
        runs: name, results, and the ablation that a run is (None: the full method).
    """
    rows = []
    for name, results, variant in runs:
        for row in published.counterparts(key, results, variant):
            found = published.distances(row, results)
            rows += [
                [f"{name} − {published.name(row)}", *(tables.signed(key, d.difference if d else None) for d in found)],
                ["seeds explain up to", *(_margin(key, d) for d in found)],
                ["reproduced", *(_verdict(key, d) for d in found)],
            ]
    return rows


def _margin(key: str, found: Distance | None) -> str:
    return tables.format_number(key, found.margin if found else None)


def _verdict(key: str, found: Distance | None) -> str:
    if found is None or found.within is None:
        return tables.NONE
    if found.within:
        return "yes"
    return "no: better" if (found.difference > 0) == metrics.higher_is_better(key) else "no: worse"
