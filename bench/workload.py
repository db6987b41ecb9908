"""Random resident data of a config's shape: every sample complete and as long as the longest, the most a step costs.

Shape legend: S seeds (independent models), N samples, B rows of a batch, T frames, d_m features of modality m.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastmmkd.blocks import Config
from fastmmkd.data.dataset import EMOTIONS, Dataset, Split
from fastmmkd.errors import UserError
from fastmmkd.modalities import MODALITIES

BATCHES = 8
"""Of the resident data: more than what stays in the caches from one step to the next."""


class Shape(NamedTuple):
    """Of a data set's samples."""

    frames: int
    dims: tuple[int, ...]


SHAPES = {
    "mosei": Shape(50, (300, 74, 35)),
    "mosi": Shape(50, (300, 74, 35)),
    "iemocap": Shape(20, (300, 74, 35)),
    "mmmo": Shape(20, (300, 74, 36)),
}
"""By a word in the name of the data file; any other name takes the first."""


class Keys(NamedTuple):
    """What one step draws its batch with, on the device."""

    rows: torch.Tensor
    """`[S, B]` int64."""
    seeds: torch.Tensor
    """`[S]` int64."""
    epoch: torch.Tensor
    """0-dimensional int64."""


def shape_of(config: Config, frames: int | None = None, dims: str | None = None) -> Shape:
    """The frames and feature widths of the config's data set, or those given.

    Args:
        config: the run; its data file need not be there.
        frames: T of every modality.
        dims: `"300,74,35"`.

    Raises:
        UserError: not three positive numbers.
    """
    stem = Path(config.data.path).stem.lower()
    known = next((shape for word, shape in SHAPES.items() if word in stem), SHAPES["mosei"])
    widths = known.dims if dims is None else tuple(int(x) if x.strip().isdigit() else 0 for x in dims.split(","))
    if len(widths) != len(MODALITIES) or min(widths) < 1:
        raise UserError(f"--dims {dims}: expected three widths, for example 300,74,35")
    return Shape(frames or known.frames, widths)


def random_dataset(config: Config, shape: Shape, samples: int) -> Dataset:
    """Standard normal features, uniform labels, nothing missing; the training split alone."""
    rng = np.random.default_rng(0)
    features = {
        m: rng.standard_normal((samples, shape.frames, d), np.float32)
        for m, d in zip(MODALITIES, shape.dims, strict=True)
    }
    emotions = config.task.label_kind == "emotions"
    labels = (
        np.eye(len(EMOTIONS))[rng.integers(len(EMOTIONS), size=samples)] if emotions else rng.uniform(-3, 3, samples)
    )
    split = Split(
        features,
        lengths=np.full((samples, len(MODALITIES)), shape.frames, np.int32),
        present=np.ones((samples, len(MODALITIES)), bool),
        labels=labels.astype(np.float32),
        ids=[str(i) for i in range(samples)],
    )
    normalisation = {m: (np.zeros(d), np.ones(d)) for m, d in zip(MODALITIES, shape.dims, strict=True)}
    kind = config.task.label_kind
    return Dataset({"train": split}, kind, "random", "synthetic", normalisation=normalisation)


def keys_of(step: int, seeds: int, batch: int, samples: int, device: torch.device) -> Keys:
    """Of one step of seeds 1, 2, ...: a seed's rows are the same whether it is alone or with others."""
    epoch, at = divmod(step, samples // batch)
    orders = [
        torch.randperm(samples, generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for seed in range(1, seeds + 1)
    ]
    rows = torch.stack(orders)[:, at * batch : (at + 1) * batch]
    return Keys(rows.to(device), torch.arange(1, seeds + 1, device=device), torch.tensor(epoch, device=device))
