"""The resident data of contenders that pad.

Shape legend: S models, B samples of a batch, V versions of each.
"""

from __future__ import annotations

from functools import partial

import torch

from fastmmkd.data.batches import ResidentSplit
from fastmmkd.errors import UserError
from fastmmkd.modalities import MODALITIES
from fastmmkd.ops.layout import Layout

PADDED = partial(ResidentSplit, padded=True)
"""Every sample is as long as the longest of the split, as people write it."""


class CroppedSplit(ResidentSplit):
    """Every sample is as long as the longest of its batch: what a loader that pads batch by batch gives."""

    def layouts(self, sample: torch.Tensor, versions: int = 1, room: list[int] | None = None) -> list[Layout]:
        """Per modality whose rows a batch of samples `[S, B]` holds, V times each; `room` does not matter.

        Raises:
            UserError: padding counts as frames, so that it cannot be cropped.
        """
        if self.masking == "none":
            raise UserError("model.attention_mask: none; expected another to crop batches, padding is frames")
        self.is_padded, made = True, []
        for m in range(1 if self.aligned else len(MODALITIES)):
            frames = self.frames[m][sample].clamp_min(1).repeat(1, versions)
            longest = int(frames.max())
            lengths = torch.full_like(frames, longest)
            made.append(Layout.of(lengths, lengths.shape[1] * longest, longest, lengths - frames, is_uniform=True))
        return made * len(MODALITIES) if self.aligned else made
