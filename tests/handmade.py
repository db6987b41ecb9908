"""Batches, networks and students made by hand, without a data set or a run."""

from __future__ import annotations

from typing import Any

import torch

from fastmmkd.blocks import Block, Config, DataBlock, MissingBlock, ModelBlock, TrainBlock
from fastmmkd.data.batches import Batch, Inputs
from fastmmkd.methods import METHODS
from fastmmkd.methods.method import Network, Trainable
from fastmmkd.ops.philox import DrawKeys


def batch_of(
    features: list[torch.Tensor],
    masks: list[torch.Tensor],
    targets: torch.Tensor,
    taught: Any = None,
    draw: DrawKeys | None = None,
) -> Batch:
    """What a method trains on; without `draw` there is no dropout."""
    return Batch(Inputs(features, masks), None, targets, draw, None, taught)  # type: ignore[arg-type]


def network_of(config: Config, dims: tuple[int, ...], seed: int) -> Network:
    """What a config's last phase exports, freshly initialised."""
    torch.manual_seed(seed)
    return METHODS[config.method].network(config, dims)


def student_of(config: Config, dims: tuple[int, ...], seed: int, teacher: Network | None = None) -> Trainable:
    """What a config's last phase trains, with that teacher or one that has not learnt."""
    earlier = {"teacher": teacher or network_of(config, dims, seed)}
    torch.manual_seed(seed)
    return METHODS[config.method].phases_of(config)[-1].build(config, dims, earlier)


def config_for_data(
    task: str = "regression", clip: float | None = 10.0, missing: dict[str, Any] | None = None, **model: Any
) -> Config:
    """What a `ResidentSplit` asks of a config; `model`: keys of that block."""
    return Config(
        method="none",
        data=DataBlock(path="none.h5", clip=clip),
        model=ModelBlock(**model),
        missing=MissingBlock(**(missing or {})),
        loss=Block(),
        train=TrainBlock(task=task, batch_size=2, epochs=1),
        deepspeed={"optimizer": {"type": "Adam"}},
    )
