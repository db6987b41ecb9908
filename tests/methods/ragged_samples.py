"""Samples of different lengths that lack what samples lack, and batches drawn from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fastmmkd.blocks import Config
from fastmmkd.config import parse_config
from fastmmkd.data.batches import Batch, Inputs, ResidentSplit
from fastmmkd.data.dataset import Dataset, Split
from fastmmkd.engine.step import Objective, untrained_objective
from fastmmkd.modalities import MODALITIES
from tests.handmade import samples_of, small_config_of

CPU, DIMS, SAMPLES = torch.device("cpu"), (5, 4, 3), 24
LONGEST = {"aligned": (7, 7, 7), "unaligned": (6, 9, 3), "unaligned, as long": (7, 7, 7)}
"""Of each modality; word-aligned modalities share every sample's length, and not just the longest."""
NORMALISATION = {m: (np.full(d, 0.3), np.full(d, 1.5)) for m, d in zip(MODALITIES, DIMS, strict=True)}


def make_split(alignment: str, emotions: bool = False) -> Split:
    """Random samples, the shortest of a frame, that lack a frame or a modality here and there; one lacks everything."""
    rng = np.random.default_rng(0)
    lengths = np.stack([rng.integers(1, longest + 1, SAMPLES) for longest in LONGEST[alignment]], axis=1)
    lengths[0], lengths[1] = LONGEST[alignment], 1
    if alignment == "aligned":
        lengths[:] = lengths[:, :1]
    present = rng.random((SAMPLES, 3)) < 0.8
    present[:, 2] |= ~present.any(axis=1)
    present[0], present[2] = True, False
    lengths *= present
    features = {}
    for i, (m, d) in enumerate(zip(MODALITIES, DIMS, strict=True)):
        x = rng.normal(size=(lengths[:, i].sum(), d)).astype(np.float32)
        x[rng.random(len(x)) < 0.15] = 0
        features[m] = x
    labels = rng.uniform(-3, 3, SAMPLES).astype(np.float32)
    if emotions:
        labels = (rng.random((SAMPLES, 4)) < 0.4).astype(np.float32)
    return Split(features, lengths.astype(np.int32), present, labels, [str(i) for i in range(SAMPLES)])


def make_dataset(alignment: str, task: str = "regression") -> Dataset:
    """Such samples to train on."""
    emotions = task.startswith("emotions")
    kind = "emotions" if emotions else "score"
    splits = {"train": make_split(alignment, emotions)}
    return Dataset(splits, kind, "random numbers", "synthetic", normalisation=NORMALISATION)


def config_of(method: str, batch: int, task: str = "regression", layers: int = 2, **blocks: dict[str, Any]) -> Config:
    """A method's MOSI config, small, without dropout; `blocks`: what else is changed in them."""
    raw = small_config_of(method, "none.h5", batch, layers)
    raw["train"]["task"] = task
    raw["model"]["dropout"] = 0.0
    for name, block in blocks.items():
        raw[name] |= block
    return parse_config(raw)


def objective_of(config: Config, alignment: str, *seeds: int, dtype: torch.dtype = torch.float64) -> Objective:
    """Of a method's last phase, its weights moved away from what initialisation makes special."""
    dataset = make_dataset(alignment, config.train.task)
    objective = untrained_objective(config, dataset, seeds or (1,), CPU, dtype)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in objective.module.parameters():
            p.add_(0.1 * torch.randn(p.shape[1:], dtype=p.dtype))
    return objective


def batch_of_rows(objective: Objective, rows: list[int], epoch: int = 2) -> Batch:
    """These training samples, for every model."""
    models = len(objective.seeds)
    return objective.draw(torch.tensor([rows] * models), torch.tensor(epoch))


def samples(inputs: Inputs, present: bool = False) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """A batch of one model as literal twins take it: features and masks (or who is present) of each sample."""
    masks = inputs.present if present else inputs.masks
    features = [samples_of(x, layout) for x, layout in zip(inputs.features, inputs.layouts, strict=True)]
    of_masks = [samples_of(mask, inputs.layouts[i % 3]) for i, mask in enumerate(masks)]
    return list(zip(map(list, zip(*features, strict=True)), map(list, zip(*of_masks, strict=True)), strict=True))


def resident(split: Split, config: Config, padded: bool = False) -> ResidentSplit:
    return ResidentSplit(split, NORMALISATION, config, CPU, torch.float64, padded)
