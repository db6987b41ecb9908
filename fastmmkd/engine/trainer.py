"""The one training loop: one seed of one method, under DeepSpeed."""

from __future__ import annotations

import math
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console

from fastmmkd.config import Config
from fastmmkd.data.batches import ResidentSplit
from fastmmkd.data.store import Dataset
from fastmmkd.distributed import rank, world_size
from fastmmkd.engine.checkpoint import (
    Progress,
    export_model,
    load_checkpoint,
    read_progress,
    save_checkpoint,
)
from fastmmkd.engine.device import Placement, output_to
from fastmmkd.engine.interruption import InterruptionWatch
from fastmmkd.engine.phases import COMPLETE, Phase, teacher_rows
from fastmmkd.engine.telemetry import Telemetry
from fastmmkd.errors import Interrupted, UserError
from fastmmkd.evaluation import metrics
from fastmmkd.evaluation.protocol import Evaluator, Scenario, mean_over_conditions
from fastmmkd.evaluation.results import Outcome
from fastmmkd.tasks import TASKS, Task


@dataclass
class Session:
    """What the seeds of a run share."""

    config: Config
    placement: Placement
    deepspeed: Any
    dataset: Dataset
    console: Console
    watch: InterruptionWatch
    log_file: Path
    """Where DeepSpeed writes."""

    def __post_init__(self) -> None:
        check(self.config, self.dataset)
        self.train = self._resident("train")
        valid = self.dataset.splits["valid"]
        self.valid = Evaluator(self._resident("valid"), valid.labels, valid.present, self.config.task, self.config.eval)

    def _resident(self, split: str) -> ResidentSplit:
        config, placement = self.config, self.placement
        return ResidentSplit(
            self.dataset.splits[split],
            self.dataset.normalisation,
            config.task,
            config.data.clip,
            config.model.attention_mask,
            placement.device,
            placement.dtype,
        )

    @property
    def select(self) -> str:
        """The metric that chooses the checkpoint."""
        return selection(self.config)


def check(config: Config, dataset: Dataset) -> None:
    """Refuse what would only fail after the first steps, or not at all.

    Raises:
        UserError: labels, metric or sizes of the data do not fit the config.
    """
    task, batch_size, path = config.task, config.train.batch_size, dataset.path
    if task.label_kind != dataset.label_kind:
        fitting = ", ".join(name for name in TASKS if Task(name).label_kind == dataset.label_kind)
        raise UserError(
            f"train.task: {task.name} needs {task.label_kind} labels, {path} has {dataset.label_kind} labels; "
            f"expected one of {fitting}"
        )
    if selection(config) not in metrics.selectable(task):
        valid = ", ".join(metrics.selectable(task))
        raise UserError(f"train.select: {selection(config)!r} is no metric of {task.name}; expected one of {valid}")
    train = dataset.splits["train"]
    if len(train) < batch_size:
        raise UserError(
            f"train.batch_size: {batch_size}, but {path} has {len(train)} training samples; expected at most that"
        )
    if config.teacher and len(teacher_rows(config, train)) < batch_size:
        raise UserError(
            f"train.batch_size: {batch_size}, but {path} has {len(teacher_rows(config, train))} complete training "
            "samples for the teacher; expected at most that, or teacher.incomplete_samples=true"
        )
    if batch_size % world_size():
        raise UserError(f"train.batch_size: {batch_size} does not divide by {world_size()} processes")


def selection(config: Config) -> str:
    """The metric that chooses a run's checkpoint."""
    return config.train.select or default_selection(config.task)


def default_selection(task: Task) -> str:
    """MAE for regression, else cross-entropy: small validation splits measure them more steadily than F1."""
    return "mae" if task.is_regression else "loss"


def epoch_order(samples: int, batch_size: int, seed: int, epoch: int) -> torch.Tensor:
    """Batches of one epoch, `[steps, batch_size]` int64: a permutation that depends on (seed, epoch) alone."""
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    steps = samples // batch_size
    return torch.randperm(samples, generator=generator)[: steps * batch_size].view(steps, batch_size)


