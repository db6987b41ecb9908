"""From the resident data set to a training batch with missing modalities and frames, in one pass."""

from collections.abc import Sequence
from typing import Any

import torch

from fastmmkd.ops.declaration import declare
from fastmmkd.ops.dispatch import implementation
from fastmmkd.ops.layout import Layout, pack, unpack
from fastmmkd.ops.operation import Op
from fastmmkd.ops.philox import WORD, philox, uniform
from fastmmkd.ops.work import Work


def missing_draw(
    features: Sequence[torch.Tensor],
    frame_masks: Sequence[torch.Tensor],
    starts: Sequence[torch.Tensor],
    present: torch.Tensor,
    sample: torch.Tensor,
    seed: torch.Tensor,
    epoch: torch.Tensor,
    layouts: Sequence[Layout],
    versions: int,
    p_max: float,
    exact: bool = False,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gather samples, draw each one's missing versions, zero what is missing, and emit the presence masks.

    Per sample and version the kept modalities are uniform over the non-empty subsets of those that the sample has,
    then `p ~ U(0, p_max)`, then every real frame is dropped with probability p. Everything is a pure function of
    (seed, epoch, sample, version) through Philox4x32-10; frames count from a sample's first real one.

    Args:
        features: per modality `[R_m, d_m]`, the real frames of the whole split, sample after sample.
        frame_masks: per modality `[R_m]` bool, False = the frame holds nothing.
        starts: per modality `[N + 1]` int64, where each sample's frames begin; one that lacks the modality has none.
        present: `[N, 3]` bool, modalities that each sample has.
        sample: `[S, B]` int64 samples of the split, one batch per model.
        seed: `[S]` int64.
        epoch: 0-dimensional int64.
        layouts: per modality that of the batch, `V * B` samples, version-major. A sample's frames are the last of its
            rows; rows before them, all of them where it lacks the modality, are zero and masked.
        versions: V, missing versions per sample.
        p_max: upper end of the frame ratio, in [0, 1].
        exact: drop exactly `round(p * frames)` frames instead of independently.

    Returns:
        features per modality `[S, R, d_m]` and masks `[S, R]` bool, R the rows of the modality's layout.
    """
    for name, parts in (("features", features), ("frame_masks", frame_masks), ("starts", starts), ("layouts", layouts)):
        if isinstance(parts, torch.Tensor) or len(parts) != len(features):
            found = f"a tensor {tuple(parts.shape)}" if isinstance(parts, torch.Tensor) else f"of {len(parts)} parts"
            raise ValueError(f"{name} is {found}; expected a list of one for each of {len(features)} modalities")
    if sample.dim() != 2 or seed.shape != sample.shape[:1]:
        raise ValueError(f"sample is {tuple(sample.shape)} and seed {tuple(seed.shape)}; expected [S, B] and [S]")
    expected = (len(sample), versions * sample.shape[1] + 1)
    for m, layout in enumerate(layouts):
        if layout.starts.shape != expected:
            raise ValueError(f"starts of modality {m} are {tuple(layout.starts.shape)}; expected {expected}")
    return implementation(OP, *features)(
        features, frame_masks, starts, present, sample, seed, epoch, layouts, versions, p_max, exact
    )


def _definition(
    features: Sequence[torch.Tensor],
    frame_masks: Sequence[torch.Tensor],
    starts: Sequence[torch.Tensor],
    present: torch.Tensor,
    sample: torch.Tensor,
    seed: torch.Tensor,
    epoch: torch.Tensor,
    layouts: Sequence[Layout],
    versions: int,
    p_max: float,
    exact: bool = False,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    kept, p = (x.flatten(1, 2) for x in missing_pattern(present[sample], sample, seed, epoch, versions, p_max))
    drawn, masks = [], []
    for m, (x, frame_mask, of, layout) in enumerate(zip(features, frame_masks, starts, layouts, strict=True)):
        row, number = stored_rows(of, sample, layout)
        whose = layout.sample.clamp_max(layout.batch - 1)
        keys = sample.gather(1, whose % sample.shape[1]), seed[:, None], epoch, whose // sample.shape[1]
        if not len(x):  # nobody has this modality
            mask = torch.zeros_like(row, dtype=torch.bool)
            drawn.append(x.new_zeros((*row.shape, x.shape[1])))
        else:
            row = row.clamp_max(len(x) - 1)
            mask = frame_mask[row] & (number >= 0) & kept[..., m].gather(1, whose)
            mask &= ~dropped_frames(frame_mask[row] & (number >= 0), number, p.gather(1, whose), m, keys, layout, exact)
            drawn.append(x[row].masked_fill(~mask.unsqueeze(-1), 0))
        masks.append(mask)
    return drawn, masks


def missing_pattern(
    present: torch.Tensor, sample: torch.Tensor, seed: torch.Tensor, epoch: torch.Tensor, versions: int, p_max: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which modalities each version keeps, and its frame ratio.

    Args:
        present: `[S, B, 3]` bool, modalities that the samples have.
        sample: `[S, B]` int64 sample indices within the split.
        seed: `[S]` int64.
        epoch: 0-dimensional int64.
        versions: V.
        p_max: the ratio is uniform in [0, p_max).

    Returns:
        kept `[S, V, B, 3]` bool (uniform over the non-empty subsets of what is present), p `[S, V, B]` float32.
    """
    version = torch.arange(versions, device=sample.device)[None, :, None]
    words = philox(_counter(torch.zeros_like(version), sample[:, None, :], epoch, version), _key(seed[:, None, None]))
    present = present[:, None]
    rank = present.cumsum(-1) - 1  # position of a modality among those that are present
    subsets = (1 << present.sum(-1)) - 1
    subset = ((words[..., 0] * subsets) >> 32) + 1  # uniform over 1 .. 2^n - 1, its bits in the order of `rank`
    kept = ((subset.unsqueeze(-1) >> rank.clamp_min(0)) & 1).bool() & present
    return kept, uniform(words[..., 1]) * p_max


def dropped_frames(
    mask: torch.Tensor,
    frame: torch.Tensor,
    p: torch.Tensor,
    modality: int,
    keys: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    layout: Layout,
    exact: bool,
) -> torch.Tensor:
    """Which rows of one modality a draw drops.

    Args:
        mask: `[S, R]` bool, real and present frames.
        frame: `[S, R]` int64, each one's number among its sample's real frames; negative where it is none of them.
        p: `[S, R]` ratio; frames drop independently with probability p, or (exact) `round(p * frames)` of a sample do.
        keys: sample, seed, epoch and version, int64, broadcastable with the rows.
        layout: whose rows they are.

    Returns:
        `[S, R]` bool; True = dropped.
    """
    sample, seed, epoch, version = keys
    frame = frame.clamp_min(0)
    words = philox(_counter(1 + (modality << 24) + frame // 4, sample, epoch, version), _key(seed))
    u = uniform(words.gather(-1, (frame % 4).unsqueeze(-1)).squeeze(-1))
    if not exact:
        return mask & (u < p)
    mask_sbt, u_sbt, p_sbt = (unpack(x, layout) for x in (mask, u, p))
    wanted = torch.round(p_sbt.amax(-1) * mask_sbt.sum(-1)).unsqueeze(-1)
    order = u_sbt.masked_fill(~mask_sbt, 2.0).argsort(dim=-1, stable=True).argsort(dim=-1, stable=True)
    return pack(mask_sbt & (order < wanted), layout)


def stored_rows(starts: torch.Tensor, sample: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the rows of a batch come from.

    Args:
        starts: `[N + 1]` int64, where each sample's rows begin in the split.
        sample: `[S, B]` int64 rows of the split; a layout of V * B samples holds them V times.
        layout: of the batch. A sample with more rows than the split has of it has them last.

    Returns:
        `[S, R]` int64, the row of the split, and its number among its sample's; negative where there is none.
    """
    whose = layout.sample.clamp_max(layout.batch - 1)
    named = sample.gather(1, whose % sample.shape[1])
    row = torch.arange(layout.rows, device=sample.device)
    before_end = layout.starts.gather(1, whose + 1) - row
    end = starts[named + 1]
    number = (end - starts[named] - before_end).masked_fill(~layout.is_somebodys, -1)
    return (end - before_end).clamp(0), number


def _counter(
    block: torch.Tensor, sample: torch.Tensor, epoch: torch.Tensor, version: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    return block & WORD, sample & WORD, epoch & WORD, version & WORD


def _key(seed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return seed & WORD, (seed >> 32) & WORD


def _fake(
    features: Sequence[torch.Tensor],
    frame_masks: Sequence[torch.Tensor],
    starts: Sequence[torch.Tensor],
    present: torch.Tensor,
    sample: torch.Tensor,
    seed: torch.Tensor,
    epoch: torch.Tensor,
    batch_starts: Sequence[torch.Tensor],
    rows: Sequence[int],
    longest: Sequence[int],
    versions: int,
    p_max: float,
    exact: bool,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    sizes = [(sample.shape[0], of) for of in rows]
    return (
        [x.new_empty((*size, x.shape[1])) for x, size in zip(features, sizes, strict=True)],
        [mask.new_empty(size) for mask, size in zip(frame_masks, sizes, strict=True)],
    )


_declared = declare(
    "missing_draw",
    "(Tensor[] features, Tensor[] frame_masks, Tensor[] starts, Tensor present, Tensor sample, Tensor seed,"
    " Tensor epoch, Tensor[] batch_starts, SymInt[] rows, SymInt[] longest, int versions, float p_max, bool exact)"
    " -> (Tensor[] drawn, Tensor[] masks)",
    _fake,
)


def _compiled(
    features: Sequence[torch.Tensor],
    frame_masks: Sequence[torch.Tensor],
    starts: Sequence[torch.Tensor],
    present: torch.Tensor,
    sample: torch.Tensor,
    seed: torch.Tensor,
    epoch: torch.Tensor,
    layouts: Sequence[Layout],
    *how: Any,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Features that want a gradient, which a data set does not, take the definition."""
    of_split = features, frame_masks, starts, present, sample, seed, epoch
    if torch.is_grad_enabled() and any(x.requires_grad for x in features):
        return _definition(*of_split, layouts, *how)
    batch_starts, rows, longest = zip(*((of.starts, of.rows, of.longest) for of in layouts), strict=True)
    return _declared(*of_split, batch_starts, rows, longest, *how)


def _work(rows: Sequence[int], widths: Sequence[int], e: int, left: float = 1.0) -> Work:
    """`sum_m R_m (D_m e (1 + left) + 2)` bytes: `left` is the share of frames that are read and kept; masks.

    No operations: its arithmetic is on integers.
    """
    return Work(round(sum(r * (d * e * (1 + left) + 2) for r, d in zip(rows, widths, strict=True))), 0)


OP = Op("missing_draw", _definition, ("triton", "cpp"), _compiled, work=_work, place=50)
