"""From raw features to low-level `Z_m [S, B, T_m, d]`: temporal convolution and sinusoidal positions."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from fastmmkd.nn.constants import constant
from fastmmkd.nn.dropout import Dropout
from fastmmkd.nn.grouped import GroupedLinear
from fastmmkd.ops.philox import DrawKeys


def temporal_windows(x: torch.Tensor) -> torch.Tensor:
    """Each frame with its two neighbours, zero beyond the ends: `[..., T, d]` -> `[..., T, 3 d]`.

    A convolution with kernel 3 and padding 1 is a linear map of these.
    """
    return F.pad(x, (0, 0, 1, 1)).unfold(-2, 3, 1).transpose(-1, -2).flatten(-2)


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


class TemporalEmbedding(nn.Module):
    """`Z_m = dropout(Conv1d(X_m) + positions)`; a dropped frame still gets its position, which is known."""

    def __init__(self, models: int, feature_dims: tuple[int, ...], d: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(GroupedLinear((models,), 3 * dim, d) for dim in feature_dims)
        self.dropout = Dropout(dropout)

    def forward(self, features: list[torch.Tensor], draw: DrawKeys | None = None) -> list[torch.Tensor]:
        """Per modality `[S, B, T_m, d_m]` -> `[S, B, T_m, d]`."""
        embedded = []
        for m, (convolution, x) in enumerate(zip(self.convolutions, features, strict=True)):
            z = convolution(temporal_windows(x))
            z = z + sinusoidal_positions(z.shape[-2], z.shape[-1], z.device, z.dtype)
            embedded.append(self.dropout(z, draw, m))
        return embedded
