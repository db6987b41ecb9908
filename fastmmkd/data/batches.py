"""A split on the training device: a step takes an index vector and does no host work.

Shape legend: S seeds (independent models), N samples of the split, B rows of a batch, T_m frames, d_m features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch

from fastmmkd.blocks import Config, DataBlock
from fastmmkd.data.missingness import evaluation_drops
from fastmmkd.data.store import Dataset, Split
from fastmmkd.modalities import MODALITIES
from fastmmkd.ops import missing_draw
from fastmmkd.ops.philox import DrawKeys
from fastmmkd.ops.reference import missing_pattern

Normalisation = dict[str, tuple[np.ndarray, np.ndarray]]
"""Modality -> (mean `[d_m]`, std `[d_m]`), float64: what features are scaled by, in training as in prediction."""


def scaling(data: DataBlock, dataset: Dataset) -> Normalisation:
    """The training split's statistics; mean 0 and std 1 where `data.standardise` is false."""
    if data.standardise:
        return dataset.normalisation
    return {m: (np.zeros(d), np.ones(d)) for m, d in zip(MODALITIES, dataset.feature_dims, strict=True)}


class View(Enum):
    """A version of the samples that a phase may want to see."""

    COMPLETE = "complete"
    """Everything that a sample has."""
    MISSING = "missing"
    """A draw of missing modalities and frames."""
    MISSING_2 = "missing 2"
    """Another one, independent of the first."""


class Inputs(NamedTuple):
    """What a network reads."""

    features: list[torch.Tensor]
    """Per modality `[S, V * B, T_m, d_m]`, standardised, zero where missing; version-major."""
    masks: list[torch.Tensor]
    """Per modality `[S, V * B, T_m]` bool, frames that may be attended to (`model.attention_mask`): three masks that
    serve every layer, or the first layer's three and the later ones' three (`model.masked_layers`); see `by_layer`."""


@dataclass
class Batch:
    """What a method trains on; a view that the phase did not ask for is None."""

    missing: Inputs | None
    """All missing views, side by side on the batch axis."""
    whole: Inputs | None
    """The complete view."""
    targets: torch.Tensor
    """`[S, B]` or `[S, B, problems]`, see `Task.targets`."""
    draw: DrawKeys
    """The batch's rows of the training split, seeds and epoch: what every draw is keyed by."""
    split: ResidentSplit
    """Where it comes from."""
    taught: Any = None
    """What `Trainable.teach` made of it."""

    @property
    def rows(self) -> torch.Tensor:
        """`[S, B]` int64, of the training split."""
        return self.draw.sample

    @property
    def inputs(self) -> Inputs:
        """What is learnt from: the missing views, or the complete one where the phase sees no other."""
        return self.missing or self.complete

    @property
    def complete(self) -> Inputs:
        """Samples with all they have.

        Raises:
            ValueError: the phase did not ask for them.
        """
        if self.whole is None:
            raise ValueError(f"the phase does not see {View.COMPLETE}")
        return self.whole

    def view(self, view: View) -> Inputs:
        """One view of the samples, `[S, B, ...]`.

        Raises:
            ValueError: the phase did not ask for it.
        """
        if view is View.COMPLETE:
            return self.complete
        first, found, batch = view is View.MISSING_2, self.missing, self.rows.shape[1]
        if found is None or found.features[0].shape[1] < (first + 1) * batch:
            raise ValueError(f"the phase does not see {view}")
        at = slice(first * batch, (first + 1) * batch)
        return Inputs([x[:, at] for x in found.features], [x[:, at] for x in found.masks])

    @property
    def kept(self) -> torch.Tensor:
        """`[S, V, B, 3]` bool, the modalities that each missing view keeps of those that the sample has."""
        present = self.split.present[self.rows]
        versions = 0 if self.missing is None else self.missing.features[0].shape[1] // self.rows.shape[1]
        if not self.split.missing.enabled:
            return present[:, None].expand(-1, versions, -1, -1)
        return missing_pattern(present, *self.draw, versions, self.split.missing.p_max)[0]

    @property
    def real(self) -> list[torch.Tensor]:
        """Per modality `[S, B, T_m]` bool, frames that are no padding, whether or not their content is there."""
        return [mask[self.rows] for mask in self.split.real_masks]


