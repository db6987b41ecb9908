"""`evaluation.json`: what a finished seed reached. Where it is no such thing any more the seed is evaluated anew."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, NonNegativeInt, ValidationError

from fastmmkd.engine.session import Session
from fastmmkd.errors import UserError, first_problem
from fastmmkd.evaluation import metrics
from fastmmkd.evaluation.results import Outcome, SeedEvaluation
from fastmmkd.files import read_json
from fastmmkd.modalities import CONDITIONS
from fastmmkd.run_folder import EVALUATION_FILE
from fastmmkd.tasks import Task


def evaluation_to_json(evaluation: SeedEvaluation) -> dict[str, Any]:
    """A seed's evaluation as JSON; NaN becomes null."""

    def finite(values: dict[str, float]) -> dict[str, float | None]:
        return {key: value if math.isfinite(value) else None for key, value in values.items()}

    return {
        "seed": evaluation.seed,
        "conditions": {
            name: {"samples": outcome.samples, "metrics": finite(outcome.metrics), "confusion": outcome.confusion}
            for name, outcome in evaluation.conditions.items()
        },
        "sweep": [{"p": p, "metrics": finite(metrics)} for p, metrics in evaluation.sweep],
        "sweep_samples": evaluation.sweep_samples,
        "at_floor": evaluation.at_floor,
    }


class _Part(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class _Outcome(_Part):
    samples: NonNegativeInt
    metrics: dict[str, float | None]
    confusion: dict[str, list[list[NonNegativeInt]]] = {}


class _SweepPoint(_Part):
    p: float
    metrics: dict[str, float | None]


class _Evaluation(_Part):
    seed: int
    conditions: dict[str, _Outcome]
    sweep: list[_SweepPoint]
    sweep_samples: NonNegativeInt
    at_floor: dict[str, bool | None] = {}


def evaluation_from_json(value: Any) -> SeedEvaluation:
    """The inverse of `evaluation_to_json`.

    Raises:
        ValueError: it is no such value; one line says where.
    """
    try:
        saved = _Evaluation.model_validate(value)
    except ValidationError as error:
        raise ValueError(first_problem(error)) from None

    def with_nan(values: dict[str, float | None]) -> dict[str, float]:
        return {key: math.nan if value is None else value for key, value in values.items()}

    return SeedEvaluation(
        seed=saved.seed,
        conditions={
            name: Outcome(outcome.samples, with_nan(outcome.metrics), outcome.confusion)
            for name, outcome in saved.conditions.items()
        },
        sweep=[(point.p, with_nan(point.metrics)) for point in saved.sweep],
        sweep_samples=saved.sweep_samples,
        at_floor=saved.at_floor,
    )


def _check_confusion(condition: str, outcome: Outcome, task: Task) -> None:
    """Refuse matrices that are not the task's; an evaluation of an earlier version has none.

    Raises:
        ValueError: they are not.
    """
    matrices = outcome.confusion
    if not matrices:
        return
    sizes = {key: len(metrics.confused_classes(key)) for key in metrics.CONFUSED[task.name]}
    fit = matrices.keys() == sizes.keys() and all(
        len(matrices[key]) == size
        and all(len(row) == size for row in matrices[key])
        and sum(map(sum, matrices[key])) == outcome.samples
        for key, size in sizes.items()
    )
    if not fit:
        raise ValueError(f"its confusion matrices of {condition}")


def read_evaluation(session: Session, seed: int, directory: Path) -> SeedEvaluation | None:
    """The evaluation of a finished seed; None where it is not finished, or its file is not that of this seed's.

    The latter is said: the model is there to be evaluated again.
    """
    path = directory / EVALUATION_FILE
    if not path.exists():
        return None
    test, sweep = session.dataset.splits["test"], list(session.config.eval.sweep)
    samples = {name: len(test.tested(name)) for name in CONDITIONS}
    try:
        evaluation = evaluation_from_json(read_json(path, "a seed's evaluation"))
        counts = {name: outcome.samples for name, outcome in evaluation.conditions.items()}
        ratios = [p for p, _ in evaluation.sweep]
        if (evaluation.seed, counts, ratios) != (seed, samples, sweep):
            raise ValueError(f"of seed {evaluation.seed}, {sum(counts.values())} samples and the sweep {ratios}")
        if sweep and evaluation.sweep_samples != samples["lav"]:
            raise ValueError(f"its sweep of {evaluation.sweep_samples} samples")
        for name, outcome in evaluation.conditions.items():
            _check_confusion(name, outcome, session.config.task)
        return evaluation
    except UserError as error:
        reason = str(error)
    except ValueError as error:
        reason = f"{path}: not the evaluation of this seed: {error}"
    session.say(f"{reason}; evaluating seed {seed} anew", "yellow")
    return None
