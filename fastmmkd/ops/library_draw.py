"""The compiled missing draw as PyTorch sees it; `fastmmkd.ops.library` has the other operations."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastmmkd.ops import reference
from fastmmkd.ops.library import define


def _missing_draw_fake(
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


_missing_draw = define(
    "missing_draw",
    "(Tensor[] features, Tensor[] frame_masks, Tensor present, Tensor sample, Tensor seed, Tensor epoch, int versions,"
    " float p_max, bool exact) -> (Tensor[] drawn, Tensor[] masks)",
    _missing_draw_fake,
)


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
    """See `fastmmkd.ops.missing_draw`. Features that want a gradient, which a data set does not, take the reference."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in features):
        return reference.missing_draw(features, frame_masks, present, sample, seed, epoch, versions, p_max, exact)
    return _missing_draw(features, frame_masks, present, sample, seed, epoch, versions, p_max, exact)
