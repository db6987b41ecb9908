"""The step exactly as training takes it: DeepSpeed's engine, precision and update, and the graphs of `train.graph`."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path

import torch

from bench.contenders import Contender
from bench.rounds import Clock
from fastmmkd.blocks import Config
from fastmmkd.data.dataset import Dataset
from fastmmkd.engine.device import place, start_deepspeed, wrap
from fastmmkd.engine.phases import untrained
from fastmmkd.engine.step import STEPS, graph_mode, untrained_objective


class AsTrained(Contender):
    """What `fastmmkd.engine.trainer.Trainer` does in a step, in the precision that the config trains in here.

    Raises:
        ImportError: there is no DeepSpeed.
    """

    def __init__(self, config: Config, dataset: Dataset, device: torch.device) -> None:
        placement = place(config)
        objective = untrained_objective(config, dataset, [1], device, placement.dtype)
        # DeepSpeed rounds the weights itself, and keeps them in float32 too.
        objective.module = untrained(config, dataset, (1,), device, torch.float32)[1]
        for network in objective.module.frozen:
            network.to(placement.dtype)
        super().__init__(config, objective)
        self.left: dict[str, torch.Tensor] = {}
        self.hooks = [
            p.register_post_accumulate_grad_hook(partial(self._note, name))
            for name, p in objective.module.named_parameters()
        ]
        self.folder = tempfile.TemporaryDirectory()
        log_file = Path(self.folder.name) / "deepspeed.log"
        self.engine = wrap(start_deepspeed(placement, log_file), objective.module, placement.deepspeed, log_file)
        self.engine.train()
        mode, _ = graph_mode(config, placement, len(objective.module.parameter_groups()))
        if device.type == "cuda" or mode != "off":
            self.make_room()
        said: list[str] = []  # what the step class tells people, such as that a capture failed
        self.take = STEPS[mode](self.engine, objective, placement.clip_each, said.append)
        self.replays = mode != "off"
        self.about = {"precision": placement.precision, "train.graph": mode, "said": said}

    def __call__(self, i: int, clock: Clock) -> None:
        """One step of the trainer's."""
        keys = self.keys(i)
        self.take(keys.rows, keys.epoch, [])
        clock.mark("all of it")

    def first(self) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss that the first step reports, and the gradients that it leaves to the update.

        Where the update is part of a graph, nobody sees those; then they are the module's, of the same weights.
        """
        keys = self.keys(0)
        total, _ = self.objective.loss(self.objective.draw(keys.rows, keys.epoch))
        named = {name: p for name, p in self.module.named_parameters() if p.requires_grad}
        autograd_gradients = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        gradients = {name: g for name, g in zip(named, autograd_gradients, strict=True) if g is not None}
        del total, autograd_gradients  # a capture must not meet another graph of the same parameters
        parts = self.take(keys.rows, keys.epoch, [])
        scale = getattr(self.engine.optimizer, "loss_scale", 1.0)
        gradients |= {name: g / scale for name, g in self.left.items()}
        for hook in self.hooks:
            hook.remove()
        return parts[self.take.names.index("loss"), 0].clone(), gradients

    def _note(self, name: str, parameter: torch.Tensor) -> None:
        if parameter.grad is not None:
            self.left[name] = parameter.grad.clone()
