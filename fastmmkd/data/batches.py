"""A split on the training device: a step takes an index vector and does no host work.

Shape legend: S seeds (independent models), N samples of the split, B rows of a batch, T_m frames, d_m features.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fastmmkd.config import DataBlock, MissingBlock
from fastmmkd.data.missingness import MaskedLayers, Masking, evaluation_drops
from fastmmkd.data.store import Dataset, Split
from fastmmkd.modalities import MODALITIES
from fastmmkd.ops import missing_draw
from fastmmkd.ops.philox import DrawKeys
from fastmmkd.tasks import Task

Normalisation = dict[str, tuple[np.ndarray, np.ndarray]]
"""Modality -> (mean `[d_m]`, std `[d_m]`), float64: what features are scaled by, in training as in prediction."""


def scaling(data: DataBlock, dataset: Dataset) -> Normalisation:
    """The training split's statistics; mean 0 and std 1 where `data.standardise` is false."""
    if data.standardise:
        return dataset.normalisation
    return {m: (np.zeros(d), np.ones(d)) for m, d in zip(MODALITIES, dataset.feature_dims, strict=True)}


@dataclass
class Batch:
    """What a method trains on."""

    features: list[torch.Tensor]
    """Per modality `[S, V * B, T_m, d_m]`, standardised, zero where missing; version-major."""
    masks: list[torch.Tensor]
    """Per modality `[S, V * B, T_m]` bool, frames that may be attended to (`model.attention_mask`): three masks that
    serve every layer, or the first layer's three and the later ones' three (`model.masked_layers`); see `by_layer`."""
    targets: torch.Tensor
    """`[S, B]` or `[S, B, problems]`, see `Task.targets`."""
    draw: DrawKeys
    """What the networks draw their dropout from."""


def by_layer(masks: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """`Batch.masks` as what the first layer masks and what all that follows masks, three tensors each."""
    n = len(MODALITIES)
    return masks[:n], masks[-n:]


class ResidentSplit:
    """Standardised features, masks and targets of one split, held on a device."""

    def __init__(
        self,
        split: Split,
        normalisation: Normalisation,
        task: Task,
        clip: float | None,
        masking: Masking,
        device: torch.device,
        dtype: torch.dtype,
        masked_layers: MaskedLayers = "all",
    ) -> None:
        self.size = len(split)
        self.masking, self.masked_layers = masking, masked_layers
        frame_masks = [split.frame_mask(m) for m in MODALITIES]
        self.features = [
            torch.from_numpy(standardise(split.features[m], mask, *normalisation[m], clip)).to(device, dtype)
            for m, mask in zip(MODALITIES, frame_masks, strict=True)
        ]
        self.frame_masks = [torch.from_numpy(mask).to(device) for mask in frame_masks]
        self.real_masks = [torch.from_numpy(real_mask(split, i)).to(device) for i in range(len(MODALITIES))]
        self.present = torch.from_numpy(split.present).to(device)
        self.targets = torch.from_numpy(task.targets(split.labels)).to(device)

    def training_batch(
        self, sample: torch.Tensor, seed: torch.Tensor, epoch: torch.Tensor, versions: int, missing: MissingBlock
    ) -> Batch:
        """The missing versions of a batch.

        Args:
            sample: `[S, B]` int64 rows of this split, on its device.
            seed: `[S]` int64, on its device.
            epoch: 0-dimensional int64, on its device.
            versions: V, how many versions the method trains on.
            missing: what is dropped.
        """
        if missing.enabled:
            features, masks = missing_draw(
                self.features,
                self.frame_masks,
                self.present,
                sample,
                seed,
                epoch,
                versions,
                missing.p_max,
                missing.ratio == "exact",
            )
        else:
            features = [x[sample].repeat(1, versions, 1, 1) for x in self.features]
            masks = [mask[sample].repeat(1, versions, 1) for mask in self.frame_masks]
        masks = self._attention_masks(masks, sample, versions)
        return Batch(features, masks, self.targets[sample], DrawKeys(sample, seed, epoch))

    def evaluation_batch(
        self,
        sample: torch.Tensor,
        kept: tuple[bool, bool, bool],
        p: float = 0.0,
        seed: int = 0,
        condition: int = 0,
        exact: bool = False,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Samples under a testing condition.

        Args:
            sample: `[B]` int64 rows of this split.
            kept: modalities that stay.
            p: frame ratio.
            seed, condition: key of the frame draws, see `evaluation_drops`.

        Returns:
            Features `[1, B, T_m, d_m]` per modality, and masks `[1, B, T_m]` as `Batch.masks` has them.
        """
        features, masks = [], []
        for m, (x, frame_mask) in enumerate(zip(self.features, self.frame_masks, strict=True)):
            mask = frame_mask[sample]
            mask = (mask & ~evaluation_drops(mask, p, m, sample, seed, condition, exact)) if kept[m] else mask & False
            features.append((x[sample] * mask.unsqueeze(-1)).unsqueeze(0))
            masks.append(mask.unsqueeze(0))
        return features, self._attention_masks(masks, sample.unsqueeze(0), 1)

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