def by_layer(masks: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """`Inputs.masks` as what the first layer masks and what all that follows masks, three tensors each."""
    n = len(MODALITIES)
    return masks[:n], masks[-n:]


class ResidentSplit:
    """Standardised features, masks and targets of one split, held on a device.

    Args:
        split: the samples.
        normalisation: what their features are scaled by.
        config: says how they are clipped and masked, what is predicted, and what training drops.
        device, dtype: where and in which precision the features are held.
    """

    def __init__(
        self, split: Split, normalisation: Normalisation, config: Config, device: torch.device, dtype: torch.dtype
    ) -> None:
        self.size = len(split)
        self.masking, self.masked_layers = config.model.attention_mask, config.model.masked_layers
        self.missing, clip = config.missing, config.data.clip
        frame_masks = [split.frame_mask(m) for m in MODALITIES]
        self.features = [
            torch.from_numpy(standardise(split.features[m], mask, *normalisation[m], clip)).to(device, dtype)
            for m, mask in zip(MODALITIES, frame_masks, strict=True)
        ]
        self.frame_masks = [torch.from_numpy(mask).to(device) for mask in frame_masks]
        self.real_masks = [torch.from_numpy(real_mask(split, i)).to(device) for i in range(len(MODALITIES))]
        self.present = torch.from_numpy(split.present).to(device)
        self.targets = torch.from_numpy(config.task.targets(split.labels)).to(device)

    def training_batch(
        self, rows: torch.Tensor, seeds: torch.Tensor, epoch: torch.Tensor, views: Sequence[View]
    ) -> Batch:
        """A batch of training samples, as a phase sees them.

        Args:
            rows: `[S, B]` int64 rows of this split, on its device.
            seeds: `[S]` int64, on its device.
            epoch: 0-dimensional int64, on its device.
            views: what the phase sees.
        """
        versions = len(views) - (View.COMPLETE in views)
        missing = self._missing(rows, seeds, epoch, versions) if versions else None
        complete = self._complete(rows, 1) if View.COMPLETE in views else None
        return Batch(missing, complete, self.targets[rows], DrawKeys(rows, seeds, epoch), self)

    def _missing(self, rows: torch.Tensor, seeds: torch.Tensor, epoch: torch.Tensor, versions: int) -> Inputs:
        missing = self.missing
        if not missing.enabled:
            return self._complete(rows, versions)
        whole, exact = (self.features, self.frame_masks, self.present), missing.ratio == "exact"
        features, masks = missing_draw(*whole, rows, seeds, epoch, versions, missing.p_max, exact)
        return Inputs(features, self._attention_masks(masks, rows, versions))

    def _complete(self, rows: torch.Tensor, versions: int) -> Inputs:
        features = [x[rows].repeat(1, versions, 1, 1) for x in self.features]
        masks = [mask[rows].repeat(1, versions, 1) for mask in self.frame_masks]
        return Inputs(features, self._attention_masks(masks, rows, versions))

    def evaluation_batch(
        self,
        sample: torch.Tensor,
        kept: tuple[bool, bool, bool],
        p: float = 0.0,
        seed: int = 0,
        condition: int = 0,
        exact: bool = False,
    ) -> Inputs:
        """Samples under a testing condition.

        Args:
            sample: `[B]` int64 rows of this split.
            kept: modalities that stay.
            p: frame ratio.
            seed, condition: key of the frame draws, see `evaluation_drops`.

        Returns:
            Features `[1, B, T_m, d_m]` per modality, and masks `[1, B, T_m]`.
        """
        features, masks = [], []
        for m, (x, frame_mask) in enumerate(zip(self.features, self.frame_masks, strict=True)):
            mask = frame_mask[sample]
            mask = (mask & ~evaluation_drops(mask, p, m, sample, seed, condition, exact)) if kept[m] else mask & False
            features.append((x[sample] * mask.unsqueeze(-1)).unsqueeze(0))
            masks.append(mask.unsqueeze(0))
        return Inputs(features, self._attention_masks(masks, sample.unsqueeze(0), 1))

    def _attention_masks(self, masks: list[torch.Tensor], sample: torch.Tensor, versions: int) -> list[torch.Tensor]:
        if self.masking == "none":
            return [torch.ones_like(mask) for mask in masks]
        if self.masking == "missing" and self.masked_layers == "all":
            return masks
        real = [mask[sample].repeat(1, versions, 1) for mask in self.real_masks]
        return masks + real if self.masking == "missing" else real


def standardise(x: np.ndarray, mask: np.ndarray, mean: np.ndarray, std: np.ndarray, clip: float | None) -> np.ndarray:
    """`(x - mean) / std`, clipped to +- `clip`, zero where `mask` is False: `[N, T, d]` float32."""
    z = (x - mean.astype(np.float32)) / std.astype(np.float32)
    if clip is not None:
        np.clip(z, -clip, clip, out=z)
    return np.where(mask[..., None], z, np.float32(0)).astype(np.float32)


def real_mask(split: Split, modality: int) -> np.ndarray:
    """`[N, T_m]` bool, True where a frame is not padding, whether or not its content is there.

    A modality that a sample lacks takes the longest length of the sample's others, as far as it fits (word-aligned
    modalities share their length).
    """
    steps = split.features[MODALITIES[modality]].shape[1]
    lengths = np.where(split.present[:, modality], split.lengths[:, modality], split.lengths.max(axis=1))
    return np.arange(steps)[None, :] >= steps - np.minimum(lengths, steps)[:, None]
