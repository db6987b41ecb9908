"""Layers whose weights carry leading group axes: one batched product in place of one call per model or per target.

Every parameter starts with S, the number of independent models trained at once (1 for a single model); structural axes,
such as the three MCIM targets, follow. A model's own parameters are the slice `parameter[s]`, under the same name.

Shape legend: S models, G all group axes flattened, R rows, d features.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from fastmmkd.nn.dropout import Dropout
from fastmmkd.ops import grouped_linear, residual_layer_norm
from fastmmkd.ops.layout import Layout
from fastmmkd.ops.philox import DrawKeys

Part = tuple[slice, ...]
"""Which part of a parameter's group axes a call uses."""
WHOLE: Part = (slice(None),)


def start(at: Part) -> int:
    """The first of a layer's groups that a part uses."""
    return at[-1].start or 0


def of_part(parameter: torch.Tensor, at: Part) -> torch.Tensor:
    """A part of a parameter's groups; the parameter itself where that is the whole."""
    return parameter if at is WHOLE else parameter[at]


def join_groups(tensors: list[torch.Tensor]) -> torch.Tensor:
    """n tensors `[S, ...]` -> `[S * n, ...]`, the n of one model side by side."""
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors, dim=1).flatten(0, 1)


def uniform_parameter(shape: tuple[int, ...], bound: float) -> nn.Parameter:
    """A parameter drawn from `U(-bound, bound)`."""
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def projection(groups: tuple[int, ...], d_in: int, d_out: int, fan_out: int | None = None) -> nn.Parameter:
    """A bias-free weight `[*groups, d_in, d_out]`, Glorot-uniform (`fan_out` where several weights are packed)."""
    return uniform_parameter((*groups, d_in, d_out), math.sqrt(6.0 / (d_in + (fan_out or d_out))))


class GroupedLinear(nn.Module):
    """`x W + b` with `W [*groups, d_in, d_out]`, initialised as `torch.nn.Linear` is."""

    def __init__(self, groups: tuple[int, ...], d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = uniform_parameter((*groups, d_in, d_out), d_in**-0.5)
        self.bias = uniform_parameter((*groups, d_out), d_in**-0.5)

    def forward(self, x: torch.Tensor, at: Part = WHOLE, relu: bool = False) -> torch.Tensor:
        """`[G, ..., d_in]` -> `[G, ..., d_out]`, G being the product of the group axes (of the part `at`)."""
        return grouped_linear(x, of_part(self.weight, at), of_part(self.bias, at), relu)


class ResidualNorm(nn.Module):
    """`LN(x + r)` with one affine map per group."""

    def __init__(self, groups: tuple[int, ...], d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(*groups, d))
        self.bias = nn.Parameter(torch.zeros(*groups, d))

    def forward(self, x: torch.Tensor, residual: torch.Tensor, at: Part = WHOLE) -> torch.Tensor:
        """`[G, ..., d]` twice -> `[G, ..., d]`."""
        return residual_layer_norm(
            x, residual, of_part(self.weight, at).flatten(0, -2), of_part(self.bias, at).flatten(0, -2)
        )


class FeedForward(nn.Module):
    """`LN(x + dropout(W_2 relu(W_1 x)))` with hidden width 4d (Vaswani et al. 2017)."""

    def __init__(self, groups: tuple[int, ...], d: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.expand = GroupedLinear(groups, d, 4 * d)
        self.contract = GroupedLinear(groups, 4 * d, d)
        self.dropout = Dropout(dropout)
        self.norm = ResidualNorm(groups, d)

    def forward(self, x: torch.Tensor, layout: Layout, at: Part = WHOLE, draw: DrawKeys | None = None) -> torch.Tensor:
        """`[G, R, d]` -> `[G, R, d]`."""
        out = self.contract(self.expand(x, at, relu=True), at)
        return self.norm(self.dropout(out, layout, draw, start(at)), x, at)
