"""What a model is measured against: the floor (predictors that see no features) and the ideal (the true posterior).

Both return the same keys as `metrics.compute`, so tables can print *floor, ours, ideal* under each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from fastmmkd.data.dataset import EMOTIONS, Dataset
from fastmmkd.evaluation import metrics
from fastmmkd.modalities import CONDITIONS
from fastmmkd.tasks import Task

BINNED = ("acc7", "acc5", "acc3", "acc2_sims", "f1_sims", "acc3_sims", "acc5_sims")
"""Metrics that compare classes of scores, of which one is the most frequent or the most probable."""


def floor(task: Task, test_labels: np.ndarray, train_labels: np.ndarray) -> dict[str, float]:
    """Per metric, the best value that any of the `trivial` predictors reaches on the test labels.

    Taking the best one per metric makes the floor hard on purpose: a model above it has learned from features.
    On a test split with 379 negative and 277 positive labels, as MOSI has, the F1 non0 floor is at least 42.3.

    Args:
        test_labels: `[N]` or `[N, 4]` as stored, of the samples that are evaluated.
        train_labels: `[M]` or `[M, 4]`, M >= 1, from which majority, mean and median are taken.

    Returns:
        `metrics.keys(task)` -> value; all NaN for N = 0.

    Raises:
        ValueError: `train_labels` is empty.
    """
    return best(task, trivial(task, test_labels, train_labels))


class References(NamedTuple):
    """What a result set is held against, as `results.combine` takes it."""

    floors: dict[str, dict[str, float]]
    """Condition -> `floor` on the samples that it is evaluated on; no key where there are none."""
    ideals: dict[str, dict[str, float]] | None
    """Condition -> `ideal`; None where the posterior is unknown (real data)."""
    trivial: dict[str, dict[str, float]]
    """On the samples that have everything."""
    used: dict[str, dict[str, int]]
    """Condition -> `metrics.used`."""


def references(task: Task, dataset: Dataset) -> References:
    """Floors and ideals of a data set's test split under every condition."""
    test, train = dataset.splits["test"], dataset.splits["train"]
    of_floor, of_ideal, used = {}, {}, {}
    for condition in CONDITIONS:
        rows = test.tested(condition)
        used[condition] = metrics.used(task, test.labels[rows])
        if len(rows):
            of_floor[condition] = floor(task, test.labels[rows], train.labels)
        if len(rows) and condition in test.ideal and dataset.ideal_support is not None:
            of_ideal[condition] = ideal(task, test.labels[rows], test.ideal[condition][rows], dataset.ideal_support)
    whole = trivial(task, test.labels[test.present.all(axis=1)], train.labels)
    return References(of_floor, of_ideal or None, whole, used)


def constant(task: Task, labels: np.ndarray) -> dict[str, float]:
    """Per metric, and for the task's `loss`, the best value that any constant prediction reaches on these labels.

    Unlike those of `floor`, the constants are fitted to the labels that they are judged by: a network that ignores its
    input cannot get past them, however many of its epochs are tried on these labels.

    Args:
        labels: `[N]` or `[N, 4]` as stored, N >= 1.

    Returns:
        `metrics.selectable(task)` -> value.

    Raises:
        ValueError: `labels` is empty.
    """
    labels = np.asarray(labels, dtype=np.float64)
    best = floor(task, labels, labels)
    targets = task.targets(labels)
    if task.is_regression or task.name == "emotions-binary":
        predictions = np.broadcast_to(targets.mean(axis=0, dtype=np.float64), targets.shape)
    else:
        frequencies = np.bincount(targets[:, 0], minlength=task.outputs) / len(labels)
        predictions = np.broadcast_to(frequencies, (len(labels), task.outputs))
    return best | {"loss": metrics.loss(task, labels, predictions)}


