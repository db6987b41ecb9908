"""`results.json`: what one run reached. The format is described in docs/results_format.md."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastmmkd.errors import UserError
from fastmmkd.evaluation import metrics
from fastmmkd.evaluation.schema import VERSION, Results, parse
from fastmmkd.files import make_directory, refuse_special, write_text
from fastmmkd.modalities import CONDITIONS, INCOMPLETE_CONDITIONS
from fastmmkd.run_folder import CONFUSION_FILE, CURVES_FILE, RESULTS_FILE, RESULTS_SHEET, RESULTS_TEXT
from fastmmkd.tasks import Task


@dataclass(frozen=True)
class Outcome:
    """One seed under one condition."""

    samples: int
    metrics: dict[str, float]
    """As `metrics.compute` returns them; NaN where there is no value."""
    confusion: dict[str, list[list[int]]] = field(default_factory=dict)
    """As `metrics.confusion` returns them; empty where they were not counted."""


@dataclass(frozen=True)
class SeedEvaluation:
    """All that was evaluated of one trained model."""

    seed: int
    conditions: dict[str, Outcome]
    """Condition -> outcome; a condition that is left out has no samples."""
    sweep: list[tuple[float, dict[str, float]]]
    """(missing ratio p, metrics), all modalities present, p ascending."""
    sweep_samples: int
    at_floor: dict[str, bool | None] = field(default_factory=dict)
    """Phase of its training -> whether its best validation score is no better than a constant's; None if unknown."""


def combine(
    method: str,
    data: str,
    data_hash: str,
    task: Task,
    evaluations: Sequence[SeedEvaluation],
    floors: Mapping[str, Mapping[str, float]],
    ideals: Mapping[str, Mapping[str, float]] | None,
    trivial: Mapping[str, Mapping[str, float]] | None = None,
    used: Mapping[str, Mapping[str, int]] | None = None,
) -> Results:
    """Per-seed evaluations -> the contents of `results.json`, NaN as None.

    `std` is the sample standard deviation over seeds (n - 1), None for one seed. "average" is taken per seed over the
    incomplete conditions that have a value, then summarised over seeds; its `samples` is their sum.

    Args:
        data: one line that says what was evaluated on.
        evaluations: one per seed, at least one, with equal sample counts and sweep ratios.
        floors: condition -> `floors.floor` on that condition's samples.
        ideals: condition -> `floors.ideal`, or None where the generator is unknown (real data).
        trivial: `floors.trivial` on the complete condition, quoted in the footnote of results.md.
        used: condition -> `metrics.used` of its samples; None where that is not known.

    Raises:
        ValueError: no evaluation, a seed twice, or evaluations that do not match each other.
    """
    _check_evaluations(evaluations)
    names = metrics.keys(task)
    absent = Outcome(0, {})
    conditions = {}
    for condition in CONDITIONS:
        outcomes = [e.conditions.get(condition, absent) for e in evaluations]
        conditions[condition] = {
            "samples": outcomes[0].samples,
            "metrics": {key: statistic([o.metrics.get(key, math.nan) for o in outcomes]) for key in names},
            "floor": _values(floors.get(condition, {}), names),
            "ideal": None if ideals is None else _values(ideals.get(condition, {}), names),
            "used": None if used is None else {key: used.get(condition, {}).get(key, 0) for key in names},
            "confusion": _confusion([o.confusion for o in outcomes]),
        }
    return Results.model_validate(
        {
            "version": VERSION,
            "method": method,
            "data": data,
            "data_hash": data_hash,
            "task": task.name,
            "seeds": [e.seed for e in evaluations],
            "at_floor": {
                phase: [e.at_floor.get(phase) for e in evaluations]
                for phase in dict.fromkeys(phase for e in evaluations for phase in e.at_floor)
            },
            "conditions": conditions,
            "average": _average(conditions, names, has_ideal=ideals is not None),
            "sweep": [
                {
                    "p": p,
                    "samples": evaluations[0].sweep_samples,
                    "metrics": {
                        key: statistic([e.sweep[i][1].get(key, math.nan) for e in evaluations]) for key in names
                    },
                }
                for i, (p, _) in enumerate(evaluations[0].sweep)
            ],
            "trivial": None if trivial is None else {name: _values(values, names) for name, values in trivial.items()},
        }
    )


