"""The field's metrics, one definition for models, floors and ideal classifiers.

A metric compares what is true of the labels with a *decision*: a score, a bin, or a yes/no per sample. Mostly the
decision is what is true of predicted labels; `decisions` says how a model's predictions become decisions, `floors`
makes its own. Adding a metric is an entry in `METRICS`.

    key                        compares
    mae, corr                  raw scores: mean absolute error, Pearson correlation
    acc7, acc5                 scores clipped to +-3 (+-2) and rounded half to even
    acc3                       sign: negative, zero, positive
    acc2_has0, f1_has0         y >= 0 against y < 0, all samples
    acc2_non0, f1_non0         y > 0 against y < 0, samples with y == 0 dropped
    acc2_sims, f1_sims, acc3_sims, acc5_sims     the classes of CH-SIMS (`fastmmkd.labels.SIMS_EDGES`)
    mae_sims, corr_sims        scores clipped to +-1
    acc_<emotion>, f1_<emotion>            whether the emotion holds; `acc`, `f1`: the mean over the four emotions
    acc_4way, f1_4way                      the single label
    acc_<emotion>_ovr, f1_<emotion>_ovr    the single label is this emotion, or another

F1 is the weighted F1 of scikit-learn, `f1_score(true, predicted, average="weighted")`; swapping the two arguments
reads several points too high. Accuracies and F1 are in percent, MAE and correlation are not.
The metrics of CH-SIMS are those of MMSA, the toolkit of its authors: everything is clipped to +-1 first.
A metric that has no sample to be computed on (after dropping zeros) is NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from fastmmkd.errors import UserError
from fastmmkd.labels import EMOTIONS, SIMS_EDGES, sims_classes
from fastmmkd.tasks import Task

Truth = Callable[[np.ndarray], np.ndarray]
"""Labels as stored, `[...]` scores or `[..., 4]` emotion indicators -> what a decision about them should be."""
Score = Callable[[np.ndarray, np.ndarray], float]
"""The truth and the decisions of N samples, in this order -> a number; NaN where no sample is left."""


@dataclass(frozen=True)
class Metric:
    """One number that predictions are judged by."""

    key: str
    """Its name in `results.json`."""
    title: str
    """Its name in tables and on axes."""
    higher_is_better: bool
    percent: bool
    truth: Truth
    score: Score
    used: Callable[[np.ndarray], int] = len
    """The truth of N samples -> how many of them the score is computed on."""


def nonzero(truth: np.ndarray) -> int:
    return int(np.count_nonzero(truth))


def as_labelled(scores: np.ndarray) -> np.ndarray:
    """The scores themselves."""
    return scores


def rounded(limit: int) -> Truth:
    """Scores clipped to +- `limit` and rounded half to even, as the public code of the field does."""
    return lambda scores: np.round(np.clip(scores, -limit, limit))


def within(limit: float) -> Truth:
    """Scores clipped to +- `limit`."""
    return lambda scores: np.clip(scores, -limit, limit)


def sims_class_of(classes: int) -> Truth:
    return lambda scores: sims_classes(np.clip(scores, -1, 1), classes)


def nonnegative(scores: np.ndarray) -> np.ndarray:
    return scores >= 0


def all_that_hold(emotions: np.ndarray) -> np.ndarray:
    return emotions > 0.5


def holds(emotion: str) -> Truth:
    return lambda emotions: emotions[..., EMOTIONS.index(emotion)] > 0.5


def single_label(emotions: np.ndarray) -> np.ndarray:
    return emotions.argmax(axis=-1)


def single_label_is(emotion: str) -> Truth:
    return lambda emotions: emotions.argmax(axis=-1) == EMOTIONS.index(emotion)


def mean_absolute_error(truth: np.ndarray, decision: np.ndarray) -> float:
    return float(np.abs(truth - decision).mean()) if len(truth) else float("nan")


def correlation(truth: np.ndarray, decision: np.ndarray) -> float:
    """Pearson's; 0 where either is constant (it explains nothing), NaN for fewer than two samples."""
    if len(truth) < 2:
        return float("nan")
    x, y = truth - truth.mean(), decision - decision.mean()
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    if np.ptp(truth) == 0 or np.ptp(decision) == 0 or norm == 0:
        return 0.0
    return float(np.clip(x @ y / norm, -1.0, 1.0))


def accuracy(truth: np.ndarray, decision: np.ndarray) -> float:
    """In percent."""
    return 100.0 * float((truth == decision).mean()) if len(truth) else float("nan")


def weighted_f1(truth: np.ndarray, decision: np.ndarray) -> float:
    """In percent."""
    if not len(truth):
        return float("nan")
    from sklearn.metrics import f1_score  # a second, which reading a config or a report need not wait for

    return 100.0 * float(f1_score(truth, decision, average="weighted", zero_division=0))


