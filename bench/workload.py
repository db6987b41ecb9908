"""Random resident data of a config's shape: complete samples, as long as a data set's or all as long as the longest.

Shape legend: S models, N samples, B rows of a batch, T frames, d_m features of modality m.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from fastmmkd.blocks import Config
from fastmmkd.data.dataset import EMOTIONS, Dataset, Split
from fastmmkd.data.synthetic import draw_lengths
from fastmmkd.data.synthetic_world import KINDS
from fastmmkd.errors import UserError
from fastmmkd.modalities import MODALITIES

BATCHES = 8
"""Of the resident data: more than what stays in the caches from one step to the next."""


FULL = "full"
"""Lengths: every sample is as long as the longest, the most that a step costs."""
LENGTHS = (*KINDS, FULL)
"""Those of a data set, drawn as `fastmmkd.data.synthetic` draws them, or `FULL`."""


class Shape(NamedTuple):
    """Of a data set's samples."""

    frames: int
    """Of the longest."""
    dims: tuple[int, ...]
    lengths: str = FULL
    """One of `LENGTHS`; the three modalities of a sample have one length (word-aligned)."""


SHAPES = {
    "mosei": Shape(50, (300, 74, 35), "mosei"),
    "mosi": Shape(50, (300, 74, 35), "mosi"),
    "iemocap": Shape(20, (300, 74, 35), "iemocap"),
    "mmmo": Shape(20, (300, 74, 36), FULL),
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


def shape_of(config: Config, frames: int | None = None, dims: str | None = None, lengths: str | None = None) -> Shape:
    """The frames, feature widths and lengths of the config's data set, or those given.

    Args:
        config: the run; its data file need not be there.
        frames: T of every modality.
        dims: `"300,74,35"`.
        lengths: one of `LENGTHS`.

    Raises:
        UserError: not three positive numbers.
    """
    stem = Path(config.data.path).stem.lower()
    known = next((shape for word, shape in SHAPES.items() if word in stem), SHAPES["mosei"])
    widths = known.dims if dims is None else tuple(int(x) if x.strip().isdigit() else 0 for x in dims.split(","))
    if len(widths) != len(MODALITIES) or min(widths) < 1:
        raise UserError(f"--dims {dims}: expected three widths, for example 300,74,35")
    return Shape(frames or known.frames, widths, lengths or known.lengths)


def lengths_of(shape: Shape, samples: int) -> np.ndarray:
    """Frames of each sample, `[N]` int32.

    Those of a data set are stretched to a longest of `shape.frames`. The first sample is that long in any case, so that
    whoever pads pads to it.
    """
    if shape.lengths == FULL:
        return np.full(samples, shape.frames, np.int32)
    kind = KINDS[shape.lengths]
    stretched = replace(kind, median_length=kind.median_length * shape.frames / kind.steps, steps=shape.frames)
    lengths = draw_lengths(stretched, samples, np.random.default_rng(1))
    lengths[0] = shape.frames
    return lengths


def random_dataset(config: Config, shape: Shape, samples: int) -> Dataset:
    """Standard normal features, uniform labels, nothing missing; the training split alone."""
    rng, lengths = np.random.default_rng(0), lengths_of(shape, samples)
    rows = int(lengths.sum())
    features = {m: rng.standard_normal((rows, d), np.float32) for m, d in zip(MODALITIES, shape.dims, strict=True)}
    emotions = config.task.label_kind == "emotions"
    labels = (
        np.eye(len(EMOTIONS))[rng.integers(len(EMOTIONS), size=samples)] if emotions else rng.uniform(-3, 3, samples)
    )
    split = Split(
        features,
        lengths=np.repeat(lengths[:, None], len(MODALITIES), axis=1),
        present=np.ones((samples, len(MODALITIES)), bool),
        labels=labels.astype(np.float32),
        ids=[str(i) for i in range(samples)],
    )
    normalisation = {m: (np.zeros(d), np.ones(d)) for m, d in zip(MODALITIES, shape.dims, strict=True)}
    kind = config.task.label_kind
    return Dataset({"train": split}, kind, "random", "synthetic", normalisation=normalisation)


def keys_of(step: int, models: int, batch: int, samples: int, device: torch.device) -> Keys:
    """Of one step of seeds 1, 2, ...: a seed's rows are the same whether it is alone or with others."""
    epoch, at = divmod(step, samples // batch)
    orders = [
        torch.randperm(samples, generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for seed in range(1, models + 1)
    ]
    rows = torch.stack(orders)[:, at * batch : (at + 1) * batch]
    return Keys(rows.to(device), torch.arange(1, models + 1, device=device), torch.tensor(epoch, device=device))
