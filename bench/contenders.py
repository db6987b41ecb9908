"""A training step done in several ways, from the same weights on the same batches.

Shape legend: S seeds (independent models), B rows of a batch, T frames, d width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import torch

from bench.attention import scaled_dot_product
from bench.plain import PlainUMDF
from bench.rounds import Clock
from bench.workload import Keys, keys_of
from fastmmkd.blocks import Config
from fastmmkd.data.dataset import Dataset
from fastmmkd.deepspeed_block import without_nulls
from fastmmkd.engine.clipping import clip_models
from fastmmkd.engine.graphs import Capture, CudaCapture, GraphedStep
from fastmmkd.engine.stages import Drawn, TrainingStep, training_step
from fastmmkd.errors import UserError
from fastmmkd.methods.umdf import UMDF
from fastmmkd.ops import reference, use_provider

REFERENCE, OURS = "reference", "ours"
SDPA, PLAIN = "reference + SDPA", "plain + SDPA"
COMPILED, AUTOTUNED = "compile", "compile max-autotune"
GRAPHED, SEEDS = "ours + graph", "ours x seeds"

ROUNDS = 32
"""After as many the batches come again."""

Context = Callable[[], AbstractContextManager[Any]]
WITH_REFERENCE: Context = partial(use_provider, "reference")
Forward = Callable[[Drawn, tuple[Any, ...]], torch.Tensor]


@contextmanager
def reference_with_sdpa() -> Iterator[None]:
    """The reference operations, attention but for one: PyTorch's fused kernel."""
    with use_provider("reference"), mock.patch.object(reference, "cross_attention", scaled_dot_product):
        yield


class Contender:
    """One way of doing the step; call it with the number of the round.

    Args:
        config: the run.
        step: the models and their data.
        seeds: S.
        using: in which context the step runs.
        forward: the loss, where it is not the step's own.
        module: what is trained, where it is not the step's own.
    """

    def __init__(
        self,
        config: Config,
        step: TrainingStep,
        seeds: int = 1,
        using: Context = nullcontext,
        forward: Forward | None = None,
        module: torch.nn.Module | None = None,
    ) -> None:
        self.config, self.step, self.seeds, self.using = config, step, seeds, using
        self.forward = forward or (lambda drawn, taught: step.loss(drawn, taught)[0])
        self.module = module or step.module
        self.device = step.split.present.device
        self.clip = without_nulls(config.deepspeed).get("gradient_clipping", 1.0)
        batch, samples = config.train.batch_size, step.split.size
        self.prepared = [keys_of(i, seeds, batch, samples, self.device) for i in range(ROUNDS)]
        ours = using is nullcontext and forward is None
        self.optimizer = adam(config, self.module, fused=ours or self.device.type == "cuda")

    def __call__(self, i: int, clock: Clock) -> None:
        """One step, stage by stage."""
        with self.using():
            drawn = self.step.draw(*self.keys(i))
            clock.mark("draw")
            taught = self.step.teach(drawn)
            if self.step.teacher:
                clock.mark("teacher")
            loss = self.forward(drawn, taught)
            clock.mark("forward")
            loss.backward()
            clock.mark("backward")
            self.clip_gradients()
            self.optimizer.step()
            self.optimizer.zero_grad()
            clock.mark("optimiser")

    def keys(self, i: int) -> Keys:
        """What round `i` draws its batch with; on the device beforehand, as in training."""
        return self.prepared[i % ROUNDS]

    def clip_gradients(self) -> None:
        """As DeepSpeed does, each model by itself."""
        parameters = self.module.parameters()
        if self.seeds > 1:
            clip_models(parameters, self.clip)
        elif self.clip:
            torch.nn.utils.clip_grad_norm_(parameters, self.clip)

    def first(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of the first round and its gradients by parameter; of the first model, where there are several."""
        with self.using():
            drawn = self.step.draw(*self.keys(0))
            taught = self.step.teach(drawn)
            if self.seeds > 1:
                total, parts = self.step.loss(drawn, taught)
                loss = parts["loss"][0]
            else:
                loss = total = self.forward(drawn, taught)
            total.backward()
        gradients = {
            name: (p.grad[:1] if self.seeds > 1 else p.grad).clone()
            for name, p in self.module.named_parameters()
            if p.grad is not None
        }
        self.module.zero_grad()
        return loss.detach(), gradients


class Graphed(Contender):
    """The whole step as one graph."""

    def __init__(self, config: Config, step: TrainingStep, capture: Capture) -> None:
        super().__init__(config, step)
        self.optimizer = adam(config, self.module, fused=True, captured=True)
        self.capture = capture
        self.graph: GraphedStep | None = None

    def __call__(self, i: int, clock: Clock) -> None:
        """One replay; the first call captures."""
        keys = self.keys(i)
        if self.graph is None:
            self.graph = GraphedStep(self._loss, self.optimizer, self.clip_gradients, keys, self.capture)
        self.graph(*keys)
        clock.mark("replay")

    def _loss(self, *keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        drawn = self.step.draw(*keys)
        total, parts = self.step.loss(drawn, self.step.teach(drawn))
        return total, torch.stack(list(parts.values()))


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


def names(config: Config, device: torch.device) -> list[str]:
    """All contenders that a config and a device allow."""
    cuda = device.type == "cuda"
    found = [REFERENCE, SDPA, *([PLAIN] if config.method == "umdf" and not config.model.dropout else []), COMPILED]
    return [*found, *([AUTOTUNED] if cuda else []), OURS, *([GRAPHED] if cuda else []), SEEDS]


def build(
    name: str, config: Config, dataset: Dataset, seeds: int, device: torch.device, dtype: torch.dtype
) -> Contender:
    """A contender; each has its own models, of the weights of seed 1 (and 2, 3, ... where it trains several)."""
    models = seeds if name == SEEDS else 1
    step = training_step(config, dataset, range(1, models + 1), device, dtype)
    if name == PLAIN:
        assert isinstance(step.module, UMDF)
        plain = PlainUMDF(step.module, "sdpa").to(device, dtype)
        return Contender(config, step, 1, WITH_REFERENCE, partial(_plain_loss, plain), plain)
    if name in (COMPILED, AUTOTUNED):
        compiled = torch.compile(step.module, mode="max-autotune" if name == AUTOTUNED else None)
        return Contender(config, step, 1, WITH_REFERENCE, partial(_compiled_loss, compiled))
    if name == GRAPHED:
        return Graphed(config, step, CudaCapture())
    contexts: dict[str, Context] = {REFERENCE: WITH_REFERENCE, SDPA: reference_with_sdpa}
    return Contender(config, step, models, contexts.get(name, nullcontext))


def _plain_loss(module: torch.nn.Module, drawn: Drawn, taught: tuple[Any, ...]) -> torch.Tensor:
    batch = drawn.batch
    return module([x[0] for x in batch.features], [m[0] for m in batch.masks], batch.targets[0])


def _compiled_loss(module: Any, drawn: Drawn, taught: tuple[Any, ...]) -> torch.Tensor:
    batch = drawn.batch
    return module(batch.features, batch.masks, batch.targets, *taught, draw=batch.draw)[0]
