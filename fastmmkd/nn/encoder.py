"""Transformer encoders (post-norm) with one set of weights per group."""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from fastmmkd.data.batches import Inputs, Kept, by_layer
from fastmmkd.nn.causal import causal_attention
from fastmmkd.nn.dropout import Dropout
from fastmmkd.nn.grouped import (
    WHOLE,
    FeedForward,
    GroupedLinear,
    Part,
    ResidualNorm,
    join_groups,
    projection,
    start,
)
from fastmmkd.ops import encoder_layer, grouped_linear, residual_layer_norm
from fastmmkd.ops.composition import EncoderWeights, Steps, compose_encoder_layer
from fastmmkd.ops.encoder_layer import composed_encoder_layer
from fastmmkd.ops.layout import Layout
from fastmmkd.ops.philox import DrawKeys


class EncoderLayer(nn.Module):
    """`X = LN(X + dropout(SA(X)))`, `X = LN(X + dropout(FFN(X)))`."""

    def __init__(self, groups: tuple[int, ...], d: int, heads: int, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query_key_value = projection(groups, d, 3 * d, fan_out=d)
        self.out = GroupedLinear(groups, d, d)
        self.dropout = Dropout(dropout)
        self.norm = ResidualNorm(groups, d)
        self.feed_forward = FeedForward(groups, d, dropout)

    def forward(
        self, x: torch.Tensor, mask: torch.Tensor, layout: Layout, at: Part = WHOLE, draw: DrawKeys | None = None
    ) -> torch.Tensor:
        """`[G, R, d]` and its mask (True = may be attended to), `[G, R]` or `[S, R]` bool -> `[G, R, d]`."""
        weights = self._weights(at)
        dropouts = [self.dropout, self.feed_forward.dropout]
        if all(dropout.is_off(draw) for dropout in dropouts) and not self.causal:
            return encoder_layer(x, mask, layout, self.heads, weights)
        of_call = [partial(dropout, layout=layout, draw=draw, first=start(at)) for dropout in dropouts]
        if self.causal:
            steps = Steps(causal_attention, residual_layer_norm, grouped_linear, tuple(of_call))
            return compose_encoder_layer(steps, x, mask, layout, self.heads, weights, eps=1e-5)
        return composed_encoder_layer(x, mask, layout, self.heads, weights, dropouts=of_call)

    def _weights(self, at: Part) -> EncoderWeights:
        last = self.feed_forward
        weights = (
            self.query_key_value,
            *(self.out.weight, self.out.bias, self.norm.weight, self.norm.bias),
            *(last.expand.weight, last.expand.bias, last.contract.weight, last.contract.bias),
            *(last.norm.weight, last.norm.bias),
        )
        return EncoderWeights(*(weights if at is WHOLE else (weight[at] for weight in weights)))


class TransformerEncoder(nn.Module):
    """A stack of encoder layers."""

    def __init__(
        self, groups: tuple[int, ...], d: int, heads: int, layers: int, dropout: float = 0.0, causal: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(groups, d, heads, dropout, causal) for _ in range(layers))

    def forward(
        self,
        x: torch.Tensor,
        first: torch.Tensor,
        later: torch.Tensor,
        layout: Layout,
        at: Part = WHOLE,
        draw: DrawKeys | None = None,
    ) -> torch.Tensor:
        """`[G, R, d]`, and the `[G, R]` bool masks of the first layer and of the later ones -> `[G, R, d]`.

        G is the product of the group axes (of `at`).
        """
        for i, layer in enumerate(self.layers):
            x = layer(x, later if i else first, layout, at, draw)
        return x


class ModalityEncoders(nn.Module):
    """A transformer encoder per modality. Streams of equal length run, and stay, together."""

    def __init__(
        self, models: int, d: int, heads: int, layers: int, dropout: float = 0.0, causal: bool = False
    ) -> None:
        super().__init__()
        self.encoder = TransformerEncoder((models, 3), d, heads, layers, dropout, causal)

    def forward(
        self, streams: list[torch.Tensor], inputs: Inputs, draw: DrawKeys | None = None
    ) -> list[tuple[torch.Tensor, torch.Tensor, Layout]]:
        """Encode every modality.

        Args:
            streams: per modality `[S, R_m, d]`.
            inputs: where they come from: their masks and layouts.
            draw: what dropout is drawn from; None = no dropout.

        Returns:
            Rows `[S * n, R, d]`, the `[S * n, R]` mask of the last layer, and whose they are: once with n = 3 where the
            modalities share a layout, else three times with n = 1.
        """
        (first, later), layouts = by_layer(inputs.masks), inputs.layouts
        if inputs.aligned:
            mask = join_groups(first)
            mask_later = mask if first is later else join_groups(later)
            encoded = self.encoder(join_groups(streams), mask, mask_later, layouts[0], draw=draw)
            return [(encoded, mask_later, layouts[0])]
        return [
            (self.encoder(z, mask, mask_later, layout, (slice(None), slice(m, m + 1)), draw), mask_later, layout)
            for m, (z, mask, mask_later, layout) in enumerate(zip(streams, first, later, layouts, strict=True))
        ]


def chosen(whole: torch.Tensor, nothing: torch.Tensor, kept: Kept) -> torch.Tensor:
    """Of each modality what became of it, or of its absence: `[S, 3, ...]` twice -> `[S, 3, ...]`."""
    return torch.stack([(whole if k else nothing)[:, m] for m, k in enumerate(kept)], dim=1)
