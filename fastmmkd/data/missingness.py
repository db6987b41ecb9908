"""The missing draws of evaluation; those of training are the operation `missing_draw`.

Both read the same counter-based generator. Training counts its versions from 0; evaluation uses versions from
`EVALUATION_VERSION` on, one per condition, so that no test mask is ever a training mask.
"""

from __future__ import annotations

import torch

from fastmmkd.ops.layout import Layout
from fastmmkd.ops.missing_draw import dropped_frames

EVALUATION_VERSION = 1 << 16


def evaluation_drops(
    mask: torch.Tensor,
    frame: torch.Tensor,
    p: float,
    modality: int,
    sample: torch.Tensor,
    layout: Layout,
    seed: int,
    condition: int,
    exact: bool,
) -> torch.Tensor:
    """Rows that a testing condition drops, a pure function of (seed, sample, frame, condition, modality).

    Args:
        mask: `[1, R]` bool, real and present frames.
        frame: `[1, R]` int64, each one's number among its sample's frames.
        p: ratio of frames to drop.
        modality: 0, 1, 2.
        sample: `[1, B]` int64, index within the split.
        layout: whose rows they are.
        seed: evaluation seed, the same for every method and run.
        condition: index of the sweep's entry.
        exact: `round(p * frames)` frames of a sample instead of independent drops.

    Returns:
        `[1, R]` bool, True = dropped.
    """
    whose = sample.gather(1, layout.sample.clamp_max(layout.batch - 1) % sample.shape[1])
    of_seed, of_epoch, version = (sample.new_tensor([[key]]) for key in (seed, 0, EVALUATION_VERSION + condition))
    keys = whose, of_seed, of_epoch, version
    return dropped_frames(mask, frame, mask.new_full(mask.shape, p, dtype=torch.float32), modality, keys, layout, exact)