def without_zeros(score: Score) -> Score:
    """Positive against negative, on the samples whose score is not zero; truth and decision are signs, or scores."""
    return lambda truth, decision: score(truth[truth != 0] > 0, decision[truth != 0] > 0)


def mean_over_emotions(score: Score) -> Score:
    """Truth and decision are `[N, 4]` bool."""
    return lambda truth, decision: float(np.mean([score(truth[:, i], decision[:, i]) for i in range(len(EMOTIONS))]))


SIGNS = (
    Metric("f1_non0", "F1 non0 (%)", True, True, np.sign, without_zeros(weighted_f1), used=nonzero),
    Metric("acc2_non0", "Acc-2 non0 (%)", True, True, np.sign, without_zeros(accuracy), used=nonzero),
    Metric("f1_has0", "F1 has0 (%)", True, True, nonnegative, weighted_f1),
    Metric("acc2_has0", "Acc-2 has0 (%)", True, True, nonnegative, accuracy),
)
ACC7 = Metric("acc7", "Acc-7 (%)", True, True, rounded(3), accuracy)

METRICS: dict[str, tuple[Metric, ...]] = {
    "regression": (
        SIGNS[0],
        Metric("mae", "MAE", False, False, as_labelled, mean_absolute_error),
        Metric("corr", "Pearson correlation", True, False, as_labelled, correlation),
        *SIGNS[1:],
        ACC7,
        Metric("acc5", "Acc-5 (%)", True, True, rounded(2), accuracy),
    ),
    "regression-sims": (
        Metric("f1_sims", "F1 SIMS (%)", True, True, sims_class_of(2), weighted_f1),
        Metric("mae_sims", "MAE SIMS", False, False, within(1), mean_absolute_error),
        Metric("corr_sims", "Pearson correlation SIMS", True, False, within(1), correlation),
        *(Metric(f"acc{n}_sims", f"Acc-{n} SIMS (%)", True, True, sims_class_of(n), accuracy) for n in SIMS_EDGES),
    ),
    "classification-2": SIGNS,
    "classification-3": (*SIGNS, Metric("acc3", "Acc-3 (%)", True, True, np.sign, accuracy)),
    "classification-7": (*SIGNS, ACC7),
    "emotions-binary": (
        Metric("f1", "F1, mean of the emotions (%)", True, True, all_that_hold, mean_over_emotions(weighted_f1)),
        *(Metric(f"f1_{e}", f"F1 {e} (%)", True, True, holds(e), weighted_f1) for e in EMOTIONS),
        Metric("acc", "Accuracy, mean of the emotions (%)", True, True, all_that_hold, mean_over_emotions(accuracy)),
        *(Metric(f"acc_{e}", f"Accuracy {e} (%)", True, True, holds(e), accuracy) for e in EMOTIONS),
    ),
    "emotions-4way": (
        Metric("f1_4way", "F1 4-way (%)", True, True, single_label, weighted_f1),
        Metric("acc_4way", "Accuracy 4-way (%)", True, True, single_label, accuracy),
        *(Metric(f"f1_{e}_ovr", f"F1 {e} vs rest (%)", True, True, single_label_is(e), weighted_f1) for e in EMOTIONS),
        *(
            Metric(f"acc_{e}_ovr", f"Accuracy {e} vs rest (%)", True, True, single_label_is(e), accuracy)
            for e in EMOTIONS
        ),
    ),
}
"""Task name -> its metrics; the first one is the headline metric."""

CONFUSED: dict[str, tuple[str, ...]] = {
    "regression": ("acc7",),
    "regression-sims": ("acc5_sims",),
    "classification-2": ("acc2_has0",),
    "classification-3": ("acc3",),
    "classification-7": ("acc7",),
    "emotions-binary": tuple(f"acc_{e}" for e in EMOTIONS),
    "emotions-4way": ("acc_4way",),
}
"""Task name -> the accuracies whose confusion matrices are kept: those of the finest classes."""

_CONFUSED_CLASSES: dict[str, tuple[tuple[str, int], ...]] = {
    "acc7": tuple((f"{score:+d}" if score else "0", score) for score in range(-3, 4)),
    "acc5_sims": (("negative", 0), ("weakly negative", 1), ("neutral", 2), ("weakly positive", 3), ("positive", 4)),
    "acc2_has0": (("negative", False), ("nonnegative", True)),
    "acc3": (("negative", -1), ("zero", 0), ("positive", 1)),
    **{f"acc_{e}": (("other", False), (e, True)) for e in EMOTIONS},
    "acc_4way": tuple((emotion, i) for i, emotion in enumerate(EMOTIONS)),
}
"""Accuracy -> its classes: name, and the value of truths and decisions that stands for it."""

