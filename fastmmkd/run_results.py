"""The result set of a run: floors and ideal beside what was reached, the map of representations, the headline table."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console

from fastmmkd.data.dataset import Dataset
from fastmmkd.evaluation import embedding, floors, report, results
from fastmmkd.evaluation.commands import print_headline
from fastmmkd.evaluation.protocol import Scenario
from fastmmkd.evaluation.results import SeedEvaluation
from fastmmkd.predictor import Predictor
from fastmmkd.run_folder import (
    CONFUSION_FILE,
    CURVES_FILE,
    EMBEDDING_FILE,
    EMBEDDING_PICTURE,
    RESULTS_FILE,
    RESULTS_SHEET,
    RESULTS_TEXT,
)

LANGUAGE_ONLY_HALF = Scenario((True, False, False), p=0.5, index=1 << 10)
"""What the papers' t-SNE pictures show; its index keys draws of its own."""


def write_run_results(
    directory: Path, predictor: Predictor, dataset: Dataset, evaluations: list[SeedEvaluation], console: Console
) -> None:
    """Write `results.{json,md,csv}`, `{curves,confusion}.png` and `embedding.{json,png}`, and print the headline.

    Args:
        directory: where to write; created if missing.
        predictor: one of the run's models, whose representations are mapped.
        dataset: what was evaluated on; its training split gives the floors.
        evaluations: one per seed.
        console: where to print.
    """
    content = results.combine(
        predictor.config.method,
        dataset.source,
        dataset.content_hash,
        predictor.config.task,
        evaluations,
        *floors.references(predictor.config.task, dataset),
    )
    results.write(directory, content)
    draw_embedding(directory, predictor, dataset)
    print_headline(report.comparable(report.load([directory]))[0], console)
    for name in (RESULTS_TEXT, RESULTS_SHEET, RESULTS_FILE, CURVES_FILE, CONFUSION_FILE, EMBEDDING_PICTURE):
        console.print(f"  {directory / name}", markup=False, highlight=False, soft_wrap=True)


def draw_embedding(directory: Path, predictor: Predictor, dataset: Dataset) -> None:
    """t-SNE of joint representations with language only and half of its frames missing, as in the papers.

    The picture is for looking, `embedding.json` for `fastmmkd report`, which shows several side by side.
    """
    test = dataset.splits["test"]
    evaluator = predictor.evaluator(test, str(dataset.path))
    rows = evaluator.rows(LANGUAGE_ONLY_HALF)
    representations = np.zeros((0, 1))
    if len(rows):
        representations = evaluator.run(predictor.module, LANGUAGE_ONLY_HALF, rows)[1]
    placed = embedding.place(representations, test.labels[rows], rows, predictor.seed, "language only, p = 0.5")
    embedding.write(directory / EMBEDDING_FILE, placed)
    title = f"{predictor.config.method}, {placed.condition} (seed {placed.seed})"
    embedding.draw(directory / EMBEDDING_PICTURE, [(title, placed)])