def best(task: Task, predictors: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Per metric, the best value over several predictors; NaN where none has one."""
    chosen = {}
    for key in metrics.keys(task):
        values = [v[key] for v in predictors.values() if not np.isnan(v[key])]
        pick = max if metrics.higher_is_better(key) else min
        chosen[key] = pick(values) if values else float("nan")
    return chosen


def trivial(task: Task, test_labels: np.ndarray, train_labels: np.ndarray) -> dict[str, dict[str, float]]:
    """Each trivial predictor's metrics; NaN for a metric the predictor says nothing about.

    Scores: `always-negative` (signs), `always-majority` (for each class metric the most frequent of that metric's own
    classes in the training labels), `always-mean` and `always-median` (that training score for every sample; the
    median is the constant with the least absolute error). Emotions: `always-negative` (the emotion does not hold) and
    `always-majority`, per emotion or of the single label.

    Arguments and errors as in `floor`.
    """
    test = np.asarray(test_labels, dtype=np.float64)
    train = np.asarray(train_labels, dtype=np.float64)
    if len(train) == 0:
        raise ValueError("the floor needs at least one training label")
    by_kind = {"emotions-binary": _trivial_emotions, "emotions-4way": _trivial_single_label}
    made = by_kind.get(task.name, _trivial_scores)(train)
    n = len(test)
    return {
        name: metrics.score_all(task, test, {key: np.repeat(np.asarray(c)[None], n, 0) for key, c in constants.items()})
        for name, constants in made.items()
    }


def ideal(task: Task, labels: np.ndarray, posterior: np.ndarray, support: np.ndarray) -> dict[str, float]:
    """Metrics of the classifier that knows the posterior and decides optimally for each metric.

    MAE: posterior median. Acc-7, Acc-5, Acc-3, all classes of CH-SIMS: the most probable bin. *non0*: positive where
    P(y > 0) > P(y < 0); *has0*: non-negative where P(y >= 0) >= P(y < 0). Correlation, and a metric of scores that is
    not named: posterior mean. Emotions: an emotion holds where its probability exceeds one half; the single label is
    the most probable one.
    (These maximise accuracy; for F1, which has no per-sample optimum, they are the standard choice.)

    Args:
        labels: `[N]` or `[N, 4]` as stored.
        posterior: `[N, C]`, rows sum to 1.
        support: `[C]` the label values that the columns stand for: scores, or indices into `EMOTIONS`.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    labels = np.asarray(labels, dtype=np.float64)
    posterior = np.asarray(posterior, dtype=np.float64)
    support = np.asarray(support, dtype=np.float64)
    if posterior.shape != (len(labels), len(support)):
        raise ValueError(f"posterior has shape {posterior.shape}, expected {(len(labels), len(support))}")
    decide = _ideal_scores if task.has_scores else _ideal_emotions
    return metrics.score_all(task, labels, decide(posterior, support))


def _trivial_scores(train: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    nonzero = train[train != 0]
    majority = metrics.sign_decisions(
        nonnegative=np.asarray((train >= 0).mean() >= 0.5),
        positive=np.asarray(len(nonzero) == 0 or (nonzero > 0).mean() >= 0.5),
    )
    as_decisions = metrics.score_decisions(train)
    majority |= {key: _mode(as_decisions[key]) for key in BINNED}
    never = np.asarray(False)
    negative = metrics.sign_decisions(nonnegative=never, positive=never)
    return {
        "always-negative": negative | dict.fromkeys(("acc2_sims", "f1_sims"), np.asarray(0)),
        "always-majority": majority,
        "always-mean": metrics.score_decisions(train.mean()),
        "always-median": metrics.score_decisions(np.median(train)),
    }


def _trivial_emotions(train: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    majority = (train > 0.5).mean(axis=0) > 0.5
    constants = {"always-negative": np.zeros_like(majority), "always-majority": majority}
    return {
        name: {key: made[0] for key, made in metrics.emotion_decisions(holds[None]).items()}
        for name, holds in constants.items()
    }


def _trivial_single_label(train: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    majority = metrics.single_label_decisions(_mode(train.argmax(axis=1)))
    never = {key: np.asarray(False) for key in majority if key.endswith("_ovr")}
    return {"always-negative": never, "always-majority": majority}


def _mode(values: np.ndarray) -> np.ndarray:
    distinct, counts = np.unique(values, return_counts=True)
    return distinct[counts.argmax()]


def _ideal_scores(posterior: np.ndarray, support: np.ndarray) -> dict[str, np.ndarray]:
    order = np.argsort(support)
    posterior, support = posterior[:, order], support[order]
    negative, positive = posterior[:, support < 0].sum(axis=1), posterior[:, support > 0].sum(axis=1)
    zero = posterior[:, support == 0].sum(axis=1)
    total = posterior.sum(axis=1, keepdims=True)
    bins = metrics.score_decisions(support)
    made = metrics.score_decisions(posterior @ support)
    made |= {key: _most_probable(posterior, bins[key]) for key in BINNED}
    median = support[(posterior.cumsum(axis=1) >= total / 2).argmax(axis=1)]
    made |= {"mae": median, "mae_sims": median}
    return made | metrics.sign_decisions(nonnegative=positive + zero >= negative, positive=positive > negative)


def _most_probable(posterior: np.ndarray, bins: np.ndarray) -> np.ndarray:
    """The bin with the most posterior mass; `bins` `[C]` says into which bin each column falls."""
    values = np.unique(bins)
    mass = np.stack([posterior[:, bins == value].sum(axis=1) for value in values], axis=1)
    return values[mass.argmax(axis=1)]


def _ideal_emotions(posterior: np.ndarray, support: np.ndarray) -> dict[str, np.ndarray]:
    by_emotion = np.stack([posterior[:, support == i].sum(axis=1) for i in range(len(EMOTIONS))], axis=1)
    made = metrics.emotion_decisions(by_emotion > 0.5) | metrics.single_label_decisions(by_emotion.argmax(axis=1))
    for i, emotion in enumerate(EMOTIONS):
        made |= {f"acc_{emotion}_ovr": by_emotion[:, i] > 0.5, f"f1_{emotion}_ovr": by_emotion[:, i] > 0.5}
    return made
