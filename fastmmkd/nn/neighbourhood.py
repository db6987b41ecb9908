"""Graph convolutions whose nodes are the frames of a sample and whose edges join frames that are near in time.

Nothing but shifts along time: no edge lists. Frames that do not count are no nodes; nor is what is before a sample or
after it.

Shape legend: S models, R rows, B samples, T frames of the longest, d_in and d features, k kinds of edges.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from fastmmkd.nn.grouped import GroupedLinear, projection
from fastmmkd.ops import grouped_linear
from fastmmkd.ops.layout import Layout, pack, unpack

Band = tuple[int, int]
"""The first and the last frame of a neighbourhood, counted from a node: (-2, -1) are the two before it."""


def band_sum(x: torch.Tensor, counts: torch.Tensor, layout: Layout, band: Band) -> torch.Tensor:
    """Sum over a node's neighbours that count: rows `[S, R, d]` and `[S, R]` bool -> `[S, R, d]`."""
    padded = unpack(x * counts.unsqueeze(-1), layout)
    return pack(sum(_moved(padded, offset) for offset in range(band[0], band[1] + 1)), layout)  # type: ignore[arg-type]


def band_mean(x: torch.Tensor, counts: torch.Tensor, layout: Layout, band: Band) -> torch.Tensor:
    """Mean over a node's neighbours that count, 0 where there is none: `[S, R, d]` -> `[S, R, d]`."""
    number = band_sum(counts.unsqueeze(-1).to(x.dtype), counts, layout, band)
    return band_sum(x, counts, layout, band) / number.clamp_min(1)


def _moved(x: torch.Tensor, offset: int) -> torch.Tensor:
    """`y_t = x_{t + offset}` of `[S, B, T, d]`, 0 beyond the ends."""
    if offset == 0:
        return x
    frames = x.shape[2]
    if offset > 0:
        return F.pad(x[:, :, offset:], (0, 0, 0, min(offset, frames)))
    return F.pad(x[:, :, :offset], (0, 0, min(-offset, frames), 0))


class RelationalConvolution(nn.Module):
    """`h_t = W_0 x_t + b + sum_r W_r mean_{t' in N_r(t)} x_t'` (Schlichtkrull et al. 2018, mean per relation).

    Args:
        bands: N_r, a band for each kind of edges.
    """

    def __init__(self, models: int, d_in: int, d: int, bands: tuple[Band, ...]) -> None:
        super().__init__()
        self.bands = bands
        self.own = GroupedLinear((models,), d_in, d)
        self.relations = projection((models, len(bands)), d_in, d)

    def forward(self, x: torch.Tensor, counts: torch.Tensor, layout: Layout) -> torch.Tensor:
        """`[S, R, d_in]` and who are nodes, `[S, R]` bool -> `[S, R, d]`."""
        means = torch.stack([band_mean(x, counts, layout, band) for band in self.bands], dim=1)
        return self.own(x) + grouped_linear(means, self.relations).sum(1)


class NeighbourhoodConvolution(nn.Module):
    """`h_t = V_0 x_t + c + V_1 sum_{t' in N(t)} x_t'` (Morris et al. 2019)."""

    def __init__(self, models: int, d: int, band: Band) -> None:
        super().__init__()
        self.band = band
        self.own = GroupedLinear((models,), d, d)
        self.neighbours = projection((models,), d, d)

    def forward(self, x: torch.Tensor, counts: torch.Tensor, layout: Layout) -> torch.Tensor:
        """`[S, R, d]` and who are nodes, `[S, R]` bool -> `[S, R, d]`."""
        return self.own(x) + grouped_linear(band_sum(x, counts, layout, self.band), self.neighbours)
