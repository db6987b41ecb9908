"""What a `results.json` must look like; docs/results_format.md says the same in words."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from fastmmkd.modalities import CONDITIONS
from fastmmkd.tasks import TASKS

VERSION = 1


class Block(BaseModel):
    """A part of the file. Unknown keys are kept: a later fastmmkd may add some without changing the version."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False, extra="allow")


class Statistic(Block):
    """A metric over seeds; None stands for no value."""

    mean: float | None
    std: float | None
    per_seed: list[float | None]


class Entry(Block):
    """A condition, or the average over the incomplete ones."""

    samples: int
    metrics: dict[str, Statistic]
    floor: dict[str, float | None]
    ideal: dict[str, float | None] | None


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
    at_floor: dict[str, list[bool | None]] = {}
    conditions: dict[str, Entry]
    average: Entry
    sweep: list[SweepPoint]
    trivial: dict[str, dict[str, float | None]] | None = None

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
        for phase, per_seed in self.at_floor.items():
            if len(per_seed) != len(self.seeds):
                raise ValueError(f"at_floor.{phase} has {len(per_seed)} values, seeds lists {len(self.seeds)}")
        return self


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
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{where}: {what}" if where else what) from None
