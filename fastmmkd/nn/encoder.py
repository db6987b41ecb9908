"""The transformer encoder (post-norm, no dropout) with one set of weights per model."""

from __future__ import annotations

import torch
from torch import nn

from fastmmkd.nn.grouped import FeedForward, GroupedLinear, ResidualNorm, linear, projection
from fastmmkd.ops import cross_attention


class EncoderLayer(nn.Module):
    """`X = LN(X + SA(X))`, `X = LN(X + FFN(X))`."""

    def __init__(self, models: int, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = projection((models,), d, 3 * d, fan_out=d)
        self.out = GroupedLinear((models,), d, d)
        self.norm = ResidualNorm((models,), d)
        self.feed_forward = FeedForward((models,), d)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`[S, B, T, d]` and `[S, B, T]` bool (True = may be attended to) -> `[S, B, T, d]`."""
        query, key, value = linear(x, self.query_key_value).chunk(3, dim=-1)
        attended = cross_attention(query, [key], [value], [mask], self.heads)
        return self.feed_forward(self.norm(self.out(attended), x))


class TransformerEncoder(nn.Module):
    """A stack of encoder layers."""

    def __init__(self, models: int, d: int, heads: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(models, d, heads) for _ in range(layers))

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`[S, B, T, d]` and `[S, B, T]` bool -> `[S, B, T, d]`."""
        for layer in self.layers:
            x = layer(x, mask)
        return x
