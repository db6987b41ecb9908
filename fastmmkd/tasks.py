"""What is predicted: a task fixes the head's width, the training target, the loss and how logits become predictions.

Shape legend: S models, N samples, O outputs of the head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fastmmkd.labels import EMOTIONS, SCORE_CLASS_NAMES, SIMS_EDGES

if TYPE_CHECKING:  # a config can be read without torch
    import torch


@dataclass(frozen=True)
class Task:
    """One of

    ================== ============ ======= ==========================================================
    name               labels       outputs predictions
    ================== ============ ======= ==========================================================
    regression         score        1       `[N]` score
    regression-sims    sims         1       `[N]` score, in [-1, 1] as those of CH-SIMS; its own metrics
    classification-2   score        2       `[N, 2]` probabilities of negative (< 0), non-negative (>= 0)
    classification-3   score        3       `[N, 3]` probabilities of negative, zero, positive
    classification-7   score        7       `[N, 7]` probabilities of the rounded scores -3 .. 3
    emotions-binary    emotions     8       `[N, 4]` probability that each emotion holds (4 problems x 2 logits)
    emotions-4way      emotions     4       `[N, 4]` probabilities of the single label
    ================== ============ ======= ==========================================================
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in TASKS:
            raise ValueError(f"task {self.name!r} is not one of {', '.join(TASKS)}")

    @property
    def label_kind(self) -> str:
        if self.name == "regression-sims":
            return "sims"
        return "emotions" if self.name.startswith("emotions") else "score"

    @property
    def is_regression(self) -> bool:
        return self.name in ("regression", "regression-sims")

    @property
    def has_scores(self) -> bool:
        """Whether labels are one score each; emotions otherwise."""
        return self.label_kind != "emotions"

    @property
    def outputs(self) -> int:
        """Width O of the head."""
        return TASKS[self.name]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the columns of the predicted probabilities; empty for regression."""
        return SCORE_CLASS_NAMES.get(self.outputs, ()) if self.has_scores else EMOTIONS

    @property
    def problems(self) -> int:
        """Independent softmax problems the logits hold: 4 for `emotions-binary`, else 1."""
        return len(EMOTIONS) if self.name == "emotions-binary" else 1

    def targets(self, labels: np.ndarray) -> np.ndarray:
        """Labels `[N]` or `[N, 4]` -> float32 `[N]` for regression, else int64 class indices `[N, problems]`."""
        if self.is_regression:
            return labels.astype(np.float32)
        if self.name == "emotions-binary":
            return (labels > 0.5).astype(np.int64)
        if self.name == "emotions-4way":
            return labels.argmax(axis=1).astype(np.int64)[:, None]
        return score_classes(labels, self.outputs)[:, None]

    def loss(self, logits_sno: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Task loss per model `[S]`: MSE, or cross-entropy averaged over samples and problems.

        Decision: a mean over the four binary emotions, here and in every distillation loss, so that the weights of the
        losses mean on four problems what they mean on one.

        Args:
            logits_sno: `[S, N, O]`; computed in float32 or better.
            targets: `[S, N]` float for regression, `[S, N, problems]` int64 otherwise.
        """
        logits_sno = _accumulation(logits_sno)
        if self.is_regression:
            return (logits_sno.squeeze(-1) - targets.to(logits_sno.dtype)).square().mean(-1)
        log_p = self.split_problems(logits_sno).log_softmax(-1)
        return -log_p.gather(-1, targets.unsqueeze(-1)).mean((1, 2, 3))

    def divergence(self, teacher: torch.Tensor, student: torch.Tensor) -> torch.Tensor:
        """What keeps a student's responses by its teacher's, per model `[S]`.

        `KL(softmax teacher || softmax student)` averaged over samples and problems; MSE for regression.

        Args:
            teacher, student: logits `[S, N, O]`; computed in float32 or better.
        """
        teacher, student = _accumulation(teacher), _accumulation(student)
        if self.is_regression:
            return (student - teacher).square().mean((1, 2))
        log_t, log_s = (self.split_problems(x).log_softmax(-1) for x in (teacher, student))
        return (log_t.exp() * (log_t - log_s)).sum(-1).mean((1, 2))

    def classes(self, targets: torch.Tensor, bins: int) -> tuple[torch.Tensor, int]:
        """The class of every sample in every problem, int64 `[S, N, problems]`, and how many classes there are.

        Args:
            targets: as `loss` takes them.
            bins: regression only, the classes that scores are binned into: 2, 3 or 7, see `score_classes`. Those of
                CH-SIMS end where its accuracies do; 7 are thrice the score, rounded (decision: it has no seven).
        """
        if not self.is_regression:
            return targets, self.outputs // self.problems
        scores = targets.unsqueeze(-1)
        if self.label_kind == "sims":
            if bins == 7:
                return (3 * scores).round().clamp(-3, 3).long() + 3, 7
            import torch

            return torch.bucketize(scores, scores.new_tensor(SIMS_EDGES[bins])), bins
        if bins == 2:
            return (scores >= 0).long(), 2
        if bins == 3:
            return scores.sign().long() + 1, 3
        return scores.round().clamp(-3, 3).long() + 3, 7

    def split_problems(self, logits: torch.Tensor) -> torch.Tensor:
        """`[..., O]` -> `[..., problems, O / problems]`."""
        return logits.unflatten(-1, (self.problems, -1))

    def predictions(self, logits_no: torch.Tensor) -> np.ndarray:
        """Logits `[N, O]` -> float64 predictions as the table above says."""
        logits = logits_no.detach().double().cpu()
        if self.is_regression:
            return logits.squeeze(-1).numpy()
        p = self.split_problems(logits).softmax(-1)
        return p[..., 1].numpy() if self.name == "emotions-binary" else p.squeeze(-2).numpy()


TASKS = {
    "regression": 1,
    "regression-sims": 1,
    "classification-2": 2,
    "classification-3": 3,
    "classification-7": 7,
    "emotions-binary": 8,
    "emotions-4way": 4,
}


def _accumulation(x: torch.Tensor) -> torch.Tensor:
    from fastmmkd.ops.precision import accumulation

    return accumulation(x)


def score_classes(scores: np.ndarray, classes: int) -> np.ndarray:
    """Bin sentiment scores: 2 = (< 0, >= 0), 3 = (< 0, 0, > 0), 7 = rounded half to even and clipped to +-3."""
    if classes == 2:
        return (scores >= 0).astype(np.int64)
    if classes == 3:
        return np.sign(scores).astype(np.int64) + 1
    return np.clip(np.round(scores), -3, 3).astype(np.int64) + 3
