"""A training step in its parts, for whoever measures one; the loop that trains is `fastmmkd.engine.trainer`.

Shape legend: S seeds (independent models), B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastmmkd.config import Config, MissingBlock
from fastmmkd.data.batches import Batch, ResidentSplit, scaling
from fastmmkd.data.dataset import Dataset
from fastmmkd.engine.phases import COMPLETE, TEACHER_SEEDS
from fastmmkd.methods import Teacher, Trainable, build_network, build_student, build_teacher
from fastmmkd.nn.models import stack_models

Loss = tuple[torch.Tensor, dict[str, torch.Tensor]]


@dataclass
class Drawn:
    """What a step trains on."""

    batch: Batch
    complete: Batch | None
    """What the teacher sees; None without one."""


@dataclass
class TrainingStep:
    """The last phase of a config: the student with its frozen teacher, or a network by itself."""

    module: Trainable
    teacher: Teacher | None
    split: ResidentSplit
    missing: MissingBlock

    def draw(self, rows: torch.Tensor, seeds: torch.Tensor, epoch: torch.Tensor) -> Drawn:
        """The versions that are trained on: `[S, B]` int64 samples, `[S]` int64, 0-dimensional int64, on the device."""
        batch = self.split.training_batch(rows, seeds, epoch, self.module.versions, self.missing)
        complete = self.split.training_batch(rows, seeds, epoch, 1, COMPLETE) if self.teacher else None
        return Drawn(batch, complete)

    @torch.no_grad()
    def teach(self, drawn: Drawn) -> tuple[Any, ...]:
        """What the teacher makes of the complete samples, as the last arguments of the loss; nothing without one."""
        if self.teacher is None or drawn.complete is None:
            return ()
        return (self.teacher.represent(drawn.complete.features, drawn.complete.masks),)

    def loss(self, drawn: Drawn, taught: tuple[Any, ...]) -> Loss:
        """The scalar to minimise and its parts, `[S]` each."""
        batch = drawn.batch
        return self.module(batch.features, batch.masks, batch.targets, *taught, draw=batch.draw)


def training_step(
    config: Config, dataset: Dataset, seeds: Sequence[int], device: torch.device, dtype: torch.dtype
) -> TrainingStep:
    """The step of a config on a data set's training split; a teacher has the weights it starts its training from.

    Args:
        config: the run.
        dataset: with the split `train`, and its normalisation.
        seeds: one model each.
        device, dtype: where and in which precision the features and the models are held.
    """
    dims, teacher = dataset.feature_dims, None
    build = build_student if config.teacher else build_network
    module = stack_models([build(config, dims, seed) for seed in seeds]).to(device, dtype)
    if config.teacher:
        teacher = stack_models([build_teacher(config, dims, TEACHER_SEEDS + seed) for seed in seeds])
        teacher = teacher.to(device, dtype).eval().requires_grad_(False)
    split = ResidentSplit(
        dataset.splits["train"],
        scaling(config.data, dataset),
        config.task,
        config.data.clip,
        config.model.attention_mask,
        device,
        dtype,
        config.model.masked_layers,
    )
    return TrainingStep(module, teacher, split, config.missing)
