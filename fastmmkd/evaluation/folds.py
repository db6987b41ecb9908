"""Folds: several divisions of one data set, a run on each, and what they come to together.

A folder of runs that has no results of its own, such as `fastmmkd suite --folds` makes for a config, stands for all of
them: every model of every fold counts once.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from fastmmkd.errors import UserError
from fastmmkd.evaluation import results
from fastmmkd.evaluation.schema import Entry, Results
from fastmmkd.run_folder import RESULTS_FILE


def folders(path: Path) -> list[Path]:
    """The runs on folds that a folder holds, in the order of their names; none where it is a run itself."""
    if not path.is_dir() or (path / RESULTS_FILE).exists():
        return []
    return sorted(file.parent for file in path.glob(f"*/{RESULTS_FILE}"))


def read_each(path: Path) -> dict[str, Results]:
    """Fold, as its folder is called -> its results; empty where the folder is a run itself.

    Raises:
        UserError: a fold's results cannot be read.
    """
    return {folder.name: results.read(folder) for folder in folders(path)}


def read(path: Path) -> Results:
    """The results of a run (its folder or `results.json`), or of the runs on folds that a folder holds, together.

    Raises:
        UserError: there are none, they cannot be read, or are not of the same method, task and metrics.
    """
    of_folds = read_each(path)
    if not of_folds:
        return results.read(path)
    try:
        return pooled(of_folds)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def pooled(of_folds: Mapping[str, Results]) -> Results:
    """Results of several folds as one: `seeds` and `per_seed` one fold after the other, `folds` says whose.

    Mean and standard deviation are over all models of all folds. `samples` are sums, floors and ideals means over the
    folds. `data_hash` is that of the folds' hashes: equal for runs on the same folds.

    Raises:
        ValueError: there is none, they are not of the same method, task and metrics, or two are on the same data.
    """
    if not of_folds:
        raise ValueError("no folds to put together")
    parts = list(of_folds.values())
    for name, part in of_folds.items():
        for what, of in _MUST_AGREE.items():
            if of(part) != of(parts[0]):
                first = next(iter(of_folds))
                raise ValueError(
                    f"{name} has the {what} {of(part)}, {first} has {of(parts[0])}; expected runs on the folds of one "
                    "data set"
                )
    hashes: dict[str, str] = {}
    for name, part in of_folds.items():
        if (other := hashes.setdefault(part.data_hash, name)) != name:
            raise ValueError(f"{other} and {name} are runs on the same data, expected one on each fold")
    ratios = [[point.p for point in part.sweep] for part in parts]
    return Results.model_validate(
        {
            "version": parts[0].version,
            "method": parts[0].method,
            "data": _title([part.data for part in parts]),
            "data_hash": hashlib.sha256("".join(sorted(part.data_hash for part in parts)).encode()).hexdigest(),
            "task": parts[0].task,
            "seeds": [seed for part in parts for seed in part.seeds],
            "folds": [name for name, part in of_folds.items() for _ in part.seeds],
            "at_floor": {
                phase: [at for part in parts for at in part.at_floor.get(phase, [None] * len(part.seeds))]
                for phase in dict.fromkeys(phase for part in parts for phase in part.at_floor)
            },
            "conditions": {c: _entry([part.conditions[c] for part in parts]) for c in parts[0].conditions},
            "average": _entry([part.average for part in parts]),
            "sweep": [
                {
                    "p": points[0].p,
                    "samples": sum(point.samples for point in points),
                    "metrics": _statistics([point.metrics for point in points]),
                }
                for points in zip(*(part.sweep for part in parts), strict=True)
            ]
            if all(of == ratios[0] for of in ratios)
            else [],
        }
    )


_MUST_AGREE: dict[str, Callable[[Results], str]] = {
    "method": lambda part: part.method,
    "task": lambda part: part.task,
    "metrics": lambda part: ", ".join(part.average.metrics),
}


def _title(data: Sequence[str]) -> str:
    """What their names begin with, and how many they are: `"MFN context_0"`, ... -> `"MFN context, 4 folds"`."""
    same = (letters[0] for letters in takewhile(lambda letters: len(set(letters)) == 1, zip(*data, strict=False)))
    common = "".join(same).rstrip(" _-,(")
    return f"{common}, {len(data)} folds" if common else f"{len(data)} folds: {', '.join(data)}"


def _entry(entries: Sequence[Entry]) -> dict[str, Any]:
    ideals = [entry.ideal for entry in entries]
    used = [entry.used for entry in entries]
    return {
        "samples": sum(entry.samples for entry in entries),
        "metrics": _statistics([entry.metrics for entry in entries]),
        "floor": _means([entry.floor for entry in entries]),
        "ideal": None if None in ideals else _means([ideal for ideal in ideals if ideal is not None]),
        "used": None if None in used else {k: sum(of[k] for of in used if of) for k in used[0] or {}},
    }


def _statistics(of_parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {
        key: results.statistic(
            [math.nan if v is None else v for statistics in of_parts for v in statistics[key].per_seed]
        )
        for key in of_parts[0]
    }


def _means(of_parts: Sequence[Mapping[str, float | None]]) -> dict[str, float | None]:
    """Mean over the folds, None where one has no value."""
    means: dict[str, float | None] = {}
    for key in of_parts[0]:
        values = [values.get(key) for values in of_parts]
        known = [value for value in values if value is not None]
        means[key] = math.fsum(known) / len(known) if len(known) == len(values) else None
    return means