class Trainer:
    """Trains one phase of one seed in its folder, from the start or from where a former run stopped."""

    def __init__(self, session: Session, phase: Phase, seed: int) -> None:
        self.session, self.phase, self.seed = session, phase, seed
        self.config = session.config
        self.checkpoints = phase.directory / "checkpoints"
        self.engine = self._initialize(phase.module)
        self.progress = Progress()
        found = read_progress(self.checkpoints)
        if found:
            self.progress, saved = found
            with output_to(session.log_file):
                load_checkpoint(self.engine, self.checkpoints, saved)
        self.steps_per_epoch = len(phase.rows) // self.config.train.batch_size

    def _initialize(self, module: torch.nn.Module) -> Any:
        """DeepSpeed's engine; what it objects to in its part of the config becomes one line."""
        log_file = self.session.log_file
        block = dict(self.session.placement.deepspeed)
        try:
            with output_to(log_file):
                engine, *_ = self.session.deepspeed.initialize(
                    model=module, model_parameters=module.parameters(), config=block
                )
        except (AssertionError, AttributeError, KeyError, TypeError, ValueError) as error:
            with log_file.open("a", encoding="utf-8") as file:
                traceback.print_exc(file=file)
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"deepspeed: {reason} (DeepSpeed refuses this block, see {log_file})") from error
        return engine

    def close(self) -> None:
        """Let DeepSpeed's engine go."""
        self.engine.destroy()

    @property
    def global_step(self) -> int:
        return self.progress.epoch * self.steps_per_epoch + self.progress.step

    def fit(self) -> None:
        """Train to the end.

        Raises:
            Interrupted: a signal asked to stop; the state is saved.
            UserError: the loss is no longer finite.
        """
        phase = self.phase
        title = f"{self.config.method} seed {self.seed} {phase.name}".rstrip()
        total = phase.epochs * self.steps_per_epoch
        with Telemetry(
            phase.directory, title, total, self.global_step, self.session.console, silent=rank() > 0
        ) as telemetry:
            telemetry.rewind(self.progress.epoch)
            while not self._done():
                self._epoch(telemetry)
        if not self.progress.finished:
            self.progress.finished = True
            self._save()

    def _done(self) -> bool:
        phase, progress = self.phase, self.progress
        stale = progress.epoch - progress.best_epoch
        return progress.epoch >= phase.epochs or (phase.patience is not None and stale >= phase.patience)

    def _epoch(self, telemetry: Telemetry) -> None:
        self._train_epoch(telemetry)
        progress = self.progress
        record: dict[str, Any] = {
            "epoch": progress.epoch + 1,
            "step": self.global_step,
            "train": {name: total / self.steps_per_epoch for name, total in progress.sums.items()},
        }
        seconds = progress.seconds
        self.engine.eval()
        conditions = self._validate()
        progress.epoch, progress.step, progress.sums, progress.seconds = progress.epoch + 1, 0, {}, 0.0
        record["valid"] = self._select(conditions)
        record["engine"] = self._engine_state() | {"seconds": seconds, "samples_per_second": self._rate(seconds)}
        telemetry.epoch(record, self._line(record))
        self._save()

    def _validate(self) -> dict[str, Outcome]:
        """The validation split under what the phase's checkpoint is chosen on."""
        predict, valid = self.engine.module.network.predict, self.session.valid
        if self.phase.select_on == "missing":
            return valid.conditions(predict)
        whole = Scenario((True, True, True), incomplete=self.phase.select_on == "whole")
        return {"lav": valid.outcomes(predict, [whole])[0]}

    def _train_epoch(self, telemetry: Telemetry) -> None:
        session, train, phase, progress = self.session, self.config.train, self.phase, self.progress
        device = session.placement.device
        order = phase.rows[epoch_order(len(phase.rows), train.batch_size, self.seed, progress.epoch)]
        local = train.batch_size // world_size()
        mine = order[:, rank() * local : (rank() + 1) * local].to(device)
        seed = torch.tensor([self.seed], device=device)
        epoch = torch.tensor(progress.epoch, device=device)
        sums: dict[str, torch.Tensor] = {}
        started = time.monotonic()
        self.engine.train()
        for step in range(progress.step, self.steps_per_epoch):
            rows = mine[step : step + 1]
            batch = session.train.training_batch(rows, seed, epoch, phase.module.versions, phase.missing)
            loss, parts = self.engine(batch.features, batch.masks, batch.targets, *self._taught(rows, seed, epoch))
            self.engine.backward(loss)
            self.engine.step()
            for name, part in parts.items():
                sums[name] = sums[name] + part if name in sums else part.double()
            progress.step = step + 1
            at_report = progress.step % train.log_every == 0 or progress.step == self.steps_per_epoch
            stop = session.watch.agreed(device, at_report)
            if at_report or stop:
                self._collect(sums)
                progress.seconds += time.monotonic() - started
                started = time.monotonic()
                means = {name: total / progress.step for name, total in progress.sums.items()}
                telemetry.step(self.global_step, train.batch_size, means)
            if stop:
                self._save()
                raise Interrupted

    @torch.no_grad()
    def _taught(self, rows: torch.Tensor, seed: torch.Tensor, epoch: torch.Tensor) -> tuple[Any, ...]:
        """What the teacher, if there is one, makes of the complete samples."""
        if self.phase.teacher is None:
            return ()
        whole = self.session.train.training_batch(rows, seed, epoch, 1, COMPLETE)
        return (self.phase.teacher.represent(whole.features, whole.masks),)

    def _collect(self, sums: dict[str, torch.Tensor]) -> None:
        """Move the sums on the device into the progress, averaged over processes; check that they are finite."""
        names = list(sums)
        values = torch.stack([sums.pop(name).sum() for name in names])
        if world_size() > 1:
            dist.all_reduce(values)
            values /= world_size()
        for name, value in zip(names, values.tolist(), strict=True):
            self.progress.sums[name] = self.progress.sums.get(name, 0.0) + value
        if not math.isfinite(self.progress.sums["loss"]):
            raise UserError(
                f"{self.phase.directory}: the loss is not finite in epoch {self.progress.epoch + 1}; expected a lower "
                "deepspeed.optimizer.params.lr, or deepspeed.gradient_clipping"
            )

    def _select(self, conditions: dict[str, Outcome]) -> dict[str, float]:
        """Export the model if it is the best so far; the validation record."""
        key, progress = self.session.select, self.progress
        valid = {name: mean_over_conditions(conditions, name) for name in metrics.selectable(self.config.task)}
        score = valid[key]
        if math.isnan(score):
            raise UserError(
                f"train.select: {key} has no value on the validation split of {self.session.dataset.path} "
                f"({self.session.valid.resident.size} samples); expected a larger one, or another metric"
            )
        sign = 1 if metrics.higher_is_better(key) else -1
        if progress.best is None or sign * (score - progress.best) > 0:
            progress.best, progress.best_epoch = score, progress.epoch
            facts = {"epoch": str(progress.epoch), "select": key, "score": f"{score:.6f}", "seed": str(self.seed)}
            network, normalisation = self.engine.module.network, self.session.dataset.normalisation
            export_model(network, normalisation, self.phase.directory, facts)
        return valid

    def _engine_state(self) -> dict[str, float]:
        state = {"lr": float(self.engine.get_lr()[0]), "skipped_steps": float(self.engine.skipped_steps)}
        if self.session.placement.precision == "fp16":
            state["loss_scale"] = float(self.engine.optimizer.loss_scale)
        return state

    def _rate(self, seconds: float) -> float:
        return self.steps_per_epoch * self.config.train.batch_size / max(seconds, 1e-9)

    def _line(self, record: dict[str, Any]) -> str:
        key = self.session.select
        parts = "  ".join(f"{name} {value:.3f}" for name, value in record["train"].items())
        mark = " *" if self.progress.best_epoch == self.progress.epoch else ""
        return (
            f"epoch {record['epoch']}/{self.phase.epochs}  {parts}  "
            f"valid {key} {record['valid'][key]:.2f}{mark}  {record['engine']['samples_per_second']:,.0f} samples/s"
        )

    def _save(self) -> None:
        # No `output_to` around it: the progress bar is drawn meanwhile, and DeepSpeed's logger writes to its file.
        save_checkpoint(self.engine, self.checkpoints, self.progress, self.global_step)
