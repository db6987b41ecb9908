"""What the tests of the missing draw share: splits, and the layouts of batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from fastmmkd.ops.layout import Layout
from fastmmkd.testing.parity import DEVICE


class Split(NamedTuple):
    """The first arguments of `ops.missing_draw`."""

    features: list[torch.Tensor]
    frame_masks: list[torch.Tensor]
    starts: list[torch.Tensor]
    present: torch.Tensor

    def layouts(
        self, sample: torch.Tensor, versions: int, spare: int = 0, room: int | Sequence[int] = 1
    ) -> list[Layout]:
        """Of a batch: at least `room` rows for every sample (of each modality), and `spare` of nobody."""
        rooms = [room] * len(self.starts) if isinstance(room, int) else room
        layouts = []
        for starts, at_least in zip(self.starts, rooms, strict=True):
            lengths = starts.diff()[sample].clamp_min(at_least).repeat(1, versions)
            rows = int(lengths.sum(1).max()) + spare if lengths.numel() else spare
            layouts.append(Layout.of(lengths, rows, max([at_least, *lengths.flatten().tolist()])))
        return layouts


def split(
    present: torch.Tensor,
    longest: Sequence[int],
    widths: Sequence[int],
    dtypes: Sequence[torch.dtype] = (torch.float32,) * 3,
    real: float = 0.8,
    generator: torch.Generator | None = None,
) -> Split:
    """Samples of 1 to `longest` frames of the modalities that they have, `[N, M]`; none is 0.

    A frame holds something with probability `real`, the last one always.
    """
    generator = generator or torch.Generator().manual_seed(0)
    features, masks, starts = [], [], []
    for m, (t, d, dtype) in enumerate(zip(longest, widths, dtypes, strict=True)):
        lengths = torch.randint(1, t + 1, (len(present),), generator=generator) * present[:, m]
        of = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        mask = torch.rand(int(of[-1]), generator=generator) < real
        mask[of[1:][lengths > 0] - 1] = True
        x = (1.0 + torch.rand(len(mask), d, generator=generator)) * mask.unsqueeze(-1)
        features.append(x.to(DEVICE, dtype))
        masks.append(mask.to(DEVICE))
        starts.append(of.to(DEVICE))
    return Split(features, masks, starts, present.to(DEVICE))
