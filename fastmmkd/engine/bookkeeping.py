"""What is kept of one seed while it trains, alone or with others: where it stands, its best model, its records."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch

from fastmmkd.distributed import rank
from fastmmkd.engine.checkpoint import Progress
from fastmmkd.engine.phases import Phase
from fastmmkd.engine.session import Session
from fastmmkd.engine.telemetry import Journal
from fastmmkd.errors import UserError
from fastmmkd.evaluation import metrics
from fastmmkd.evaluation.protocol import mean_over_conditions
from fastmmkd.evaluation.results import Outcome
from fastmmkd.model_file import export_model

FLOOR_DIGITS = 3
"""Decimals to which a score is compared with the floor: what a collapsed network has left to tell samples by moves the
fourth at most."""


class SeedBook:
    """The books of one seed in one phase."""

    def __init__(self, session: Session, phase: Phase, index: int, progress: Progress, floor: float) -> None:
        """`floor`: what the best constant prediction reaches on what the phase's checkpoint is chosen by."""
        self.session, self.phase, self.index, self.progress = session, phase, index, progress
        self.seed, self.floor = phase.group.seeds[index], floor

    @property
    def directory(self) -> Path:
        return self.phase.group.directories[self.index]

    @property
    def is_done(self) -> bool:
        """Whether all epochs are over, or patience with them is."""
        phase, progress = self.phase, self.progress
        stale = progress.epoch - progress.best_epoch
        return progress.epoch >= phase.epochs or (phase.patience is not None and stale >= phase.patience)

    @property
    def is_at_floor(self) -> bool:
        """Whether the best model so far is no better than a constant prediction."""
        best, floor = self.progress.best, round(self.floor, FLOOR_DIGITS)
        return best is None or not metrics.better(self.session.select, round(best, FLOOR_DIGITS), floor)

    def report_floor(self) -> None:
        """Say so, at the end of the phase, where nothing was learnt."""
        if self.is_at_floor:
            key, best, epoch = self.session.select, self.progress.best, self.progress.best_epoch
            title = self.phase.title(f"seed {self.seed}")
            self.session.say(
                f"AT THE FLOOR: {title} has learnt nothing: its best validation {key}, {best:.4f} of epoch {epoch}, is "
                f"no better than the {self.floor:.4f} of a constant prediction",
                "bold red",
            )

    def journal(self, step: int) -> Journal:
        """The seed's records, rewound to the end of its last epoch; `step` steps are done."""
        title = self.phase.title(f"seed {self.seed}")
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
        gradients: dict[str, float] | None,
    ) -> None:
        """Close the epoch, at step `step` of all: select, export (`state`, the network's) and record."""
        progress = self.progress
        record: dict[str, Any] = {"epoch": progress.epoch + 1, "step": step, "train": self.means}
        if gradients is not None:
            record["gradients"] = gradients
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
        if progress.best is None or metrics.better(key, score, progress.best):
            progress.best, progress.best_epoch = score, progress.epoch
            facts = {
                "epoch": str(progress.epoch),
                "select": key,
                "score": f"{score:.6f}",
                "floor": f"{self.floor:.6f}",
                "at_floor": str(self.is_at_floor).lower(),
                "seed": str(self.seed),
            }
            export_model(state, session.normalisation, self.directory, facts)
        return valid

    def _line(self, record: dict[str, Any]) -> str:
        key = self.session.select
        parts = "  ".join(f"{name} {value:.3f}" for name, value in record["train"].items())
        mark = " *" if self.progress.best_epoch == self.progress.epoch else ""
        skipped = record["engine"]["skipped_steps"]  # of all so far
        skips = f"  {skipped:.0f} step{'s' if skipped > 1 else ''} skipped" if skipped else ""
        return (
            f"epoch {record['epoch']}/{self.phase.epochs}  {parts}  "
            f"valid {key} {record['valid'][key]:.2f}{mark}  {record['engine']['samples_per_second']:,.0f} samples/s"
            f"{skips}"
        )
