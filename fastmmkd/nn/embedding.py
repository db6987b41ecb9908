"""From raw features to low-level `Z_m [S, R_m, d]`: temporal convolution and sinusoidal positions."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastmmkd.nn.dropout import Dropout
from fastmmkd.nn.grouped import GroupedLinear
from fastmmkd.ops import temporal_convolution
from fastmmkd.ops.constants import constant
from fastmmkd.ops.layout import Layout, Positions
from fastmmkd.ops.philox import DrawKeys


def sinusoidal_positions(steps: int, d: int, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """`[T, d]` position codes (Vaswani et al. 2017): sines in the even columns, cosines in the odd ones.

    A constant: nobody may write to it.
    """
    return constant(_positions, steps, d, device=device, dtype=dtype)


def _positions(steps: int, d: int, device: torch.device) -> torch.Tensor:
    position = torch.arange(steps, device=device, dtype=torch.float32)[:, None]
    frequency = torch.exp(torch.arange(0, d, 2, device=device, dtype=torch.float32) * (-math.log(10000.0) / d))
    angle = position * frequency
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :d]


def position_codes(layout: Layout, frame: Positions, d: int, dtype: torch.dtype) -> torch.Tensor:
    """`[S, R, d]`, the code of every row's position, counted from its sample's first real frame or from its last."""
    room = 1 << (layout.longest - 1).bit_length()  # few tables, whatever lengths come
    return sinusoidal_positions(room, d, layout.starts.device, dtype)[layout.counted_from(frame)]


class TemporalEmbedding(nn.Module):
    """`Z_m = dropout(Conv1d(X_m) + positions)`; a dropped frame still gets its position, which is known.

    Positions count from a sample's first real frame, or backwards from its last (`model.positions`).
    """

    def __init__(
        self,
        models: int,
        feature_dims: tuple[int, ...],
        d: int,
        dropout: float = 0.0,
        positions: Positions = "first",
    ) -> None:
        super().__init__()
        self.positions = positions
        self.convolutions = nn.ModuleList(GroupedLinear((models,), 3 * dim, d) for dim in feature_dims)
        self.dropout = Dropout(dropout)

    def forward(
        self, features: list[torch.Tensor], layouts: list[Layout], draw: DrawKeys | None = None
    ) -> list[torch.Tensor]:
        """Per modality `[S, R_m, d_m]` -> `[S, R_m, d]`."""
        embedded: list[torch.Tensor] = []
        positions: dict[int, torch.Tensor] = {}  # of every layout
        for m, (convolution, x, layout) in enumerate(zip(self.convolutions, features, layouts, strict=True)):
            assert isinstance(convolution, GroupedLinear)
            z = temporal_convolution(x, layout, convolution.weight, convolution.bias)
            if id(layout) not in positions:
                positions[id(layout)] = position_codes(layout, self.positions, z.shape[-1], z.dtype)
            embedded.append(self.dropout(z + positions[id(layout)], layout, draw, m))
        return embedded
