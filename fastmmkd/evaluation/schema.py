"""What a `results.json` must look like; docs/results_format.md says the same in words."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from fastmmkd.evaluation import metrics
from fastmmkd.modalities import CONDITIONS
from fastmmkd.tasks import TASKS, Task

VERSION = 1


def problem(results: Any) -> str | None:
    """What keeps a parsed JSON value from being valid results, in one line; None if nothing does."""
    if not isinstance(results, dict) or not isinstance(results.get("version"), int):
        return f"not fastmmkd results: the integer key 'version' is missing (expected {VERSION})"
    if results["version"] > VERSION:
        return f"results version {results['version']} is newer than this fastmmkd reads ({VERSION}); update fastmmkd"
    if results["version"] < VERSION:
        return f"results version {results['version']} is unknown, expected {VERSION}"
    try:
        _Results.model_validate(results)
    except ValidationError as e:
        first = e.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        what = first["msg"].removeprefix("Value error, ")
        return f"{where}: {what}" if where else what
    return None


class _Model(BaseModel):
    # Unknown keys are allowed: a later fastmmkd may add some without changing the version.
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Statistic(_Model):
    mean: float | None
    std: float | None
    per_seed: list[float | None]


class _Entry(_Model):
    samples: int
    metrics: dict[str, _Statistic]
    floor: dict[str, float | None]
    ideal: dict[str, float | None] | None


class _SweepPoint(_Model):
    p: float
    samples: int
    metrics: dict[str, _Statistic]


class _Results(_Model):
    version: Literal[1]
    method: str
    data: str
    data_hash: str
    task: str
    seeds: list[int]
    conditions: dict[str, _Entry]
    average: _Entry
    sweep: list[_SweepPoint]
    trivial: dict[str, dict[str, float | None]] | None = None
    at_floor: dict[str, list[bool | None]] = {}

    @model_validator(mode="after")
    def consistent(self) -> _Results:
        if self.task not in TASKS:
            raise ValueError(f"task {self.task!r} is not one of {', '.join(TASKS)}")
        if set(self.conditions) != set(CONDITIONS):
            raise ValueError(f"conditions are {sorted(self.conditions)}, expected {', '.join(CONDITIONS)}")
        entries = [*self.conditions.items(), ("average", self.average)]
        measured = [(where, entry.metrics) for where, entry in entries]
        measured += [(f"sweep p={point.p:g}", point.metrics) for point in self.sweep]
        for where, found in measured:
            for key in metrics.keys(Task(self.task)):
                if key not in found:
                    raise ValueError(f"{where} lacks the metric {key!r} of task {self.task}")
                count = len(found[key].per_seed)
                if count != len(self.seeds):
                    raise ValueError(f"{where}.{key} has {count} per-seed values, seeds lists {len(self.seeds)}")
        for phase, per_seed in self.at_floor.items():
            if len(per_seed) != len(self.seeds):
                raise ValueError(f"at_floor.{phase} has {len(per_seed)} values, seeds lists {len(self.seeds)}")
        return self
