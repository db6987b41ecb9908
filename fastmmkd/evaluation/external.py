"""Predictions of other programs under the protocol's conditions, into the same tables: `fastmmkd report --external`.

A CSV file with a header, a line for each model, condition and sample:

    id         the sample's id in the data file
    condition  `l`, `a`, `v`, `la`, `lv`, `av`, `lav`: the modalities that were kept; or `p=0.3`: all modalities, that
               ratio of frames missing (`fastmmkd data masks` says which)
    seed       optional: which of several models
    score      a sentiment score; or, of classes, a column `p_<class>` for each: negative and nonnegative; negative,
               zero and positive; -3 to 3; or the emotions, the probability that each holds

Every condition is there with every sample of the test split that has its modalities; of samples that lack one, nothing
is counted. Ratios may be left out.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from fastmmkd.data.dataset import Dataset, Split
from fastmmkd.errors import UserError
from fastmmkd.evaluation import floors, metrics, results
from fastmmkd.evaluation.results import Outcome, SeedEvaluation
from fastmmkd.evaluation.schema import Results
from fastmmkd.files import refuse_special
from fastmmkd.modalities import CONDITIONS
from fastmmkd.tasks import TASKS, Task

Said = dict[tuple[int, str], dict[str, list[float]]]
"""(seed, condition) -> id -> what is predicted."""
EXPECTED = f"one of {', '.join(CONDITIONS)}, or a ratio such as p=0.3"


def read(path: Path, dataset: Dataset, name: str) -> Results:
    """Evaluate a file of predictions on the test split of a data set.

    Args:
        path: the CSV file.
        dataset: with labels and a training split, which gives the floors.
        name: what made them.

    Raises:
        UserError: the file cannot be read or is not as this module says, by line; a condition lacks samples.
    """
    task, said = _read(path, dataset.label_kind)
    test = dataset.splits["test"]
    if unknown := sorted({i for of in said.values() for i in of} - set(test.ids)):
        raise UserError(f"{path}: {len(unknown)} ids are not of the test split, such as {unknown[0]!a}")
    seeds = sorted({seed for seed, _ in said})
    ratios = sorted({_ratio(condition) for _, condition in said if condition not in CONDITIONS})
    evaluations = [
        SeedEvaluation(
            seed,
            {c: _outcome(path, task, test, said, seed, c) for c in CONDITIONS if len(test.tested(c))},
            [(p, _outcome(path, task, test, said, seed, f"p={p:g}").metrics) for p in ratios],
            len(test.tested("lav")),
        )
        for seed in seeds
    ]
    references = floors.references(task, dataset)
    return results.combine(name, dataset.source, dataset.content_hash, task, evaluations, *references)


def _read(path: Path, label_kind: str) -> tuple[Task, Said]:
    said: Said = {}
    try:
        refuse_special(path, "predictions")
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            task, columns = _task(path, header, label_kind)
            for line, cells in _lines(path, reader, len(header)):
                seed, condition, sample, values = _parsed(
                    f"{path}: line {line}", dict(zip(header, cells, strict=True)), columns
                )
                of_condition = said.setdefault((seed, condition), {})
                if sample in of_condition:
                    raise UserError(f"{path}: line {line}: {sample!a} is there twice under {condition}, seed {seed}")
                of_condition[sample] = values
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UserError(f"{path}: cannot be read as CSV ({reason})") from None
    if not said:
        raise UserError(f"{path}: has no predictions, expected a line for each sample and condition")
    return task, said


def _task(path: Path, header: Sequence[str], label_kind: str) -> tuple[Task, list[str]]:
    """The task that the columns are of, and those of what is predicted."""
    known = [task for task in map(Task, TASKS) if task.label_kind == label_kind]
    for task in known:
        columns = ["score"] if task.is_regression else [f"p_{name}" for name in task.class_names]
        if sorted(header) in (sorted(["id", "condition", *columns]), sorted(["id", "condition", "seed", *columns])):
            return task, columns
    forms = [["score"] if task.is_regression else [f"p_{name}" for name in task.class_names] for task in known]
    wanted = " or ".join(dict.fromkeys(", ".join(form) for form in forms))
    has = ", ".join(header) or "nothing"
    raise UserError(f"{path}: has the columns {has}; expected id, condition, perhaps seed, and {wanted}")


def _lines(path: Path, reader: Iterator[list[str]], width: int) -> Iterator[tuple[int, list[str]]]:
    for line, cells in enumerate(reader, start=2):
        if len(cells) != width:
            raise UserError(f"{path}: line {line} has {len(cells)} cells, the header {width}")
        yield line, cells


def _parsed(where: str, cells: dict[str, str], columns: Sequence[str]) -> tuple[int, str, str, list[float]]:
    """Seed, condition, id and values of a line."""
    condition, seed = cells["condition"].strip(), cells.get("seed", "1").strip()
    if condition not in CONDITIONS:
        if not 0 <= (p := _ratio(condition)) <= 1:
            raise UserError(f"{where}: condition is {cells['condition']!a}, expected {EXPECTED}")
        condition = f"p={p:g}"
    if not (seed.isascii() and seed.isdigit() and len(seed) <= 9):
        raise UserError(f"{where}: seed is {cells['seed']!a}, expected a whole number from 0")
    values = [_number(cells[column]) for column in columns]
    for column, value in zip(columns, values, strict=True):
        limits = (-math.inf, math.inf) if column == "score" else (0.0, 1.0)
        if not (math.isfinite(value) and limits[0] <= value <= limits[1]):
            wanted = "a finite number" if column == "score" else "a probability"
            raise UserError(f"{where}: {column} is {cells[column]!a}, expected {wanted}")
    return int(seed), condition, cells["id"], values


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _ratio(condition: str) -> float:
    """p of `"p=0.3"`; NaN of anything else."""
    return _number(condition.removeprefix("p=")) if condition.startswith("p=") else math.nan


def _outcome(path: Path, task: Task, test: Split, said: Said, seed: int, condition: str) -> Outcome:
    rows = test.tested(condition if condition in CONDITIONS else "lav")
    if not len(rows):
        return Outcome(0, {})
    of_condition = said.get((seed, condition), {})
    if lacking := [test.ids[i] for i in rows if test.ids[i] not in of_condition]:
        raise UserError(
            f"{path}: condition {condition}, seed {seed}, lacks {len(lacking)} of {len(rows)} samples of the test "
            f"split, such as {lacking[0]!a}"
        )
    predictions = np.array([of_condition[test.ids[i]] for i in rows])
    predictions = predictions[:, 0] if task.is_regression else predictions
    judged = task, test.labels[rows], predictions
    return Outcome(len(rows), metrics.compute(*judged), metrics.confusion(*judged))
