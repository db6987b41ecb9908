"""The one training loop: the seeds of a group, one or several at once, through one phase of one method.

Shape legend: S models of the group, one per seed, B samples of a batch in this process.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from fastmmkd.data.batches import Inputs, Kept
from fastmmkd.distributed import rank, world_size
from fastmmkd.engine.agenda import Stretch
from fastmmkd.engine.bookkeeping import SeedBook
from fastmmkd.engine.checkpoint import Progress, find_checkpoint, furthest, load_checkpoint, save_checkpoint
from fastmmkd.engine.device import output_to, wrap
from fastmmkd.engine.meeting import is_lost
from fastmmkd.engine.phases import Phase
from fastmmkd.engine.session import Session
from fastmmkd.engine.slow_steps import SlowSteps
from fastmmkd.engine.step import STEPS, Objective, graph_mode
from fastmmkd.engine.telemetry import Journal, Telemetry
from fastmmkd.engine.usage import Usage
from fastmmkd.errors import Interrupted, UserError
from fastmmkd.evaluation.protocol import Predictions, mean_over_conditions
from fastmmkd.evaluation.results import Outcome
from fastmmkd.files import make_directory
from fastmmkd.methods.method import Network, Trainable
from fastmmkd.methods.objective import gradient_sizes
from fastmmkd.model_file import check_model
from fastmmkd.nn.models import model_state
from fastmmkd.run_folder import CHECKPOINTS_FOLDER


@dataclass
class _Some:
    """Some of the models of a network, to be evaluated on the same samples."""

    network: Network
    models: int
    wanted: list[int]

    def predict(self, inputs: Inputs) -> Predictions:
        return self._of_wanted(self.network.predict(inputs.of_models(self.models)))

    def predict_subsets(self, inputs: Inputs, subsets: Sequence[Kept]) -> list[Predictions]:
        return [self._of_wanted(x) for x in self.network.predict_subsets(inputs.of_models(self.models), subsets)]

    def _of_wanted(self, predictions: Predictions) -> Predictions:
        logits, joint = predictions
        return logits[self.wanted], joint[self.wanted]


class Trainer:
    """Trains a group through one phase, from the start or from where a former run stopped.

    A seed whose patience is over stops by itself: its books are closed, while the others go on.
    """

    def __init__(self, session: Session, phase: Phase) -> None:
        self.session, self.phase = session, phase
        self.config = session.config
        self.checkpoints = make_directory(phase.group.directory) / CHECKPOINTS_FOLDER
        self.engine = self._initialize(phase.module)
        seeds = phase.group.seeds
        self.steps_per_epoch = len(phase.rows) // self.config.train.batch_size
        phase.module.prepare(session.train)
        self.progress = [Progress() for _ in seeds]
        checkpoint = find_checkpoint(self.checkpoints, len(seeds), session.placement.device, session.say)
        if checkpoint:
            self.progress = checkpoint.seeds
            with output_to(session.log_file):
                load_checkpoint(self.engine, self.checkpoints, checkpoint)
            self._check_models()
        constants = dict(zip(phase.scenarios, session.valid.constants(list(phase.scenarios.values())), strict=True))
        self._check_samples(constants)
        floor = mean_over_conditions(constants, session.select)
        self.books = [SeedBook(session, phase, i, progress, floor) for i, progress in enumerate(self.progress)]
        if self.live:  # for more epochs than those that were finished
            for progress in self.progress:
                progress.finished = False
        mode, _ = graph_mode(self.config, session.placement, len(phase.module.parameter_groups()))
        device = session.placement.device
        if device.type == "cuda" or mode != "off":  # nobody waits to hear how many rows a batch has
            session.train.make_room(self._batches(epoch).numpy() for epoch in range(phase.epochs))
        self.objective = Objective(phase.module, session.train, phase.spec.views, torch.tensor(seeds, device=device))
        if self.objective.taught:
            asked = f"{len(session.train.present)} samples, {self.objective.taught.bytes / 1e6:.1f} MB"
            session.say(f"{phase.title(phase.group.short_name)}: what it learns from was asked once ({asked})")
        self.usage = Usage(device)
        self.watched: Callable[[str], AbstractContextManager[Any]] = nullcontext
        self.step = STEPS[mode](self.engine, self.objective, session.placement.clip_each, session.say)

    def _check_samples(self, constants: dict[str, Outcome]) -> None:
        """Refuse a phase whose checkpoint is to be chosen on samples that the validation split does not have."""
        if not any(outcome.samples for outcome in constants.values()):
            raise UserError(
                f"train.select_on: no validation sample of {self.session.dataset.path} has what the checkpoint of the "
                f"{self.phase.spec.name} is chosen on ({', '.join(constants)}); expected train.select_on=missing, "
                "teacher.incomplete_samples=true for a teacher, or other data"
            )

    def _initialize(self, module: Trainable) -> Any:
        """DeepSpeed's engine; what it objects to in its part of the config becomes one line."""
        log_file = self.session.log_file
        try:
            return wrap(self.session.deepspeed, module, self.session.placement.deepspeed, log_file)
        except Exception as error:  # whatever it makes of a setting
            if is_lost(error):
                raise
            with log_file.open("a", encoding="utf-8") as file:
                traceback.print_exc(file=file)
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"deepspeed: {reason} (DeepSpeed refuses this block, see {log_file})") from error

    def _check_models(self) -> None:
        for directory, progress in zip(self.phase.group.directories, self.progress, strict=True):
            if progress.best is not None:
                try:
                    check_model(directory)
                except UserError as error:
                    raise UserError(f"{error}; remove {self.phase.group.directory} to train anew") from None

    def close(self) -> None:
        """Let DeepSpeed's engine go."""
        self.engine.destroy()

    @property
    def live(self) -> list[SeedBook]:
        """The seeds that are not done; they all stand at the same step."""
        return [book for book in self.books if not book.is_done]

    @property
    def global_step(self) -> int:
        at = furthest(self.progress)
        return at.epoch * self.steps_per_epoch + at.step

    def fit(self) -> None:
        """Train to the end.

        Raises:
            Interrupted: a signal asked to stop; the state is saved.
            UserError: a loss is no longer finite.
        """
        phase, console = self.phase, self.session.console
        title = phase.title(phase.group.short_name)
        total = phase.epochs * self.steps_per_epoch
        with ExitStack() as stack:
            journals = [stack.enter_context(book.journal(self.global_step)) for book in self.books]
            left = partial(self.session.agenda.left, self._stretch)
            bar = stack.enter_context(Telemetry(title, total, self.global_step, left, console, silent=rank() > 0))
            if world_size() > 1 and rank() == 0:
                timeout = self.config.train.timeout_seconds
                slow = stack.enter_context(SlowSteps(lambda line: self.session.say(line, "yellow"), timeout))
                self.watched = slow.watched
            while self.live:
                self._epoch(bar, journals)
        self.session.agenda.end_phase(self._stretch)
        if not all(progress.finished for progress in self.progress):
            for progress in self.progress:
                progress.finished = True
            self._save()
        for book in self.books:
            book.report_floor()

    def _epoch(self, bar: Telemetry, journals: list[Journal]) -> None:
        live, step = self.live, (furthest(self.progress).epoch + 1) * self.steps_per_epoch
        last, epoch = self._train_epoch(bar, live)
        self.phase.module.end_epoch(live[0].progress.epoch)
        gradients = self._gradients(last, epoch) if self.config.train.gradients else None
        self.engine.eval()
        rate = self._samples * self.steps_per_epoch / max(live[0].progress.seconds, 1e-9)
        engine = self._engine_state() | {"samples_per_second": rate}
        skipped = self.step.skipped(len(self.books))
        started = time.monotonic()
        validated = self._validate(live)
        predictions = self.session.valid.resident.size * len(self.phase.scenarios) * len(self.books)
        engine["validation_seconds"] = time.monotonic() - started
        self.session.agenda.predicted(predictions, engine["validation_seconds"])
        engine |= self.usage.take()
        for book, conditions in zip(live, validated, strict=True):
            state = model_state(self.engine.module.network, book.index)
            pulls = gradients[book.index] if gradients else None
            own = engine | {"skipped_steps": skipped[book.index]}
            book.end_epoch(journals[book.index], step, conditions, state, own, pulls)
        self._save()

    @property
    def _stretch(self) -> Stretch:
        return self.phase.group.seeds, self.phase.spec.name

    @property
    def _samples(self) -> int:
        """Samples per step, over all seeds."""
        return self.config.train.batch_size * len(self.books)

    def _validate(self, live: list[SeedBook]) -> list[dict[str, Outcome]]:
        """The validation split under what the phase's checkpoint is chosen on, of each live seed, in one pass."""
        wanted, scenarios = [book.index for book in live], self.phase.scenarios
        network = _Some(self.engine.module.network, len(self.books), wanted)
        of_scenario = self.session.valid.model_outcomes(network, len(wanted), list(scenarios.values()))
        return [dict(zip(scenarios, outcomes, strict=True)) for outcomes in zip(*of_scenario, strict=True)]

    def _gradients(self, rows: torch.Tensor, epoch: torch.Tensor) -> list[dict[str, float]]:
        """`train.gradients`, per model, of one batch."""
        sizes = gradient_sizes(self.phase.module.losses(self.objective.draw(rows, epoch)))
        weighted = {name: getattr(self.config.loss, f"lambda_{name}", 1.0) * size for name, size in sizes.items()}
        return [{name: size[i].item() for name, size in weighted.items()} for i in range(len(self.books))]

    def _train_epoch(self, bar: Telemetry, live: list[SeedBook]) -> tuple[torch.Tensor, torch.Tensor]:
        """Every step of an epoch; the last one's rows and epoch."""
        session, train = self.session, self.config.train
        device, at = session.placement.device, live[0].progress
        mine = self._batches(at.epoch).to(device)
        epoch = torch.tensor(at.epoch, device=device)
        stopped = [book.index for book in self.books if book not in live]
        sums: torch.Tensor | None = None
        started = time.monotonic()
        self.engine.train()
        for step in range(at.step + 1, self.steps_per_epoch + 1):
            at_report = step % train.log_every == 0 or step == self.steps_per_epoch
            with self.watched("this step"):
                parts = self.step(mine[:, step - 1], epoch, stopped)
                sums = parts.clone() if sums is None else sums + parts
                stop = session.watch.agreed(device, at_report)
                collected = collect(sums) if at_report or stop else None
            if collected is not None:
                sums = None
                seconds, started = time.monotonic() - started, time.monotonic()
                for book in live:
                    totals = (values[book.index] for values in collected)
                    book.add(dict(zip(self.step.names, totals, strict=True)), step, seconds)
                means = [book.means for book in live]
                averages = {name: sum(mean[name] for mean in means) / len(means) for name in means[0]}
                bar.step(self.global_step, self._samples, averages)
            if stop:
                self._save()
                raise Interrupted
        return mine[:, -1], epoch

    def _batches(self, epoch: int) -> torch.Tensor:
        """`[S, steps, B]` int64, what this process trains on in an epoch."""
        orders = [self.phase.module.order(self.phase.rows, seed, epoch) for seed in self.phase.group.seeds]
        size, local = self.config.train.batch_size, self.config.train.batch_size // world_size()
        batches = torch.stack(orders)[:, : self.steps_per_epoch * size].unflatten(1, (-1, size))
        return batches[..., rank() * local : (rank() + 1) * local]

    def _engine_state(self) -> dict[str, float]:
        state = {"lr": float(self.engine.get_lr()[0])}
        if self.session.placement.precision == "fp16":
            state["loss_scale"] = float(self.engine.optimizer.loss_scale)
        return state

    def _save(self) -> None:
        # No `output_to` around it: the progress bar is drawn meanwhile, and DeepSpeed's logger writes to its file.
        with self.watched("this checkpoint"):
            save_checkpoint(self.engine, self.checkpoints, self.progress, self.global_step)


def collect(sums: torch.Tensor) -> list[list[float]]:
    """Take sums from the device, averaged over processes."""
    if world_size() > 1:
        dist.all_reduce(sums)
        sums /= world_size()
    return sums.tolist()
