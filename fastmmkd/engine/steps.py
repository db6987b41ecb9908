"""How a training step is taken: eagerly, or replayed from CUDA graphs; see `train.graph`.

Shape legend: S models, B rows of a batch, P parts of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from fastmmkd.config import Config
from fastmmkd.distributed import world_size
from fastmmkd.engine.clipping import clip_models
from fastmmkd.engine.device import Placement
from fastmmkd.engine.graphs import Capture, CudaCapture, GraphedLoss, GraphedStep
from fastmmkd.methods.objective import Parts

Compute = Callable[[Callable[..., Any], torch.Tensor, torch.Tensor], tuple[torch.Tensor, Parts]]
"""`compute(forward, rows, epoch)`: draws a batch and has `forward` make the scalar to minimise and its parts of it."""


class EagerSteps:
    """Forward, backward and update, operation by operation.

    Args:
        engine: DeepSpeed's.
        compute: see `Compute`.
        clip_each: largest norm of one model's gradients, in place of DeepSpeed's clipping; None = that is all there is.
        say: tells people a line.
    """

    def __init__(
        self, engine: Any, compute: Compute, clip_each: float | None, say: Callable[[str], None] = print
    ) -> None:
        self.engine, self.compute, self.clip_each, self.say = engine, compute, clip_each, say
        self.names: tuple[str, ...] = ()
        """Of the parts of the loss, once a step was taken."""

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
        self.engine.backward(loss)
        if self.clip_each is not None:
            clip_models(self.engine.module.parameters(), self.clip_each, stopped)
        self.engine.step()
        return parts

    def loss(self, rows: torch.Tensor, epoch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The scalar to minimise, and its parts."""
        return self.by(self.engine, rows, epoch)

    def by(
        self, forward: Callable[..., Any], rows: torch.Tensor, epoch: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss as `forward` makes it; notes the names of its parts."""
        loss, parts = self.compute(forward, rows, epoch)
        self.names = tuple(parts)
        return loss, torch.stack(list(parts.values())).double()


class _Replayed(EagerSteps):
    """Steps that are eager where they cannot be captured."""

    capture: type[Capture] = CudaCapture
    eager = False

    def give_up(self, error: RuntimeError) -> None:
        self.eager = True
        self.say(f"train.graph: the step cannot be captured ({str(error).splitlines()[0]}); steps are eager")


class ReplayedLossSteps(_Replayed):
    """Forward and backward are replayed; the update, and what else DeepSpeed does, is its own."""

    graphed: GraphedLoss | None = None

    def loss(self, rows: torch.Tensor, epoch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.graphed is None and not self.eager:
            module = self.engine.module
            forward = module.forward
            try:
                self.graphed = GraphedLoss(
                    lambda *inputs: self.by(forward, *inputs), module.parameters(), (rows, epoch), self.capture()
                )
                module.forward = self.graphed  # what DeepSpeed does around the forward pass, it does around the replay
            except RuntimeError as error:
                self.give_up(error)
        return super().loss(rows, epoch) if self.eager else self.engine(rows, epoch)


class ReplayedSteps(_Replayed):
    """The whole step is replayed, DeepSpeed keeps its books; when a model stops, the step is captured anew."""

    graphed: GraphedStep | None = None
    stopped: Sequence[int] = ()

    def __call__(self, rows: torch.Tensor, epoch: torch.Tensor, stopped: Sequence[int]) -> torch.Tensor:
        if not self.eager and (self.graphed is None or stopped != self.stopped):
            try:
                self.graphed, self.stopped = self._captured(rows, epoch, stopped), stopped
            except RuntimeError as error:
                self.give_up(error)
        if self.eager or self.graphed is None:
            return super().__call__(rows, epoch, stopped)
        parts = self.graphed(rows, epoch)
        engine = self.engine
        engine.global_steps += 1
        engine.micro_steps += 1
        engine.global_samples += engine.train_batch_size()
        if engine.lr_scheduler is not None:
            engine.lr_scheduler.step()
        return parts

    def _captured(self, rows: torch.Tensor, epoch: torch.Tensor, stopped: Sequence[int]) -> GraphedStep:
        module, optimizer = self.engine.module, self.engine.optimizer
        limit = self.engine.gradient_clipping() if self.clip_each is None else self.clip_each
        parameters = list(module.parameters())
        return GraphedStep(
            lambda *inputs: self.by(module, *inputs),
            optimizer,
            lambda: clip_models(parameters, limit, stopped),
            (rows, epoch),
            self.capture(),
        )


STEPS: dict[str, type[EagerSteps]] = {"off": EagerSteps, "fwdbwd": ReplayedLossSteps, "step": ReplayedSteps}


def graph_mode(config: Config, placement: Placement) -> tuple[str, str | None]:
    """Which of `STEPS` a run takes, and a line that says why where it is not what `train.graph` asks for."""
    wanted = config.train.graph
    if wanted == "off" or (wanted == "auto" and placement.device.type == "cpu"):
        return "off", None
    if placement.device.type == "cpu":
        return "off", f"train.graph: {wanted}, but a CPU has no graphs; steps are eager"
    if world_size() > 1:
        return "off", f"train.graph: {wanted}, but graphs are for one process; steps are eager"
    if wanted == "auto":
        return "fwdbwd", None
    stage = placement.deepspeed.get("zero_optimization", {}).get("stage", 0)
    if wanted == "step" and (placement.precision != "fp32" or stage != 0):
        return "fwdbwd", (
            f"train.graph: step needs fp32 and ZeRO stage 0, the run has {placement.precision} and stage {stage}; the "
            "update is not captured"
        )
    return wanted, None
