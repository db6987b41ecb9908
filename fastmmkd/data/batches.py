"""A split on the training device: a step takes an index vector and does no host work.

Shape legend: S models, N samples of the split, B samples of a batch, V versions of each, R_m rows of modality m (real
frames, one sample after the other), d_m features.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple

import numpy as np
import torch

from fastmmkd.blocks import Config, DataBlock
from fastmmkd.data.missingness import evaluation_drops
from fastmmkd.data.store import Dataset, Split
from fastmmkd.modalities import MODALITIES
from fastmmkd.ops.layout import Layout, split_versions, unpack
from fastmmkd.ops.missing_draw import missing_draw, missing_pattern, stored_rows
from fastmmkd.ops.philox import DrawKeys

CHUNK = 1 << 16
"""Rows that are standardised at once."""

Normalisation = dict[str, tuple[np.ndarray, np.ndarray]]
"""Modality -> (mean `[d_m]`, std `[d_m]`), float64: what features are scaled by, in training as in prediction."""


def scaling(data: DataBlock, dataset: Dataset) -> Normalisation:
    """The training split's statistics; mean 0 and std 1 where `data.standardise` is false."""
    if data.standardise:
        return dataset.normalisation
    return {m: (np.zeros(d), np.ones(d)) for m, d in zip(MODALITIES, dataset.feature_dims, strict=True)}


Kept = tuple[bool, bool, bool]
"""A subset of language, audio, visual."""


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
    """Per modality `[S, R_m, d_m]`, standardised, zero where missing."""
    masks: list[torch.Tensor]
    """Per modality `[S, R_m]` bool, frames that may be attended to (`model.attention_mask`): three masks that serve
    every layer, or the first layer's three and the later ones' three (`model.masked_layers`); see `by_layer`."""
    layouts: list[Layout]
    """Per modality whose rows they are, V * B samples, version-major; one object where frames are word-aligned."""
    masks_missing: bool = True
    """Whether the first three masks leave out missing frames (`model.attention_mask: missing`)."""

    @property
    def aligned(self) -> bool:
        """Whether the modalities share their rows."""
        return all(layout is self.layouts[0] for layout in self.layouts)

    @property
    def present(self) -> list[torch.Tensor]:
        """Per modality `[S, R_m]` bool, frames whose content is there, whatever may be attended to: others are 0."""
        return [(x != 0).any(-1) for x in self.features]

    @property
    def available(self) -> list[torch.Tensor]:
        """Per modality `[S, V * B]` bool, samples of which some frame is there."""
        return [unpack(mask, layout).any(-1) for mask, layout in zip(self.present, self.layouts, strict=True)]

    def only(self, kept: Kept) -> Inputs:
        """The samples without some of their modalities, as `ResidentSplit.evaluation_batch` gives them."""
        features = [x if k else torch.zeros_like(x) for x, k in zip(self.features, kept, strict=True)]
        masks = self.masks
        if self.masks_missing:
            masks = [x if k else torch.zeros_like(x) for x, k in zip(masks[:3], kept, strict=True)] + masks[3:]
        return Inputs(features, masks, self.layouts, self.masks_missing)

    def of_models(self, models: int) -> Inputs:
        """The same samples for each of several models, from those of one."""
        features, masks = ([x.expand(models, *x.shape[1:]) for x in of] for of in (self.features, self.masks))
        return Inputs(features, masks, self.layouts, self.masks_missing)


@dataclass
class Batch:
    """What a method trains on; a view that the phase did not ask for is None."""

    missing: Inputs | None
    """All missing views, side by side on the batch axis."""
    whole: Inputs | None
    """The complete view."""
    targets: torch.Tensor
    """`[S, B]` or `[S, B, problems]`, see `Task.targets`."""
    layouts: list[Layout]
    """Per modality whose rows one view holds."""
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
        version, missing = int(view is View.MISSING_2), self.missing
        if missing is None or self.versions <= version:
            raise ValueError(f"the phase does not see {view}")
        features, masks = (
            [
                split_versions(x, missing.layouts[i % len(MODALITIES)], self.layouts[i % len(MODALITIES)])[version]
                for i, x in enumerate(of_modalities)
            ]
            for of_modalities in (missing.features, missing.masks)
        )
        return missing._replace(features=features, masks=masks, layouts=self.layouts)

    @property
    def versions(self) -> int:
        """V, how many missing views there are."""
        return self.missing.layouts[0].batch // self.rows.shape[1] if self.missing else 0

    @property
    def kept(self) -> torch.Tensor:
        """`[S, V, B, 3]` bool, the modalities that each missing view keeps of those that the sample has."""
        present = self.split.present[self.rows]
        if not self.split.missing.enabled:
            return present[:, None].expand(-1, self.versions, -1, -1)
        return missing_pattern(present, *self.draw, self.versions, self.split.missing.p_max)[0]

    @property
    def real(self) -> list[torch.Tensor]:
        """Per modality `[S, R_m]` bool, rows of `layouts` that are frames, whether or not their content is there."""
        return self.split.real(self.rows, self.layouts)


