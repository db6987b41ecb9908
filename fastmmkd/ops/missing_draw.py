"""From the resident data set to a training batch with missing modalities and frames, in one pass."""

from collections.abc import Sequence
from typing import Any

import torch

from fastmmkd.ops import reference
from fastmmkd.ops.declaration import declare
from fastmmkd.ops.dispatch import implementation
from fastmmkd.ops.operation import Op
from fastmmkd.ops.work import Work


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
    return implementation(OP, *features)(features, frame_masks, present, sample, seed, epoch, versions, p_max, exact)


def _fake(
    features: Sequence[torch.Tensor],
    frame_masks: Sequence[torch.Tensor],
    present: torch.Tensor,
    sample: torch.Tensor,
    seed: torch.Tensor,
    epoch: torch.Tensor,
    versions: int,
    p_max: float,
    exact: bool,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    seeds, batch = sample.shape
    return (
        [x.new_empty((seeds, versions * batch, *x.shape[1:])) for x in features],
        [mask.new_empty((seeds, versions * batch, *mask.shape[1:])) for mask in frame_masks],
    )


_declared = declare(
    "missing_draw",
    "(Tensor[] features, Tensor[] frame_masks, Tensor present, Tensor sample, Tensor seed, Tensor epoch, int versions,"
    " float p_max, bool exact) -> (Tensor[] drawn, Tensor[] masks)",
    _fake,
)


def _compiled(features: Sequence[torch.Tensor], *args: Any) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Features that want a gradient, which a data set does not, take the definition."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in features):
        return reference.missing_draw(features, *args)
    return _declared(features, *args)


def _work(v: int, b: int, lengths: Sequence[int], widths: Sequence[int], e: int, left: float = 1.0) -> Work:
    """`V B sum_m T_m (D_m e (1 + left) + 2)` bytes: `left` is the share of frames that are read and kept; masks.

    No operations: its arithmetic is on integers.
    """
    frames = zip(lengths, widths, strict=True)
    return Work(round(v * b * sum(t * (d * e * (1 + left) + 2) for t, d in frames)), 0)


OP = Op("missing_draw", ("triton", "cpp"), _compiled, work=_work)
