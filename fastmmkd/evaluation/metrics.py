"""The field's metrics, one definition for models, floors and ideal classifiers.

Every metric compares the labels with a *decision*: a score, a bin, or a yes/no per sample. `decisions` says how a
model's predictions become decisions, `score` compares them; `floors` makes its own decisions and shares `score`.

    key                        compares
    mae, corr                  raw scores: mean absolute error, Pearson correlation
    acc7, acc5                 scores clipped to +-3 (+-2) and rounded half to even
    acc3                       sign: negative, zero, positive
    acc2_has0, f1_has0         y >= 0 against y < 0, all samples
    acc2_non0, f1_non0         y > 0 against y < 0, samples with y == 0 dropped
    acc_<emotion>, f1_<emotion>            whether the emotion holds; `acc`, `f1`: the mean over the four emotions
    acc_4way, f1_4way                      the single label
    acc_<emotion>_ovr, f1_<emotion>_ovr    the single label is this emotion, or another

F1 is the weighted F1 of scikit-learn, `f1_score(true, predicted, average="weighted")`; swapping the two arguments
reads several points too high. Accuracies and F1 are in percent, MAE and correlation are not.
A metric that has no sample to be computed on (after dropping zeros) is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from sklearn.metrics import accuracy_score, f1_score

from fastmmkd.data.store import EMOTIONS
from fastmmkd.errors import UserError
from fastmmkd.tasks import Task

SIGN_KEYS = ("f1_non0", "acc2_non0", "f1_has0", "acc2_has0")

KEYS: dict[str, tuple[str, ...]] = {
    "regression": ("f1_non0", "mae", "corr", "acc2_non0", "f1_has0", "acc2_has0", "acc7", "acc5"),
    "classification-2": SIGN_KEYS,
    "classification-3": (*SIGN_KEYS, "acc3"),
    "classification-7": (*SIGN_KEYS, "acc7"),
    "emotions-binary": ("f1", *(f"f1_{e}" for e in EMOTIONS), "acc", *(f"acc_{e}" for e in EMOTIONS)),
    "emotions-4way": (
        "f1_4way",
        "acc_4way",
        *(f"f1_{e}_ovr" for e in EMOTIONS),
        *(f"acc_{e}_ovr" for e in EMOTIONS),
    ),
}
"""Task name -> its metric keys; the first one is the headline metric."""

_TITLES = {
    "mae": "MAE",
    "corr": "Pearson correlation",
    "acc7": "Acc-7 (%)",
    "acc5": "Acc-5 (%)",
    "acc3": "Acc-3 (%)",
    "acc2_has0": "Acc-2 has0 (%)",
    "acc2_non0": "Acc-2 non0 (%)",
    "f1_has0": "F1 has0 (%)",
    "f1_non0": "F1 non0 (%)",
    "f1": "F1, mean of the emotions (%)",
    "acc": "Accuracy, mean of the emotions (%)",
    "f1_4way": "F1 4-way (%)",
    "acc_4way": "Accuracy 4-way (%)",
}


def keys(task: Task) -> tuple[str, ...]:
    """Metric keys that `compute` returns for the task, the headline metric first."""
    return KEYS[task.name]


def selectable(task: Task) -> tuple[str, ...]:
    """What a checkpoint can be chosen by: the metrics, and the task's `loss`."""
    return (*KEYS[task.name], "loss")


def primary(task: Task) -> str:
    """The headline metric: `f1_non0` for scores, `f1` for four binary emotions, `f1_4way` for the single label."""
    return KEYS[task.name][0]


def higher_is_better(key: str) -> bool:
    """False only for the mean absolute error and the loss."""
    return key not in ("mae", "loss")


def better(key: str, value: float, than: float) -> bool:
    """Whether a value of a metric, or of the loss, is strictly better than another."""
    return value > than if higher_is_better(key) else value < than


def is_percent(key: str) -> bool:
    """Whether the metric is reported in percent: all but MAE and correlation."""
    return key not in ("mae", "corr")


