"""What is kept of one seed while it trains, alone or with others: where it stands, its best model, its records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from fastmmkd.distributed import rank
from fastmmkd.engine.checkpoint import Progress, export_model
from fastmmkd.engine.phases import Phase
from fastmmkd.engine.session import Session
from fastmmkd.engine.telemetry import Journal
from fastmmkd.errors import UserError
from fastmmkd.evaluation import metrics
from fastmmkd.evaluation.protocol import mean_over_conditions
from fastmmkd.evaluation.results import Outcome


class SeedBook:
    """The books of one seed in one phase."""

    def __init__(self, session: Session, phase: Phase, index: int, progress: Progress) -> None:
        self.session, self.phase, self.index, self.progress = session, phase, index, progress
        self.seed = phase.group.seeds[index]

    @property
    def directory(self) -> Path:
        return self.phase.group.directories[self.index]

    @property
    def is_done(self) -> bool:
        """Whether all epochs are over, or patience with them is."""
        phase, progress = self.phase, self.progress
        stale = progress.epoch - progress.best_epoch
        return progress.epoch >= phase.epochs or (phase.patience is not None and stale >= phase.patience)

    def journal(self, step: int) -> Journal:
        """The seed's records, rewound to the end of its last epoch; `step` steps are done."""
        title = self.phase.title(f"seed {self.seed}", self.session.config)
        journal = Journal(self.directory, title, step, self.session.console, silent=rank() > 0)
        journal.rewind(self.progress.epoch)
        return journal

    def add(self, sums: dict[str, float], step: int, seconds: float) -> None:
        """Count the loss parts, summed over the steps since the last call; `step` steps of this epoch are done.

        Raises:
            UserError: the loss is not finite.
        """
        progress = self.progress
        for name, value in sums.items():
            progress.sums[name] = progress.sums.get(name, 0.0) + value
        progress.step = step
        progress.seconds += seconds
        if not math.isfinite(progress.sums["loss"]):
            raise UserError(
                f"{self.directory}: the loss is not finite in epoch {progress.epoch + 1}; expected a lower "
                "deepspeed.optimizer.params.lr, or deepspeed.gradient_clipping"
            )

    @property
    def means(self) -> dict[str, float]:
        """The loss parts, averaged over this epoch's steps so far."""
        return {name: total / self.progress.step for name, total in self.progress.sums.items()}

    def end_epoch(
        self,
        journal: Journal,
        step: int,
        conditions: dict[str, Outcome],
        state: dict[str, torch.Tensor],
        engine: dict[str, float],
    ) -> None:
        """Close the epoch, at step `step` of all: select, export (`state`, the network's) and record."""
        progress = self.progress
        record: dict[str, Any] = {"epoch": progress.epoch + 1, "step": step, "train": self.means}
        engine = engine | {"seconds": progress.seconds}
        progress.epoch, progress.step, progress.sums, progress.seconds = progress.epoch + 1, 0, {}, 0.0
        record["valid"] = self._select(conditions, state)
        record["engine"] = engine
        journal.epoch(record, self._line(record))

    def _select(self, conditions: dict[str, Outcome], state: dict[str, torch.Tensor]) -> dict[str, float]:
        """Export the model if it is the best so far; the validation record."""
        session, key, progress = self.session, self.session.select, self.progress
        valid = {name: mean_over_conditions(conditions, name) for name in metrics.selectable(session.config.task)}
        score = valid[key]
        if math.isnan(score):
            raise UserError(
                f"train.select: {key} has no value on the validation split of {session.dataset.path} "
                f"({session.valid.resident.size} samples); expected a larger one, or another metric"
            )
        sign = 1 if metrics.higher_is_better(key) else -1
        if progress.best is None or sign * (score - progress.best) > 0:
            progress.best, progress.best_epoch = score, progress.epoch
            facts = {"epoch": str(progress.epoch), "select": key, "score": f"{score:.6f}", "seed": str(self.seed)}
            export_model(state, session.dataset.normalisation, self.directory, facts)
        return valid

    def _line(self, record: dict[str, Any]) -> str:
        key = self.session.select
        parts = "  ".join(f"{name} {value:.3f}" for name, value in record["train"].items())
        mark = " *" if self.progress.best_epoch == self.progress.epoch else ""
        return (
            f"epoch {record['epoch']}/{self.phase.epochs}  {parts}  "
            f"valid {key} {record['valid'][key]:.2f}{mark}  {record['engine']['samples_per_second']:,.0f} samples/s"
        )