def by_layer(masks: list[torch.Tensor]) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """`Inputs.masks` as what the first layer masks and what all that follows masks, three tensors each."""
    n = len(MODALITIES)
    return (masks, masks) if len(masks) == n else (masks[:n], masks[n:])


class ResidentSplit:
    """Standardised features, masks and targets of one split, held on a device as rows.

    Args:
        split: the samples.
        normalisation: what their features are scaled by.
        config: says how they are clipped and masked, what is predicted, and what training drops.
        device, dtype: where and in which precision the features are held.
        padded: batches hold every sample as long as the split's longest, the frames last. Nothing that is predicted
            depends on it; `model.attention_mask: none`, to which padding is frames, needs it.
    """

    room: list[int] | None = None
    """Per modality R of every training batch of one view; None: as many as its samples have, which the host counts."""

    def __init__(
        self,
        split: Split,
        normalisation: Normalisation,
        config: Config,
        device: torch.device,
        dtype: torch.dtype,
        padded: bool = False,
    ) -> None:
        self.size = len(split)
        self.masking, self.masked_layers = config.model.attention_mask, config.model.masked_layers
        self.missing, clip = config.missing, config.data.clip
        self.features, self.frame_masks, self.starts = [], [], []
        for m in MODALITIES:
            frame_mask = split.frame_mask(m)
            rows = standardise(split.features[m], frame_mask, *normalisation[m], clip)
            self.features.append(torch.from_numpy(rows).to(device, dtype))
            self.frame_masks.append(torch.from_numpy(frame_mask).to(device))
            self.starts.append(torch.from_numpy(split.starts(m)).to(device))
        frames = frames_of(split)
        rows = np.broadcast_to(frames.max(0), frames.shape) if padded or self.masking == "none" else frames
        rows = np.maximum(rows, 1)
        shared = rows if self.masking == "none" else frames  # what positions count
        self.aligned = bool((shared == shared[:, :1]).all())
        self.longest = [int(rows[:, m].max()) for m in range(len(MODALITIES))]
        self.is_uniform = [int(rows[:, m].min()) == longest for m, longest in enumerate(self.longest)]
        """Per modality whether batches hold as many rows of every sample."""
        self.rows = rows
        """`[N, 3]`, rows that a batch holds of each sample."""
        self.lengths = torch.from_numpy(rows.T.astype(np.int64)).to(device)
        """`[3, N]` int64, the same on the device."""
        self.frames = torch.from_numpy(np.ascontiguousarray(frames.T)).to(device)
        """`[3, N]` int64, how many of them, the last ones, are frames."""
        self.is_padded = bool((rows != frames).any())
        self.present = torch.from_numpy(split.present).to(device)
        self.targets = torch.from_numpy(config.task.targets(split.labels)).to(device)

    def make_room(self, batches: Iterable[np.ndarray]) -> None:
        """Give every batch of training the same number of rows, which a CUDA graph needs: that of the largest.

        Args:
            batches: `[..., B]` samples of each that will come, the last axis those of one model.
        """
        most = [self.rows[batch].sum(-2).reshape(-1, len(MODALITIES)).max(0) for batch in batches]
        self.room = [int(rows) for rows in np.max(most, axis=0)]

    def layouts(self, sample: torch.Tensor, versions: int = 1, room: list[int] | None = None) -> list[Layout]:
        """Whose rows a batch of samples `[S, B]` holds, V times each, per modality; `room`: R of a version."""
        made: list[Layout] = []
        for m in range(1 if self.aligned else len(MODALITIES)):
            lengths = self.lengths[m][sample]
            if self.is_uniform[m]:
                rows, longest, is_full = sample.shape[1] * self.longest[m], self.longest[m], True
            elif room is not None:
                rows, longest, is_full = room[m], self.longest[m], False
            else:
                rows, longest = (int(x) for x in torch.stack((lengths.sum(1).max(), lengths.max())).tolist())
                is_full = len(sample) == 1
            # Where padding is frames, positions count from its first.
            padding = lengths - self.frames[m][sample] if self.is_padded and self.masking != "none" else None
            if versions > 1:
                lengths = lengths.repeat(1, versions)
                padding = None if padding is None else padding.repeat(1, versions)
            made.append(Layout.of(lengths, versions * rows, longest, padding, is_full, self.is_uniform[m]))
        return made * len(MODALITIES) if self.aligned else made

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
        layouts = self.layouts(rows, room=self.room)
        missing = complete = None
        if versions:
            of_versions = layouts if versions == 1 else self.layouts(rows, versions, self.room)
            missing = self._missing(rows, seeds, epoch, of_versions)
        if View.COMPLETE in views:
            complete = self.complete(rows, layouts)
        return Batch(missing, complete, self.targets[rows], layouts, DrawKeys(rows, seeds, epoch), self)

    def _missing(self, rows: torch.Tensor, seeds: torch.Tensor, epoch: torch.Tensor, layouts: list[Layout]) -> Inputs:
        missing = self.missing
        if not missing.enabled:
            return self.complete(rows, layouts)
        split, exact = (self.features, self.frame_masks, self.starts, self.present), missing.ratio == "exact"
        versions = layouts[0].batch // rows.shape[1]
        features, masks = missing_draw(*split, rows, seeds, epoch, layouts, versions, missing.p_max, exact)
        return Inputs(features, self._attention_masks(masks, rows, layouts), layouts, self.masking == "missing")

    def complete(self, rows: torch.Tensor, layouts: list[Layout] | None = None) -> Inputs:
        """Samples `[S, B]` with all they have; `layouts`: of as many versions of them as wanted, by default one."""
        layouts = layouts or self.layouts(rows)
        features, masks = [], []
        for m, layout in enumerate(layouts):
            frames = self._stored(m, rows, layout)
            masks.append(frames.mask)
            features.append(self._read(m, frames.row, frames.mask))
        return Inputs(features, self._attention_masks(masks, rows, layouts), layouts, self.masking == "missing")

    def _stored(self, m: int, sample: torch.Tensor, layout: Layout) -> _Stored:
        row, number = stored_rows(self.starts[m], sample, layout)
        if not len(self.features[m]):  # the split lacks the modality
            return _Stored(row, number, torch.zeros_like(row, dtype=torch.bool))
        row = row.clamp_max(len(self.features[m]) - 1)
        return _Stored(row, number, self.frame_masks[m][row] & (number >= 0))

    def _read(self, m: int, row: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.features[m]
        return x[row].masked_fill(~mask.unsqueeze(-1), 0) if len(x) else x.new_zeros((*row.shape, x.shape[1]))

    def evaluation_batch(
        self,
        sample: torch.Tensor,
        kept: Kept,
        p: float = 0.0,
        seed: int = 0,
        condition: int = 0,
        exact: bool = False,
    ) -> Inputs:
        """Samples under a testing condition, `[1, R_m, ...]`.

        Args:
            sample: `[B]` int64 rows of this split.
            kept: modalities that stay.
            p: frame ratio.
            seed, condition: key of the frame draws, see `evaluation_drops`.
        """
        rows = sample.unsqueeze(0)
        layouts = self.layouts(rows)
        features, masks = [], []
        for m, layout in enumerate(layouts):
            row, number, mask = self._stored(m, rows, layout)
            if not kept[m]:
                mask = torch.zeros_like(mask)
            elif p > 0.0:
                mask = mask & ~evaluation_drops(mask, number, p, m, rows, layout, seed, condition, exact)
            features.append(self._read(m, row, mask))
            masks.append(mask)
        return Inputs(features, self._attention_masks(masks, rows, layouts), layouts, self.masking == "missing")

    def real(self, sample: torch.Tensor, layouts: list[Layout]) -> list[torch.Tensor]:
        """Per modality `[S, R_m]` bool, rows that are frames, whether or not their content is there."""
        real = []
        for m, layout in enumerate(layouts):
            if self.is_padded:
                whose = layout.sample.clamp_max(layout.batch - 1)
                frames = self.frames[m][sample.gather(1, whose % sample.shape[1])]
                before_end = layout.starts.gather(1, whose + 1) - torch.arange(layout.rows, device=sample.device)
                real.append((before_end <= frames) & layout.is_somebodys)
            else:
                real.append(layout.is_somebodys)
        return real

    def _attention_masks(
        self, masks: list[torch.Tensor], sample: torch.Tensor, layouts: list[Layout]
    ) -> list[torch.Tensor]:
        if self.masking == "none":
            return [layout.is_somebodys for layout in layouts]
        if self.masking == "missing" and self.masked_layers == "all":
            return masks
        real = self.real(sample, layouts)
        return masks + real if self.masking == "missing" else real


class _Stored(NamedTuple):
    """Where the rows of a batch lie in the split, `[S, R_m]` each."""

    row: torch.Tensor
    number: torch.Tensor
    """Among its sample's frames; negative where it is none of them."""
    mask: torch.Tensor
    """Whether the frame is there and holds something."""


def standardise(x: np.ndarray, mask: np.ndarray, mean: np.ndarray, std: np.ndarray, clip: float | None) -> np.ndarray:
    """`(x - mean) / std`, clipped to +- `clip`, zero where `mask` is False: `[R, d]` float32."""
    z = np.empty(x.shape, np.float32)
    mean, std = mean.astype(np.float32), std.astype(np.float32)
    for start in range(0, len(x), CHUNK):  # nothing else as large as the data
        part = z[start : start + CHUNK]
        np.subtract(x[start : start + CHUNK], mean, out=part)
        part /= std
        if clip is not None:
            np.clip(part, -clip, clip, out=part)
        part[~mask[start : start + CHUNK]] = 0.0
    return z


def frames_of(split: Split) -> np.ndarray:
    """`[N, 3]` int64, the real frames of each sample, whether or not their content is there.

    A modality that a sample lacks has as many as the longest of its others (word-aligned modalities share their
    length).
    """
    return np.where(split.present, split.lengths, split.lengths.max(axis=1, keepdims=True)).astype(np.int64)
