"""The missing draws of evaluation; those of training are the operation `missing_draw`.

Both read the same counter-based generator. Training counts its versions from 0; evaluation uses versions from
`EVALUATION_VERSION` on, one per condition, so that no test mask is ever a training mask.
"""

from __future__ import annotations

import torch

from fastmmkd.ops.reference import dropped_frames

EVALUATION_VERSION = 1 << 16


def evaluation_drops(
    mask: torch.Tensor, p: float, modality: int, sample: torch.Tensor, seed: int, condition: int, exact: bool
) -> torch.Tensor:
    """Frames that a testing condition drops, a pure function of (seed, sample, condition, modality).

    Args:
        mask: `[B, T]` bool, real and present frames.
        p: ratio of frames to drop.
        modality: 0, 1, 2.
        sample: `[B]` int64, index within the split.
        seed: evaluation seed, the same for every method and run.
        condition: index of the sweep's entry.
        exact: `round(p * frames)` frames instead of independent drops.

    Returns:
        `[B, T]` bool, True = dropped.
    """
    if p <= 0.0:
        return torch.zeros_like(mask)
    scalar = sample.new_tensor
    return dropped_frames(
        mask[None],
        torch.full((1, len(sample)), p, device=mask.device),
        modality,
        sample[None],
        scalar(seed).view(1, 1),
        scalar(0).view(1, 1),
        scalar(EVALUATION_VERSION + condition).view(1, 1),
        exact,
    )[0]
