"""A training step done in several ways, from the same weights on the same batches.

Shape legend: S models, B samples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any
from unittest import mock

import torch

from bench.rounds import Clock
from bench.workload import Keys, keys_of
from fastmmkd.blocks import Config
from fastmmkd.data.batches import Batch
from fastmmkd.engine.clipping import clip_models
from fastmmkd.engine.graphs import Capture, GraphedStep
from fastmmkd.engine.step import Objective, unmarked
from fastmmkd.errors import UserError
from fastmmkd.ops import reference, use_provider

ROUNDS = 32
"""After as many the batches come again."""

Context = Callable[[], AbstractContextManager[Any]]
WITH_REFERENCE: Context = partial(use_provider, "reference")
Forward = Callable[[Batch], torch.Tensor]


@contextmanager
def reference_with(attention: Callable[..., torch.Tensor]) -> Iterator[None]:
    """The reference operations, but for another `cross_attention`."""
    with use_provider("reference"), mock.patch.object(reference, "cross_attention", attention):
        yield


class Contender:
    """One way of doing the step; call it with the number of the round.

    Args:
        config: the run.
        objective: the loss of the models on the next batch.
        models: S.
        using: in which context the step runs.
        forward: the loss, where it is not the step's own.
        module: what is trained, where it is not the step's own.
    """

    def __init__(
        self,
        config: Config,
        objective: Objective,
        models: int = 1,
        using: Context = nullcontext,
        forward: Forward | None = None,
        module: torch.nn.Module | None = None,
    ) -> None:
        self.config, self.objective, self.models, self.using = config, objective, models, using
        self.own_forward = forward is not None
        self.forward = forward or (lambda batch: objective.loss(batch)[0])
        self.module = module or objective.module
        self.device = objective.split.present.device
        self.clip = config.deepspeed.get("gradient_clipping", 1.0)
        batch, samples = config.train.batch_size, objective.split.size
        self.prepared = [keys_of(i, models, batch, samples, self.device) for i in range(ROUNDS)]
        self.replays = False
        """Whether its operations are those of a graph, which the dispatcher does not see."""
        self.about: dict[str, Any] = {}
        """What a record says about it besides what is measured."""
        self.fused = self.device.type == "cuda" or (using is nullcontext and forward is None)

    @property
    def samples(self) -> int:
        """That a step trains on."""
        return self.config.train.batch_size * self.models

    @cached_property
    def optimizer(self) -> torch.optim.Adam:
        """The bare loop's own."""
        return adam(self.config, self.module, self.fused)

    def __call__(self, i: int, clock: Clock) -> None:
        """One step, stage by stage."""
        with self.using():
            self.objective.stage = clock.stage
            batch = self.objective.draw(self.keys(i).rows, self.keys(i).epoch)
            loss = self.forward(batch)
            if self.own_forward:
                clock.mark("loss")
            self.objective.stage = unmarked
            loss.backward()
            clock.mark("backward")
            self.clip_gradients()
            self.optimizer.step()
            self.optimizer.zero_grad()
            with torch.no_grad():
                self.objective.module.after_step(batch)
            clock.mark("update")

    def make_room(self) -> None:
        """Have every batch hold as many rows, as training has it on CUDA, where nobody waits to hear how many."""
        self.objective.split.make_room(keys.rows.cpu().numpy() for keys in self.prepared)

    def keys(self, i: int) -> Keys:
        """What round `i` draws its batch with; on the device beforehand, as in training."""
        return self.prepared[i % ROUNDS]

    def clip_gradients(self) -> None:
        """As DeepSpeed does, each model by itself."""
        parameters = self.module.parameters()
        if self.models > 1:
            clip_models(parameters, self.clip, self.models)
        elif self.clip:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)

    def first(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of the first round and its gradients by parameter; of the first model, where there are several."""
        with self.using():
            batch = self.objective.draw(self.keys(0).rows, self.keys(0).epoch)
            if self.models > 1:
                total, parts = self.objective.loss(batch)
                loss = parts["loss"][0]
            else:
                loss = total = self.forward(batch)
            total.backward()
        gradients = {
            name: (p.grad[:1] if self.models > 1 else p.grad).clone()
            for name, p in self.module.named_parameters()
            if p.grad is not None
        }
        self.module.zero_grad()
        return loss.detach(), gradients


class Graphed(Contender):
    """The whole step as one graph: a bare loop, whose weights and Adam are in the precision that it computes in.

    Args:
        config, objective, using, forward: as `Contender` has them.
        capture: records the graph.
    """

    def __init__(
        self,
        config: Config,
        objective: Objective,
        capture: Capture,
        using: Context = nullcontext,
        forward: Forward | None = None,
    ) -> None:
        super().__init__(config, objective, 1, using, forward)
        self.make_room()
        self.optimizer = adam(config, self.module, fused=True, captured=True)
        self.capture, self.replays = capture, True
        self.graph: GraphedStep | None = None

    def __call__(self, i: int, clock: Clock) -> None:
        """One replay; the first call captures."""
        self._replay(i)
        clock.mark("replay")

    def first(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of the first replay, and the gradients of the same step eagerly."""
        _, gradients = super().first()
        return self._replay(0).clone(), gradients

    def _replay(self, i: int) -> torch.Tensor:
        keys = self.keys(i)
        if self.graph is None:
            with self.using():
                self.graph = GraphedStep(self._loss, self.optimizer, self.clip_gradients, keys, self.capture)
        return self.graph(*keys)

    def _loss(self, *keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows, _, epoch = keys
        total = self.forward(self.objective.draw(rows, epoch))
        return total, total.detach()


def adam(config: Config, module: torch.nn.Module, fused: bool, captured: bool = False) -> torch.optim.Adam:
    """torch's Adam with the config's settings; fused into one kernel, as training has it, or as eager PyTorch has it.

    Raises:
        UserError: the config has another optimiser.
    """
    block = config.deepspeed["optimizer"]
    if block["type"] != "Adam":
        raise UserError(f"deepspeed.optimizer.type: {block['type']}; expected Adam, the bare loop knows no other")
    wanted = {key: block["params"][key] for key in ("lr", "betas", "eps", "weight_decay") if key in block["params"]}
    parameters = [p for p in module.parameters() if p.requires_grad]
    return torch.optim.Adam(parameters, **wanted, fused=fused, capturable=captured and parameters[0].is_cuda)