_BY_KEY = {metric.key: metric for of_task in METRICS.values() for metric in of_task}
_OF_SCORES = {m.key: m for name, of_task in METRICS.items() if Task(name).has_scores for m in of_task}


def keys(task: Task) -> tuple[str, ...]:
    """Metric keys that `compute` returns for the task, the headline metric first."""
    return tuple(metric.key for metric in METRICS[task.name])


def selectable(task: Task) -> tuple[str, ...]:
    """What a checkpoint can be chosen by: the metrics, and the task's `loss`."""
    return (*keys(task), "loss")


def primary(task: Task) -> str:
    """The headline metric: `f1_non0` for scores, `f1_sims` for those of CH-SIMS, `f1` for four binary emotions,
    `f1_4way` for the single label."""
    return METRICS[task.name][0].key


def higher_is_better(key: str) -> bool:
    """False only for mean absolute errors and the loss."""
    return key != "loss" and _BY_KEY[key].higher_is_better


def of_emotions(task: Task) -> tuple[str, ...]:
    """The F1 of each emotion, which the papers report one by one; none where labels are scores."""
    suffix = {"emotions-binary": "", "emotions-4way": "_ovr"}.get(task.name)
    return () if suffix is None else tuple(f"f1_{emotion}{suffix}" for emotion in EMOTIONS)


def error(task: Task) -> str:
    """What a regression's checkpoint is chosen by, if nothing else is: its mean absolute error."""
    return next(key for key in keys(task) if not higher_is_better(key))


def better(key: str, value: float, than: float) -> bool:
    """Whether a value of a metric, or of the loss, is strictly better than another."""
    return value > than if higher_is_better(key) else value < than


def is_percent(key: str) -> bool:
    """Whether the metric is reported in percent: all but MAE and correlation."""
    return _BY_KEY[key].percent


def limits(key: str) -> tuple[float, float] | None:
    """The least and the greatest value that a metric can have; None for one that is not known here."""
    if key not in _BY_KEY:
        return None
    if _BY_KEY[key].percent:
        return 0.0, 100.0
    return (-1.0, 1.0) if _BY_KEY[key].higher_is_better else (0.0, float("inf"))


def title(key: str) -> str:
    """Name for tables and axes: `"f1_non0"` -> `"F1 non0 (%)"`, `"acc_happy_ovr"` -> `"Accuracy happy vs rest (%)"`."""
    return _BY_KEY[key].title


def compute(task: Task, labels: np.ndarray, predictions: np.ndarray) -> dict[str, float]:
    """All metrics of a task.

    Args:
        labels: as stored: `[N]` scores, or `[N, 4]` emotion indicators in the order of `EMOTIONS`.
        predictions: as `Task.predictions` documents: `[N]` scores, `[N, K]` class probabilities, or `[N, 4]`
            probabilities that each emotion holds.

    Returns:
        `keys(task)` -> value; all NaN for N = 0.

    Raises:
        ValueError: labels or predictions have another shape.
        UserError: predictions hold NaN or infinity, which a threshold would silently read as "negative".
    """
    labels = np.asarray(labels, dtype=np.float64)
    predictions = np.asarray(predictions, dtype=np.float64)
    _check_shapes(task, labels, predictions)
    bad = int((~np.isfinite(predictions).reshape(len(predictions), -1).all(axis=1)).sum()) if len(predictions) else 0
    if bad:
        raise UserError(f"{bad} of {len(predictions)} predictions are NaN or infinite: the model has diverged")
    return score_all(task, labels, decisions(task, predictions))


def used(task: Task, labels: np.ndarray) -> dict[str, int]:
    """Per metric of a task, how many of some samples it is computed on: *non0* leaves out those labelled 0.

    Args:
        labels: `[N]` or `[N, 4]` as stored.
    """
    labels = np.asarray(labels, dtype=np.float64)
    return {metric.key: metric.used(metric.truth(labels)) for metric in METRICS[task.name]}


def confusion(task: Task, labels: np.ndarray, predictions: np.ndarray) -> dict[str, list[list[int]]]:
    """Confusion matrices of a task's finest classes: accuracy (`CONFUSED`) -> counts `[true][decided]`.

    Args:
        labels, predictions: as `compute` takes them.
    """
    labels = np.asarray(labels, dtype=np.float64)
    made = decisions(task, np.asarray(predictions, dtype=np.float64))
    matrices = {}
    for key in CONFUSED[task.name]:
        values = np.array([value for _, value in _CONFUSED_CLASSES[key]], dtype=np.float64)
        true, decided = (
            np.searchsorted(values, of.astype(np.float64)) for of in (_BY_KEY[key].truth(labels), made[key])
        )
        counts = np.zeros((len(values), len(values)), dtype=np.int64)
        np.add.at(counts, (true, decided), 1)
        matrices[key] = counts.tolist()
    return matrices