def title(key: str) -> str:
    """Name for tables and axes: `"f1_non0"` -> `"F1 non0 (%)"`, `"acc_happy_ovr"` -> `"Accuracy happy vs rest (%)"`."""
    if key in _TITLES:
        return _TITLES[key]
    measure, _, problem = key.partition("_")
    return f"{'F1' if measure == 'f1' else 'Accuracy'} {problem.replace('_ovr', ' vs rest')} (%)"


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
    """Scores `[N]` -> decisions for every metric of the score tasks."""
    made = {"mae": scores, "corr": scores, "acc7": _rounded(scores, 3), "acc5": _rounded(scores, 2)}
    return made | {"acc3": np.sign(scores)} | sign_decisions(nonnegative=scores >= 0, positive=scores > 0)


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
    made = {"f1": holds, "acc": holds}
    for i, emotion in enumerate(EMOTIONS):
        made |= {f"f1_{emotion}": holds[:, i], f"acc_{emotion}": holds[:, i]}
    return made


def single_label_decisions(label: np.ndarray) -> dict[str, np.ndarray]:
    """`[N]` index into `EMOTIONS` -> decisions of `emotions-4way`."""
    made = {"f1_4way": label, "acc_4way": label}
    for i, emotion in enumerate(EMOTIONS):
        made |= {f"f1_{emotion}_ovr": label == i, f"acc_{emotion}_ovr": label == i}
    return made


def score_all(task: Task, labels: np.ndarray, made: Mapping[str, np.ndarray]) -> dict[str, float]:
    """`score` for every metric of the task that has a decision, NaN for the others."""
    return {key: score(key, labels, made[key]) if key in made else float("nan") for key in keys(task)}


def score(key: str, labels: np.ndarray, decision: np.ndarray) -> float:
    """One metric.

    Args:
        labels: `[N]` or `[N, 4]` as stored.
        decision: `[N]` (for `acc` and `f1`: `[N, 4]` bool), on all samples, zeros included.

    Returns:
        The value; NaN where no sample is left. The correlation is 0 where predictions or labels are constant (they
        explain nothing), NaN for fewer than two samples.
    """
    if key in ("f1", "acc"):
        return float(np.mean([score(f"{key}_{e}", labels, decision[:, i]) for i, e in enumerate(EMOTIONS)]))
    if key == "mae":
        return float(np.abs(labels - decision).mean()) if len(labels) else float("nan")
    if key == "corr":
        return _correlation(labels, decision)
    if key.endswith("_non0"):
        labels, decision = labels[labels != 0], decision[labels != 0]
    if len(labels) == 0:
        return float("nan")
    true = _truth(key, labels)
    if key.startswith("f1"):
        return 100.0 * float(f1_score(true, decision, average="weighted", zero_division=0))
    return 100.0 * float(accuracy_score(true, decision))


def _truth(key: str, labels: np.ndarray) -> np.ndarray:
    """Labels -> what the decision of a class metric should have been."""
    kind = key.partition("_")[2]
    if kind == "has0":
        return labels >= 0
    if kind == "non0":
        return labels > 0
    if kind == "4way":
        return labels.argmax(axis=1)
    if kind.endswith("_ovr"):
        return labels.argmax(axis=1) == EMOTIONS.index(kind.removesuffix("_ovr"))
    if kind:
        return labels[:, EMOTIONS.index(kind)] > 0.5
    return {"acc7": _rounded(labels, 3), "acc5": _rounded(labels, 2), "acc3": np.sign(labels)}[key]


def _rounded(scores: np.ndarray, limit: int) -> np.ndarray:
    # np.round rounds half to even, as the public code of the field does.
    return np.round(np.clip(scores, -limit, limit))


def _correlation(labels: np.ndarray, scores: np.ndarray) -> float:
    if len(labels) < 2:
        return float("nan")
    x, y = labels - labels.mean(), scores - scores.mean()
    norm = float(np.linalg.norm(x) * np.linalg.norm(y))
    if np.ptp(labels) == 0 or np.ptp(scores) == 0 or norm == 0:
        return 0.0
    return float(np.clip(x @ y / norm, -1.0, 1.0))


def _check_shapes(task: Task, labels: np.ndarray, predictions: np.ndarray) -> None:
    n = len(labels)
    expected_labels = (n,) if task.label_kind == "score" else (n, len(EMOTIONS))
    if labels.shape != expected_labels:
        raise ValueError(f"labels have shape {labels.shape}, task {task.name} needs {expected_labels}")
    width = () if task.is_regression else (task.outputs // 2 if task.name == "emotions-binary" else task.outputs,)
    if predictions.shape != (n, *width):
        raise ValueError(f"predictions have shape {predictions.shape}, task {task.name} needs {(n, *width)}")
