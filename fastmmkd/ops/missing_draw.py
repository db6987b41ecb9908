"""From the resident data set to a training batch with missing modalities and frames, in one pass."""

from collections.abc import Sequence

import torch

from fastmmkd.ops.registry import implementation


def missing_draw(
    features: Sequence[torch.Tensor],
    frame_masks: Sequence[torch.Tensor],
    present: torch.Tensor,
    sample: torch.Tensor,
    seed: torch.Tensor,
    epoch: torch.Tensor,
    versions: int,
    p_max: float,
    exact: bool = False,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gather rows, draw each one's missing versions, zero what is missing, and emit the presence masks.

    Per sample and version the kept modalities are uniform over the non-empty subsets of those that the sample has,
    then `p ~ U(0, p_max)`, then every real frame is dropped with probability p. Everything is a pure function of
    (seed, epoch, sample, version) through Philox4x32-10.

    Args:
        features: per modality `[N, T_m, d_m]`, the whole split; zero where not real.
        frame_masks: per modality `[N, T_m]` bool, True = real and present.
        present: `[N, 3]` bool, modalities that each sample has.
        sample: `[S, B]` int64 rows of the split, one batch per seed.
        seed: `[S]` int64.
        epoch: 0-dimensional int64.
        versions: V, missing versions per sample.
        p_max: upper end of the frame ratio, in [0, 1].
        exact: drop exactly `round(p * frames)` frames instead of independently.

    Returns:
        features per modality `[S, V * B, T_m, d_m]` (version-major) and masks `[S, V * B, T_m]` bool.
    """
    if sample.dim() != 2 or seed.shape != sample.shape[:1]:
        raise ValueError(f"sample is {tuple(sample.shape)} and seed {tuple(seed.shape)}; expected [S, B] and [S]")
    return implementation("missing_draw", *features)(
        features, frame_masks, present, sample, seed, epoch, versions, p_max, exact
    )
