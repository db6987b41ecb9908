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
    """A transformer encoder per modality. Streams of equal length run, and stay, together."""

    def __init__(self, models: int, d: int, heads: int, layers: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.encoder = TransformerEncoder((models, 3), d, heads, layers, dropout)

    def forward(
        self, streams: list[torch.Tensor], masks: list[torch.Tensor], draw: DrawKeys | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Encode every modality.

        Args:
            streams: per modality `[S, B, T_m, d]`.
            masks: as `Inputs.masks` has them.
            draw: what dropout is drawn from; None = no dropout.

        Returns:
            `[S, n, B, T, d]` and the `[S, n, B, T]` mask of the last layer: once with n = 3 where lengths are equal,
            else three times with n = 1.
        """
        first, later = by_layer(masks)
        if len({z.shape[2] for z in streams}) == 1:
            mask = join_groups(first)
            mask_later = mask if len(masks) == len(first) else join_groups(later)
            encoded = [(self.encoder(join_groups(streams), mask, mask_later, draw=draw), mask_later)]
        else:
            encoded = [
                (self.encoder(z, mask, mask_later, (slice(None), slice(m, m + 1)), draw), mask_later)
                for m, (z, mask, mask_later) in enumerate(zip(streams, first, later, strict=True))
            ]
        models = streams[0].shape[0]
        return [(z.unflatten(0, (models, -1)), mask.unflatten(0, (models, -1))) for z, mask in encoded]
