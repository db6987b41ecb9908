"""What a `results.json` must look like; docs/results_format.md says the same in words."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from fastmmkd.blocks import LONGEST_SWEEP
from fastmmkd.errors import first_problem, shown
from fastmmkd.evaluation import metrics
from fastmmkd.modalities import CONDITIONS
from fastmmkd.tasks import TASKS

VERSION = 1
SLACK = 1e-6
"""By how much rounding may carry a value past its limit."""


class Block(BaseModel):
    """A part of the file. Unknown keys are kept: a later fastmmkd may add some without changing the version."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class Statistic(Block):
    """A metric over seeds; None stands for no value."""

    mean: float | None
    std: float | None
    per_seed: list[float | None]


class Confusion(Block):
    """Decisions of all seeds against what is true, counted."""

    classes: list[str]
    counts: list[list[int]]
    """`[true][decided]`, summed over seeds."""


class Entry(Block):
    """A condition, or the average over the incomplete ones."""

    samples: int
    metrics: dict[str, Statistic]
    floor: dict[str, float | None]
    ideal: dict[str, float | None] | None
    used: dict[str, int] | None = None
    """Metric -> how many of the samples it is computed on; None in files of versions that did not count."""
    confusion: dict[str, Confusion] | None = None
    """Accuracy (`metrics.CONFUSED`) -> what it counts; None in such files, and in the average."""

    def references(self) -> list[tuple[str, dict[str, float | None]]]:
        """Floor, and ideal where there is one, under their names."""
        return [("floor", self.floor)] + ([("ideal", self.ideal)] if self.ideal is not None else [])


class SweepPoint(Block):
    """All modalities, a ratio p of their frames missing."""

    p: float
    samples: int
    metrics: dict[str, Statistic]


class Results(Block):
    """What one run reached. A metric that this version knows and the file does not is absent everywhere in it."""

    version: Literal[1]
    method: str
    data: str
    data_hash: str
    task: str
    seeds: list[int]
    folds: list[str] = []
    """Fold of each of `seeds`, where several are put together (`evaluation.folds`); a file is of one: empty."""
    at_floor: dict[str, list[bool | None]] = {}
    conditions: dict[str, Entry]
    average: Entry
    sweep: list[SweepPoint]
    trivial: dict[str, dict[str, float | None]] | None = None

    @property
    def models(self) -> list[tuple[str, int]]:
        """Fold (empty where there is one) and seed of each, in the order of `per_seed`."""
        return list(zip(self.folds or [""] * len(self.seeds), self.seeds, strict=True))

    @model_validator(mode="after")
    def consistent(self) -> Results:
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r} is not one of {', '.join(TASKS)}")
        if set(self.conditions) != set(CONDITIONS):
            raise ValueError(f"conditions are {sorted(self.conditions)}, expected {', '.join(CONDITIONS)}")
        entries = [*self.conditions.items(), ("average", self.average)]
        measured = [(where, entry.metrics) for where, entry in entries]
        measured += [(f"sweep p={point.p:g}", point.metrics) for point in self.sweep]
        for where, statistics in measured:
            if lost := self.average.metrics.keys() ^ statistics.keys():
                key = sorted(lost)[0]
                lacking, having = (where, "average") if key in self.average.metrics else ("average", where)
                raise ValueError(f"{lacking} lacks the metric {key!r} that {having} has")
            for key, statistic in statistics.items():
                count = len(statistic.per_seed)
                if count != len(self.seeds):
                    raise ValueError(f"{where}.{key} has {count} per-seed values, seeds lists {len(self.seeds)}")
        if self.folds and len(self.folds) != len(self.seeds):
            raise ValueError(f"folds lists {len(self.folds)}, seeds {len(self.seeds)}")
        if not self.seeds or len(set(self.models)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds are {shown(self.seeds)}, expected at least one, each once and from 0")
        for where, samples in [(w, e.samples) for w, e in entries] + [
            (f"sweep p={q.p:g}", q.samples) for q in self.sweep
        ]:
            if samples < 0:
                raise ValueError(f"{where}.samples is {shown(samples)}, expected 0 or more")
        for where, entry in entries:
            _check_counts(where, entry, len(self.seeds))
        ratios = [point.p for point in self.sweep]
        if len(ratios) > LONGEST_SWEEP:
            raise ValueError(f"sweep has {len(ratios)} entries, expected at most {LONGEST_SWEEP}")
        if not all(0 <= p <= 1 for p in ratios):
            raise ValueError(f"sweep has p of {shown(ratios)}, expected ratios from 0 to 1")
        for where, statistics in measured:
            for key, statistic in statistics.items():
                _check_statistic(f"{where}.{key}", key, statistic)
        references = [(f"{where}.{kind}", values) for where, entry in entries for kind, values in entry.references()]
        references += [(f"trivial.{name}", values) for name, values in (self.trivial or {}).items()]
        for where, values in references:
            for key, value in values.items():
                _check_value(f"{where}.{key}", key, value)
        for phase, per_seed in self.at_floor.items():
            if len(per_seed) != len(self.seeds):
                raise ValueError(f"at_floor.{phase} has {len(per_seed)} values, seeds lists {len(self.seeds)}")
        return self


def _check_statistic(where: str, key: str, statistic: Statistic) -> None:
    for value in (statistic.mean, *statistic.per_seed):
        _check_value(where, key, value)
    if statistic.std is not None and statistic.std < 0:
        raise ValueError(f"{where}.std is {statistic.std:g}, expected 0 or more")


def _check_counts(where: str, entry: Entry, seeds: int) -> None:
    for key, used in (entry.used or {}).items():
        if not 0 <= used <= entry.samples:
            raise ValueError(f"{where}.used.{key} is {shown(used)}, expected 0 to {entry.samples} samples")
    for key, confusion in (entry.confusion or {}).items():
        size = len(confusion.classes)
        if len(confusion.counts) != size or any(len(row) != size for row in confusion.counts):
            raise ValueError(f"{where}.confusion.{key}.counts is not {size} x {size}, one row and column per class")
        if any(count < 0 for row in confusion.counts for count in row):
            raise ValueError(f"{where}.confusion.{key}.counts has a negative count")
        total = sum(map(sum, confusion.counts))
        if total != entry.samples * seeds:
            raise ValueError(
                f"{where}.confusion.{key}.counts sum up to {total}, expected {entry.samples} samples x {seeds} seeds"
            )


def _check_value(where: str, key: str, value: float | None) -> None:
    limits = metrics.limits(key)
    if value is not None and limits is not None and not limits[0] - SLACK <= value <= limits[1] + SLACK:
        raise ValueError(f"{where} is {value:g}, expected a number from {limits[0]:g} to {limits[1]:g}")


def parse(value: Any) -> Results:
    """A parsed JSON value as results.

    Raises:
        ValueError: it is none; one line says why.
    """
    if not isinstance(value, dict) or not isinstance(value.get("version"), int):
        raise ValueError(f"not fastmmkd results: the integer key 'version' is missing (expected {VERSION})")
    version = value["version"]
    if version > VERSION:
        raise ValueError(f"results version {version} is newer than this fastmmkd reads ({VERSION}); update fastmmkd")
    if version < VERSION:
        raise ValueError(f"results version {version} is unknown, expected {VERSION}")
    try:
        return Results.model_validate(value)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from None