def confused_classes(key: str) -> tuple[str, ...]:
    """Names of the rows and columns of a matrix of `confusion`."""
    return tuple(name for name, _ in _CONFUSED_CLASSES[key])


def loss(task: Task, labels: np.ndarray, predictions: np.ndarray) -> float:
    """The task's loss of predictions: MSE, or cross-entropy in nats, averaged over problems. NaN for N = 0.

    Args:
        labels, predictions: as `compute` takes them.
    """
    if not len(labels):
        return float("nan")
    targets = task.targets(np.asarray(labels))
    if task.is_regression:
        return float(np.square(predictions - targets).mean())
    if task.name == "emotions-binary":
        likelihood = np.where(targets == 1, predictions, 1 - predictions)
    else:
        likelihood = np.take_along_axis(predictions, targets, axis=1)
    return float(-np.log(likelihood.clip(np.finfo(np.float64).tiny)).mean())


def decisions(task: Task, predictions: np.ndarray) -> dict[str, np.ndarray]:
    """Predictions -> the decision that each metric of the task judges.

    From class probabilities the sign comes from the probability mass: *non0* says positive where
    P(classes > 0) > P(classes < 0), *has0* says non-negative where P(classes >= 0) >= P(classes < 0).
    With two classes the non-negative class stands for both. An emotion holds where its probability exceeds one half.
    """
    if task.is_regression:
        return score_decisions(predictions)
    if task.name == "emotions-binary":
        return emotion_decisions(predictions > 0.5)
    if task.name == "emotions-4way":
        return single_label_decisions(predictions.argmax(axis=1))
    classes = predictions.shape[1]
    below, above = classes // 2, (classes + 1) // 2
    negative, positive = predictions[:, :below].sum(axis=1), predictions[:, above:].sum(axis=1)
    made = sign_decisions(nonnegative=positive + predictions[:, below:above].sum(axis=1) >= negative)
    made |= sign_decisions(positive=positive > negative)
    return made | {f"acc{classes}": predictions.argmax(axis=1) - classes // 2}


def score_decisions(scores: np.ndarray) -> dict[str, np.ndarray]:
    """Scores `[N]` -> decisions for every metric of the score tasks: what is true of these scores."""
    return {key: metric.truth(scores) for key, metric in _OF_SCORES.items()}


def sign_decisions(nonnegative: np.ndarray | None = None, positive: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """`[N]` bool per convention -> decisions for its accuracy and F1."""
    made: dict[str, np.ndarray] = {}
    if nonnegative is not None:
        made |= {"acc2_has0": nonnegative, "f1_has0": nonnegative}
    if positive is not None:
        made |= {"acc2_non0": positive, "f1_non0": positive}
    return made


def emotion_decisions(holds: np.ndarray) -> dict[str, np.ndarray]:
    """`[N, 4]` bool, which emotions hold -> decisions of `emotions-binary`."""
    return {metric.key: metric.truth(holds) for metric in METRICS["emotions-binary"]}


def single_label_decisions(label: np.ndarray) -> dict[str, np.ndarray]:
    """`[N]` index into `EMOTIONS` -> decisions of `emotions-4way`."""
    emotions = np.eye(len(EMOTIONS))[label]
    return {metric.key: metric.truth(emotions) for metric in METRICS["emotions-4way"]}


def score_all(task: Task, labels: np.ndarray, made: Mapping[str, np.ndarray]) -> dict[str, float]:
    """`score` for every metric of the task that has a decision, NaN for the others."""
    return {key: score(key, labels, made[key]) if key in made else float("nan") for key in keys(task)}


def score(key: str, labels: np.ndarray, decision: np.ndarray) -> float:
    """One metric.

    Args:
        labels: `[N]` or `[N, 4]` as stored.
        decision: `[N]` (for `acc` and `f1`: `[N, 4]` bool), on all samples, zeros included.
    """
    metric = _BY_KEY[key]
    return metric.score(metric.truth(labels), decision)


def _check_shapes(task: Task, labels: np.ndarray, predictions: np.ndarray) -> None:
    n = len(labels)
    expected_labels = (n,) if task.has_scores else (n, len(EMOTIONS))
    if labels.shape != expected_labels:
        raise ValueError(f"labels have shape {labels.shape}, task {task.name} needs {expected_labels}")
    width = () if task.is_regression else (task.outputs // 2 if task.name == "emotions-binary" else task.outputs,)
    if predictions.shape != (n, *width):
        raise ValueError(f"predictions have shape {predictions.shape}, task {task.name} needs {(n, *width)}")
