"""Transformer encoders (post-norm) with one set of weights per group."""

from __future__ import annotations

import torch
from torch import nn

from fastmmkd.data.batches import by_layer
from fastmmkd.nn.dropout import Dropout
from fastmmkd.nn.grouped import (
    WHOLE,
    FeedForward,
    GroupedLinear,
    Part,
    ResidualNorm,
    join_groups,
    linear,
    projection,
    start,
)
from fastmmkd.ops import cross_attention
from fastmmkd.ops.philox import DrawKeys


class EncoderLayer(nn.Module):
    """`X = LN(X + dropout(SA(X)))`, `X = LN(X + dropout(FFN(X)))`."""

    def __init__(self, groups: tuple[int, ...], d: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = projection(groups, d, 3 * d, fan_out=d)
        self.out = GroupedLinear(groups, d, d)
        self.dropout = Dropout(dropout)
        self.norm = ResidualNorm(groups, d)
        self.feed_forward = FeedForward(groups, d, dropout)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, at: Part = WHOLE, draw: DrawKeys | None = None
    ) -> torch.Tensor:
        """`[G, B, T, d]` and `[G, B, T]` bool (True = may be attended to) -> `[G, B, T, d]`."""
        query, key, value = linear(x, self.query_key_value[at].flatten(0, -3)).chunk(3, dim=-1)
        attended = cross_attention(query, [key], [value], [mask], self.heads)
        out = self.dropout(self.out(attended, at), draw, start(at))
        return self.feed_forward(self.norm(out, x, at), at, draw)


class TransformerEncoder(nn.Module):
    """A stack of encoder layers."""

    def __init__(self, groups: tuple[int, ...], d: int, heads: int, layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(groups, d, heads, dropout) for _ in range(layers))

    def forward(
        self,
        x: torch.Tensor,
        first: torch.Tensor,
        later: torch.Tensor,
        at: Part = WHOLE,
        draw: DrawKeys | None = None,
    ) -> torch.Tensor:
        """`[G, B, T, d]`, and the `[G, B, T]` bool masks of the first layer and of the later ones -> `[G, B, T, d]`.

        G is the product of the group axes (of `at`).
        """
        for i, layer in enumerate(self.layers):
            x = layer(x, later if i else first, at, draw)
        return x


class ModalityEncoders(nn.Module):
    """A transformer encoder per modality. Streams of equal length run as groups of one call."""

    def __init__(self, models: int, d: int, heads: int, layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = TransformerEncoder((models, 3), d, heads, layers, dropout)

    def forward(
        self, streams: list[torch.Tensor], masks: list[torch.Tensor], draw: DrawKeys | None = None
    ) -> list[torch.Tensor]:
        """Per modality `[S, B, T_m, d]`, and masks as `Batch.masks` has them -> per modality `[S, B, T_m, d]`."""
        first, later = by_layer(masks)
        if len({z.shape[2] for z in streams}) == 1:
            encoded = self.encoder(join_groups(streams), join_groups(first), join_groups(later), draw=draw)
            return list(encoded.unflatten(0, (-1, 3)).unbind(1))
        return [
            self.encoder(z, own, own_later, (slice(None), slice(m, m + 1)), draw)
            for m, (z, own, own_later) in enumerate(zip(streams, first, later, strict=True))
        ]
