"""Pooling over time: resampling of unaligned streams, and means over the frames that count."""

from __future__ import annotations

import torch

from fastmmkd.ops.layout import Layout, pack, unpack
from fastmmkd.ops.precision import accumulation


def masked_adaptive_mean(
    x: torch.Tensor, mask: torch.Tensor, layout: Layout, to: Layout
) -> tuple[torch.Tensor, torch.Tensor]:
    """Adaptive mean pooling of each sample's frames to as many as another modality has of it, without masked ones.

    Of a sample with n frames here and k there, bin i covers frames `floor(i n / k)` to `ceil((i + 1) n / k)`, as
    `torch.nn.AdaptiveAvgPool1d` has it.

    Args:
        x: `[S, R, d]`, rows of `layout`.
        mask: `[S, R]` bool, True = counts.
        to: whose rows come out, `R'` of them.

    Returns:
        `[S, R', d]` (0 where a bin has no frame that counts, and in padding) and `[S, R']` bool (True where it has
        one). The input itself when the two layouts are one.
    """
    if layout is to:
        return x, mask
    frames, bins = (unpack(of.position, of).amax(-1)[..., None, None] + 1 for of in (layout, to))  # [S, B, 1, 1]
    frame, bin_ = unpack(layout.position, layout).unsqueeze(2), unpack(to.position, to).unsqueeze(3)
    first, last = bin_ * frames // bins, ((bin_ + 1) * frames + bins - 1) // bins
    padding = to.lengths[..., None, None] - bins
    is_bin = torch.arange(to.longest, device=x.device)[:, None] >= padding  # [S, B, T', 1]
    counts = unpack(mask, layout).unsqueeze(2) & is_bin & (frame >= first) & (frame < last)  # [S, B, T', T]
    weight = counts.to(x.dtype)
    mean = weight @ unpack(x, layout) / counts.sum(-1, keepdim=True).clamp_min(1).to(x.dtype)
    return pack(mean, to), pack(counts.any(-1), to)


def masked_mean(x: torch.Tensor, mask: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Mean over a sample's frames that count: rows `[G, R, d]` and `[G, R]` bool -> `[G, B, d]`, 0 where none does."""
    weight = mask.unsqueeze(-1)
    total = unpack(accumulation(x) * weight, layout).sum(dim=2)
    return (total / unpack(weight, layout).sum(dim=2).clamp_min(1)).to(x.dtype)


def attentive_mean(x: torch.Tensor, scores: torch.Tensor, mask: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Mean over a sample's frames that count, weighted by the softmax of their scores.

    Args:
        x: `[G, R, d]`, rows of `layout`.
        scores: `[G, R, 1]`.
        mask: `[G, R]` bool, True = counts.

    Returns:
        `[G, B, d]`, 0 where no frame counts.
    """
    counts, scores = unpack(mask, layout), unpack(accumulation(scores).squeeze(-1), layout)
    weight = scores.masked_fill(~counts, torch.finfo(scores.dtype).min).softmax(-1) * counts
    return (weight.unsqueeze(2).to(x.dtype) @ unpack(x, layout)).squeeze(2)
