"""Pooling over time: resampling of unaligned streams, and means over the frames that count."""

from __future__ import annotations

import torch

from fastmmkd.ops.precision import accumulation


def masked_adaptive_mean(x: torch.Tensor, mask: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Adaptive mean pooling over time that leaves masked frames out.

    Bin i covers frames `floor(i T / steps)` to `ceil((i + 1) T / steps)`, as `torch.nn.AdaptiveAvgPool1d` has it.

    Args:
        x: `[S, B, T, d]`.
        mask: `[S, B, T]` bool, True = counts.
        steps: number of bins.

    Returns:
        `[S, B, steps, d]` (0 where a bin has no frame that counts) and `[S, B, steps]` bool (True where it has one).
        The input itself when T equals `steps`.
    """
    length = x.shape[2]
    if length == steps:
        return x, mask
    frame = torch.arange(length, device=x.device)
    edges = torch.arange(steps + 1, device=x.device) * length
    first, last = edges[:-1] // steps, (edges[1:] + steps - 1) // steps
    bins = ((frame >= first[:, None]) & (frame < last[:, None])).to(x.dtype)  # [steps, T]
    weight = mask.unsqueeze(-1).to(x.dtype)
    count = bins @ weight
    return bins @ (x * weight) / count.clamp_min(1), count.squeeze(-1) > 0


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the frames that count: `[..., T, d]` and `[..., T]` bool -> `[..., d]`, 0 where none does."""
    weight = mask.unsqueeze(-1)
    total = (accumulation(x) * weight).sum(dim=-2)
    return (total / weight.sum(dim=-2).clamp_min(1)).to(x.dtype)
