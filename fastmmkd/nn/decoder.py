"""Transformer decoders (post-norm) with one set of weights per group: they read a memory that an encoder has made."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from fastmmkd.nn.dropout import Dropout
from fastmmkd.nn.grouped import (
    WHOLE,
    FeedForward,
    GroupedLinear,
    Part,
    ResidualNorm,
    of_part,
    projection,
    start,
)
from fastmmkd.ops import cross_attention, grouped_linear
from fastmmkd.ops.composition import somebodys
from fastmmkd.ops.layout import Layout
from fastmmkd.ops.philox import DrawKeys

Attention = Callable[..., torch.Tensor]
"""`fastmmkd.ops.cross_attention`, or another with its arguments."""


class DecoderAttention(nn.Module):
    """`LN(X + dropout(CA(Y, X)))`: queries of X, keys and values of Y."""

    def __init__(
        self, groups: tuple[int, ...], d: int, heads: int, dropout: float = 0.0, attention: Attention = cross_attention
    ) -> None:
        super().__init__()
        self.heads, self.attention = heads, attention
        self.query = projection(groups, d, d)
        self.key_value = projection(groups, d, 2 * d, fan_out=d)
        self.out = GroupedLinear(groups, d, d)
        self.dropout = Dropout(dropout)
        self.norm = ResidualNorm(groups, d)

    def forward(
        self,
        x: torch.Tensor,
        layout: Layout,
        source: torch.Tensor,
        mask: torch.Tensor,
        source_layout: Layout,
        at: Part = WHOLE,
        draw: DrawKeys | None = None,
    ) -> torch.Tensor:
        """`[G, R, d]`, what it reads `[G, R', d]` and the mask of that, `[G, R']` or `[S, R']` bool -> `[G, R, d]`."""
        query = grouped_linear(x, of_part(self.query, at))
        key, value = grouped_linear(source, of_part(self.key_value, at)).chunk(2, dim=-1)
        attended = self.attention(query, [key], [value], [mask], self.heads, layout, [source_layout])
        return self.norm(self.dropout(self.out(attended, at), layout, draw, start(at)), x, at)


class DecoderLayer(nn.Module):
    """Attention to itself, attention to the memory, feed-forward network (Vaswani et al. 2017), all of them post-norm.

    Nothing is causal: all frames that are decoded are known beforehand.
    """

    def __init__(self, groups: tuple[int, ...], d: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.itself = DecoderAttention(groups, d, heads, dropout)
        self.memory = DecoderAttention(groups, d, heads, dropout)
        self.feed_forward = FeedForward(groups, d, dropout)

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor,
        layout: Layout,
        memory: torch.Tensor,
        memory_mask: torch.Tensor,
        memory_layout: Layout,
        at: Part = WHOLE,
        draw: DrawKeys | None = None,
    ) -> torch.Tensor:
        """As `TransformerDecoder`, with one mask of x."""
        x = self.itself(x, layout, x, mask, layout, at, draw)
        x = self.memory(x, layout, memory, memory_mask, memory_layout, at, draw)
        return somebodys(self.feed_forward(x, layout, at, draw), layout)


class TransformerDecoder(nn.Module):
    """A stack of decoder layers."""

    def __init__(self, groups: tuple[int, ...], d: int, heads: int, layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(groups, d, heads, dropout) for _ in range(layers))

    def forward(
        self,
        x: torch.Tensor,
        first: torch.Tensor,
        later: torch.Tensor,
        layout: Layout,
        memory: torch.Tensor,
        memory_mask: torch.Tensor,
        memory_layout: Layout,
        at: Part = WHOLE,
        draw: DrawKeys | None = None,
    ) -> torch.Tensor:
        """Decode.

        Args:
            x: `[G, R, d]`, the queries, rows of `layout`; G is the product of the group axes (of `at`).
            first, later: `[G, R]` or `[S, R]` bool, rows of x that may be attended to in the first layer, and later.
            memory: `[G, R', d]`, rows of `memory_layout`.
            memory_mask: `[G, R']` or `[S, R']` bool, its rows that may be attended to. Where a sample has none, the
                attention to the memory gives 0.

        Returns:
            `[G, R, d]`, 0 in rows of nobody.
        """
        for i, layer in enumerate(self.layers):
            x = layer(x, later if i else first, layout, memory, memory_mask, memory_layout, at, draw)
        return x