def write(directory: Path, results: Results) -> None:
    """Write `results.md`, `.csv`, `curves.png`, `confusion.png` and `results.json` into a folder, created if missing.

    Each file appears whole or not at all; `results.json` comes last, so where it lies the others do too. Results
    without confusion matrices, which earlier versions did not count, get no `confusion.png`.

    Raises:
        UserError: the folder cannot be written to.
    """
    # Imported here: reading results needs neither matplotlib nor the renderers.
    from fastmmkd.evaluation import plots, render

    make_directory(directory)
    write_text(directory / RESULTS_TEXT, render.results_markdown(results))
    write_text(directory / RESULTS_SHEET, render.results_csv(results))
    plots.curves(directory / CURVES_FILE, results)
    if any(entry.confusion for entry in results.conditions.values()):
        plots.confusion(directory / CONFUSION_FILE, results)
    write_text(directory / RESULTS_FILE, json.dumps(results.model_dump(), indent=1, allow_nan=False) + "\n")


def read(path: Path) -> Results:
    """Read a `results.json`, given itself or the run folder it lies in.

    Raises:
        UserError: missing, not JSON, of another format version, or not as docs/results_format.md says.
    """
    path = Path(path)
    file = path / RESULTS_FILE if path.is_dir() else path
    try:
        refuse_special(file, "the results of a run")
        value = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair can neither be printed nor written
    except FileNotFoundError as e:
        hint = "evaluate the run first: fastmmkd eval --run DIR" if path.is_dir() else "expected a run folder or file"
        raise UserError(f"{file}: no such file ({hint})") from e
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror})") from e
    except (ValueError, RecursionError) as e:
        raise UserError(f"{file}: not a JSON file ({e})") from e
    try:
        return parse(value)
    except ValueError as e:
        raise UserError(f"{file}: {e}") from None


def _check_evaluations(evaluations: Sequence[SeedEvaluation]) -> None:
    if not evaluations:
        raise ValueError("no evaluations to combine")
    seeds = [e.seed for e in evaluations]
    if len(set(seeds)) != len(seeds):
        raise ValueError(f"a seed occurs twice: {seeds}")
    unknown = sorted({c for e in evaluations for c in e.conditions} - set(CONDITIONS))
    if unknown:
        raise ValueError(f"unknown conditions {unknown}, expected some of {CONDITIONS}")

    def shape(e: SeedEvaluation) -> tuple[dict[str, int], list[float], int]:
        return {c: o.samples for c, o in e.conditions.items()}, [p for p, _ in e.sweep], e.sweep_samples

    for other in evaluations[1:]:
        if shape(other) != shape(evaluations[0]):
            raise ValueError(f"seeds {seeds[0]} and {other.seed} differ in their sample counts or sweep ratios")


def _average(conditions: dict[str, Any], names: Sequence[str], has_ideal: bool) -> dict[str, Any]:
    parts = [conditions[c] for c in INCOMPLETE_CONDITIONS]
    seeds = len(parts[0]["metrics"][names[0]]["per_seed"])
    return {
        "samples": sum(part["samples"] for part in parts),
        "metrics": {
            key: statistic([_mean(part["metrics"][key]["per_seed"][i] for part in parts) for i in range(seeds)])
            for key in names
        },
        "floor": _values({key: _mean(part["floor"][key] for part in parts) for key in names}, names),
        "ideal": _values({key: _mean(part["ideal"][key] for part in parts) for key in names}, names)
        if has_ideal
        else None,
        "used": {key: sum(part["used"][key] for part in parts) for key in names} if parts[0]["used"] else None,
        "confusion": None,
    }


def _confusion(of_seeds: Sequence[Mapping[str, list[list[int]]]]) -> dict[str, Any] | None:
    """The seeds' confusion matrices, summed; None where one of them has none."""
    if not all(of_seeds):
        return None
    return {
        key: {
            "classes": list(metrics.confused_classes(key)),
            "counts": [
                [sum(counts) for counts in zip(*rows, strict=True)]
                for rows in zip(*(matrices[key] for matrices in of_seeds), strict=True)
            ],
        }
        for key in of_seeds[0]
    }


def _mean(values: Any) -> float:
    known = [v for v in values if v is not None]
    return math.fsum(known) / len(known) if known else math.nan


def statistic(per_seed: Sequence[float]) -> dict[str, Any]:
    """A `Statistic` of values, NaN where there is none; with one of those it has neither mean nor deviation."""
    values = [_number(v) for v in per_seed]
    known = [v for v in values if v is not None]
    if len(known) < len(values):
        return {"mean": None, "std": None, "per_seed": values}
    mean = math.fsum(known) / len(known)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in known) / (len(known) - 1)) if len(known) > 1 else None
    return {"mean": mean, "std": deviation, "per_seed": values}


def _values(values: Mapping[str, float], names: Sequence[str]) -> dict[str, float | None]:
    return {key: _number(values.get(key, math.nan)) for key in names}


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
