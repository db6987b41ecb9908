"""The one training step: draw, teach, loss, backward, update. What trains is what is timed, profiled and tested.

`Objective` makes the loss of a batch; the classes after it take whole steps with it, eagerly or replayed from CUDA
graphs (`train.graph`).

Shape legend: S models, B rows of a batch, P parts of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch

from fastmmkd.blocks import Config
from fastmmkd.data.batches import Batch, ResidentSplit, View, scaling
from fastmmkd.data.dataset import Dataset
from fastmmkd.distributed import everywhere, world_size
from fastmmkd.engine.clipping import clip_models
from fastmmkd.engine.device import Placement
from fastmmkd.engine.flat_adam import FlatAdam, flat_adam
from fastmmkd.engine.graphs import Capture, CudaCapture, GraphedLoss, GraphedStep
from fastmmkd.engine.phases import untrained
from fastmmkd.engine.taught import Taught
from fastmmkd.methods.method import Trainable
from fastmmkd.methods.objective import Parts
from fastmmkd.nn.models import models_of

Stage = Callable[[str], AbstractContextManager[Any]]
"""What each of `STAGES` runs in, by its name: for whoever wants to know how long it takes."""
STAGES = ("draw", "teach", "loss", "backward", "update")
REPLAY = "replay"
"""In place of the stages that a graph holds."""

Forward = Callable[[Batch], tuple[torch.Tensor, Parts]]
Graphed = TypeVar("Graphed", GraphedLoss, GraphedStep)


def unmarked(name: str) -> AbstractContextManager[Any]:
    """A stage that nobody times."""
    return nullcontext()


class Objective:
    """The loss of a phase's next batch.

    Args:
        module: what is trained.
        split: the training samples.
        views: what the phase sees of them.
        seeds: `[S]` int64, on the device.
        stage: see `Stage`.
    """

    def __init__(
        self,
        module: Trainable,
        split: ResidentSplit,
        views: Sequence[View],
        seeds: torch.Tensor,
        stage: Stage = unmarked,
    ) -> None:
        self.module, self.split, self.views, self.seeds, self.stage = module, split, views, seeds, stage
        self.taught = Taught(module, split, len(seeds)) if module.frozen else None

    def draw(self, rows: torch.Tensor, epoch: torch.Tensor) -> Batch:
        """A batch as the phase sees it, and what frozen networks have made of it.

        Args:
            rows: `[S, B]` int64 training samples, on the device.
            epoch: 0-dimensional int64, on the device.
        """
        with self.stage("draw"):
            batch = self.split.training_batch(rows, self.seeds, epoch, self.views)
        with self.stage("teach"):
            batch.taught = self.taught.of(rows) if self.taught else None
        return batch

    def loss(self, batch: Batch, forward: Forward | None = None) -> tuple[torch.Tensor, Parts]:
        """The scalar to minimise, and its parts `[S]`; `forward` computes them in place of the module."""
        with self.stage("loss"):
            return (forward or self.module)(batch)


def untrained_objective(
    config: Config,
    dataset: Dataset,
    seeds: Sequence[int],
    device: torch.device,
    dtype: torch.dtype,
    stage: Stage = unmarked,
    resident: Callable[..., ResidentSplit] = ResidentSplit,
) -> Objective:
    """That of a run's last phase, whose networks, a teacher's too, have not learnt yet: for whoever measures steps.

    Args:
        config: the run.
        dataset: with the split `train`, and its normalisation.
        seeds: one model each.
        device, dtype: where and in which precision the features and the models are held.
        stage: see `Stage`.
        resident: makes the resident data, of the arguments of `ResidentSplit`.
    """
    spec, module = untrained(config, dataset, tuple(seeds), device, dtype)
    normalisation = scaling(config.data, dataset)
    split = resident(dataset.splits["train"], normalisation, config=config, device=device, dtype=dtype)
    module.prepare(split)
    return Objective(module, split, spec.views, torch.tensor(list(seeds), device=device), stage)


class EagerSteps:
    """Forward, backward and update, operation by operation.

    Args:
        engine: DeepSpeed's, around the module of the objective.
        objective: the loss of the next batch.
        clip_each: largest norm of one model's gradients, in place of DeepSpeed's clipping; None = that is all there is.
        say: tells people a line.

    `flat` is the update that DeepSpeed was handed, where it was: it clips each model by itself and leaves those alone
    that have stopped.
    """

    def __init__(
        self, engine: Any, objective: Objective, clip_each: float | None, say: Callable[[str], None] = print
    ) -> None:
        self.engine, self.objective, self.clip_each, self.say = engine, objective, clip_each, say
        self.module, self.stage = objective.module, objective.stage
        self.models = models_of(self.module)
        self.flat: FlatAdam | None = engine.optimizer if isinstance(engine.optimizer, FlatAdam) else None
        if self.flat is not None and clip_each is not None:
            self.flat.clip = clip_each
        self.names: tuple[str, ...] = ()
        """Of the parts of the loss, once a step was taken."""
        self.batch: Batch | None = None
        """The last one; of a replayed step the one whose tensors every replay fills."""

    def __call__(self, rows: torch.Tensor, epoch: torch.Tensor, stopped: Sequence[int]) -> torch.Tensor:
        """One step of every model. The host reads nothing of it.

        Args:
            rows: `[S, B]` int64 training samples, on the device.
            epoch: 0-dimensional int64, on the device.
            stopped: models that are done.

        Returns:
            The parts of the loss `[P, S]`, float64; overwritten by the next step.
        """
        loss, parts = self.loss(rows, epoch)
        with self.stage("backward"):
            self.engine.backward(loss)
        with self.stage("update"):
            if self.flat is not None:
                self.flat.stop(stopped)
            elif self.clip_each is not None:
                clip_models(self.module.parameters(), self.clip_each, self.models, stopped)
            self.engine.step()
            self.after()
        return parts

    @torch.no_grad()
    def after(self) -> None:
        """What the method does after the update."""
        assert self.batch is not None
        self.module.after_step(self.batch)

    def skipped(self, models: int) -> list[float]:
        """How many steps each model has skipped because of a gradient that was not finite; the host waits for it."""
        if self.flat is not None:
            return self.flat.skipped(self.engine.global_steps)
        return [float(self.engine.skipped_steps)] * models

    def loss(self, rows: torch.Tensor, epoch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The scalar to minimise, and its parts."""
        return self.by(self.engine, rows, epoch)

    def by(self, forward: Forward, rows: torch.Tensor, epoch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss as `forward` makes it; notes the batch, and the names of the parts."""
        self.batch = self.objective.draw(rows, epoch)
        loss, parts = self.objective.loss(self.batch, forward)
        self.names = tuple(parts)
        return loss, torch.stack(list(parts.values())).double()


class _Replayed(EagerSteps):
    """Steps that are eager where they cannot be captured: by all processes, if one of them cannot."""

    capture: type[Capture] = CudaCapture
    eager = False

    def captured(self, make: Callable[[], Graphed], device: torch.device) -> Graphed | None:
        """What `make` captures; None, once and for all, where a process could not.

        A process that replays and one that does not would still call the same collectives, but not in the same order.
        """
        graphed, reason = None, "another process could not"
        try:
            graphed = make()
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
        if everywhere(graphed is not None, device):
            return graphed
        self.eager = True
        self.say(f"train.graph: the step cannot be captured ({reason}); steps are eager")
        return None


class ReplayedLossSteps(_Replayed):
    """Forward and backward are replayed; the update, and what else DeepSpeed does, is its own."""

    graphed: GraphedLoss | None = None

    def loss(self, rows: torch.Tensor, epoch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.graphed is None and not self.eager:
            self.graphed = self.captured(lambda: self._graphed(rows, epoch), rows.device)
            if self.graphed is not None:
                # What DeepSpeed does around the forward pass, it does around the replay.
                self.module.forward = self.graphed  # type: ignore[method-assign, assignment]
        if self.eager:
            return super().loss(rows, epoch)
        with self.stage(REPLAY):
            return self.engine(rows, epoch)

    def _graphed(self, rows: torch.Tensor, epoch: torch.Tensor) -> GraphedLoss:
        module = self.module
        forward, buffers = module.forward, list(module.buffers())
        return GraphedLoss(
            lambda *inputs: self.by(forward, *inputs), module.parameters(), (rows, epoch), self.capture(), buffers
        )


class ReplayedSteps(_Replayed):
    """The whole step is replayed, DeepSpeed keeps its books.

    When a model stops, the step is captured anew, unless the update looks on the device for who goes on.
    """

    graphed: GraphedStep | None = None
    stopped: Sequence[int] = ()

    def __call__(self, rows: torch.Tensor, epoch: torch.Tensor, stopped: Sequence[int]) -> torch.Tensor:
        if self.flat is not None:
            self.flat.stop(stopped)
        if not self.eager and (self.graphed is None or (stopped != self.stopped and self.flat is None)):
            self.graphed = self.captured(lambda: self._graphed(rows, epoch, stopped), rows.device)
            self.stopped = stopped
        if self.graphed is None:
            return super().__call__(rows, epoch, stopped)
        with self.stage(REPLAY):
            parts = self.graphed(rows, epoch)
        engine = self.engine
        engine.global_steps += 1
        engine.micro_steps += 1
        engine.global_samples += engine.train_batch_size()
        if engine.lr_scheduler is not None:
            engine.lr_scheduler.step()
        return parts

    def _graphed(self, rows: torch.Tensor, epoch: torch.Tensor, stopped: Sequence[int]) -> GraphedStep:
        module, optimizer = self.module, self.engine.optimizer
        limit = self.engine.gradient_clipping() if self.clip_each is None else self.clip_each
        parameters, buffers = list(module.parameters()), list(module.buffers())

        def clip() -> None:
            if self.flat is None:
                clip_models(parameters, limit, self.models, stopped)

        by_module = lambda *inputs: self.by(module, *inputs)  # noqa: E731
        return GraphedStep(by_module, optimizer, clip, (rows, epoch), self.capture(), buffers, self.after)


STEPS: dict[str, type[EagerSteps]] = {"off": EagerSteps, "fwdbwd": ReplayedLossSteps, "step": ReplayedSteps}


def graph_mode(config: Config, placement: Placement, parameter_groups: int = 1) -> tuple[str, str | None]:
    """Which of `STEPS` a run takes, and a line that says why where it is not what `train.graph` asks for."""
    wanted, block = config.train.graph, placement.deepspeed
    if wanted == "off" or (wanted == "auto" and placement.device.type == "cpu"):
        return "off", None
    if placement.device.type == "cpu":
        return "off", f"train.graph: {wanted}, but a CPU has no graphs; steps are eager"
    stage = block.get("zero_optimization", {}).get("stage", 0)
    whole = parameter_groups == 1 and flat_adam(block) is not None
    if wanted == "step":  # others are tried, where one process updates the parameters as they are
        whole = whole or (placement.precision == "fp32" and stage == 0 and world_size() == 1)
    # OneCycle moves Adam's betas too, and those are constants of a graph.
    whole = whole and block.get("scheduler", {}).get("type") != "OneCycle"
    if wanted == "auto":
        return "step" if whole else "fwdbwd", None
    if wanted == "step" and not whole:
        processes = f"{world_size()} process{'es' if world_size() > 1 else ''}"
        return "fwdbwd", (
            "train.graph: step needs torch's Adam in fp32 or bf16, ZeRO stage 0, or 1 in one process, a schedule of "
            f"the rate; the run has {placement.precision} and stage {stage} in {processes}; the update is not captured"
        )
    return wanted, None
