"""Small batches of resident data, for methods that ask their batch for more than features."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from fastmmkd.blocks import Config
from fastmmkd.data.batches import Batch, Inputs, by_layer
from fastmmkd.data.dataset import Dataset, Split
from fastmmkd.engine.step import Objective, untrained_objective
from tests.handmade import samples_of
from tests.methods import ragged_samples
from tests.methods.ragged_samples import NORMALISATION, SAMPLES, make_split

CPU, BATCH = torch.device("cpu"), 6


def config_of(method: str, task: str = "regression", /, model: dict[str, Any] | None = None, **loss: Any) -> Config:
    """A method's MOSI config, as small as it gets, without dropout; `loss`: keys of that block."""
    return ragged_samples.config_of(method, BATCH, task, layers=1, model={"width": 4} | (model or {}), loss=loss)


def split_of(task: str = "regression", alignment: str = "aligned") -> Split:
    """Random samples, see `ragged_samples.make_split`; scores that recur, or emotions."""
    split = make_split(alignment, task.startswith("emotions"))
    if not task.startswith("emotions"):
        split.labels = np.random.default_rng(3).integers(-2, 3, SAMPLES).astype(np.float32)
    return split


def objective_of(config: Config, split: Split, seed: int = 1) -> Objective:
    """What a config's last phase trains, in fp64, away from what initialisation makes special."""
    kind = "emotions" if config.task.name.startswith("emotions") else "score"
    dataset = Dataset({"train": split}, kind, "random numbers", "synthetic", normalisation=NORMALISATION)
    objective = untrained_objective(config, dataset, (seed,), CPU, torch.float64)
    torch.manual_seed(5)
    with torch.no_grad():
        for p in objective.module.parameters():
            p.add_(0.05 * torch.randn(p.shape, dtype=p.dtype))
    return objective


ROWS = torch.tensor([[3, 0, 2, 1, 7, 11]])
"""Samples of the split: among them the longest, the shortest, and one that lacks everything."""


class Sample(NamedTuple):
    """One sample as a literal twin takes it: three of each."""

    features: list[torch.Tensor]
    """`[T_m, d_m]`."""
    counts: list[torch.Tensor]
    """`[T_m]` bool, what the first layer may attend to."""
    present: list[torch.Tensor]
    """`[T_m]` bool, frames whose content is there."""


def samples(inputs: Inputs) -> list[Sample]:
    """A batch of one model, sample by sample."""
    of_modalities = [
        zip(*(samples_of(x[m], inputs.layouts[m]) for x in (inputs.features, by_layer(inputs.masks)[0])), strict=True)
        for m in range(3)
    ]
    made = []
    for sample in zip(*of_modalities, strict=True):
        features, counts = zip(*sample, strict=True)
        made.append(Sample(list(features), list(counts), [(x != 0).any(-1) for x in features]))
    return made


def has(sample: Sample, modality: int) -> bool:
    return bool(sample.present[modality].any())


def targets_of(batch: Batch) -> list[Any]:
    """A score, or a list of classes, of each sample."""
    return batch.targets[0].tolist()


def literal_error(logits: torch.Tensor, target: Any, config: Config) -> torch.Tensor:
    """L1, or cross-entropy summed over problems, of one sample."""
    if config.task.is_regression:
        return (logits[0] - target).abs()
    of_problems = logits.view(config.task.problems, -1)
    return sum(-(own.exp()[c] / own.exp().sum()).log() for own, c in zip(of_problems, target, strict=True))


def linear(layer: Any, x: torch.Tensor, *at: int) -> torch.Tensor:
    """`x W + b` of one group."""
    return x @ layer.weight[(0, *at)] + layer.bias[(0, *at)]


def assert_same_gradients(objective: Objective, total: torch.Tensor, expected: torch.Tensor, **tolerance: Any) -> None:
    """Of a loss and of its literal twin, for every parameter; each has one."""
    names, parameters = zip(*objective.module.named_parameters(), strict=True)
    found = torch.autograd.grad(total, parameters)
    literal = torch.autograd.grad(expected, parameters, allow_unused=True)
    for name, a, b in zip(names, found, literal, strict=True):
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, b, **tolerance, msg=lambda text, n=name: f"{n}: {text}")


def drawn(objective: Objective, epoch: int = 0, rows: torch.Tensor = ROWS) -> Batch:
    return objective.draw(rows, torch.tensor(epoch))
