"""Transformer encoders (post-norm, no dropout) with one set of weights per group."""

from __future__ import annotations

import torch
from torch import nn

from fastmmkd.data.batches import by_layer
from fastmmkd.nn.grouped import WHOLE, FeedForward, GroupedLinear, Part, ResidualNorm, join_groups, linear, projection
from fastmmkd.ops import cross_attention


class EncoderLayer(nn.Module):
    """`X = LN(X + SA(X))`, `X = LN(X + FFN(X))`."""

    def __init__(self, groups: tuple[int, ...], d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = projection(groups, d, 3 * d, fan_out=d)
        self.out = GroupedLinear(groups, d, d)
        self.norm = ResidualNorm(groups, d)
        self.feed_forward = FeedForward(groups, d)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, at: Part = WHOLE) -> torch.Tensor:
        """`[G, B, T, d]` and `[G, B, T]` bool (True = may be attended to) -> `[G, B, T, d]`."""
        query, key, value = linear(x, self.query_key_value[at].flatten(0, -3)).chunk(3, dim=-1)
        attended = cross_attention(query, [key], [value], [mask], self.heads)
        return self.feed_forward(self.norm(self.out(attended, at), x, at), at)


class TransformerEncoder(nn.Module):
    """A stack of encoder layers."""

    def __init__(self, groups: tuple[int, ...], d: int, heads: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(groups, d, heads) for _ in range(layers))

    def forward(self, x: torch.Tensor, first: torch.Tensor, later: torch.Tensor, at: Part = WHOLE) -> torch.Tensor:
        """`[G, B, T, d]`, and the `[G, B, T]` bool masks of the first layer and of the later ones -> `[G, B, T, d]`.

        G is the product of the group axes (of `at`).
        """
        for i, layer in enumerate(self.layers):
            x = layer(x, later if i else first, at)
        return x


class ModalityEncoders(nn.Module):
    """A transformer encoder per modality. Streams of equal length run as groups of one call."""

    def __init__(self, models: int, d: int, heads: int, layers: int) -> None:
        super().__init__()
        self.encoder = TransformerEncoder((models, 3), d, heads, layers)

    def forward(self, streams: list[torch.Tensor], masks: list[torch.Tensor]) -> list[torch.Tensor]:
        """Per modality `[S, B, T_m, d]`, and masks as `Batch.masks` has them -> per modality `[S, B, T_m, d]`."""
        first, later = by_layer(masks)
        if len({z.shape[2] for z in streams}) == 1:
            encoded = self.encoder(join_groups(streams), join_groups(first), join_groups(later))
            return list(encoded.unflatten(0, (-1, 3)).unbind(1))
        return [
            self.encoder(z, own, own_later, (slice(None), slice(m, m + 1)))
            for m, (z, own, own_later) in enumerate(zip(streams, first, later, strict=True))
        ]
