"""Crossmodal transformers, one for each ordered pair of modalities (Tsai et al., ACL 2019), post-norm.

Shape legend: S models, R_m rows of modality m, d width.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn

from fastmmkd.nn.causal import causal_attention
from fastmmkd.nn.dropout import Dropout
from fastmmkd.nn.grouped import WHOLE, FeedForward, GroupedLinear, Part, ResidualNorm, of_part, projection, start
from fastmmkd.ops import cross_attention, grouped_linear
from fastmmkd.ops.composition import OTHERS
from fastmmkd.ops.layout import Layout
from fastmmkd.ops.philox import DrawKeys

PAIRS = tuple((target, source) for target in range(3) for source in OTHERS[target])
"""Each modality with each of the others: the one that is complemented, and the one it attends to."""


class CrossmodalLayer(nn.Module):
    """`Z = LN(Z + dropout(CA(source, Z)))`, `Z = LN(Z + dropout(FFN(Z)))` for every pair, with weights of its own."""

    def __init__(self, models: int, d: int, heads: int, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        groups, self.heads = (models, len(PAIRS)), heads
        self.attention = causal_attention if causal else cross_attention
        self.query, self.key_value = projection(groups, d, d), projection(groups, d, 2 * d, fan_out=d)
        self.out, self.dropout, self.norm = GroupedLinear(groups, d, d), Dropout(dropout), ResidualNorm(groups, d)
        self.feed_forward = FeedForward(groups, d, dropout)

    def forward(
        self,
        z: torch.Tensor,
        source: torch.Tensor,
        mask: torch.Tensor,
        layout: Layout,
        of_source: Layout,
        at: Part = WHOLE,
        draw: DrawKeys | None = None,
    ) -> torch.Tensor:
        """`[G, R, d]`, and of what is attended to `[G, R', d]` and a `[G, R']` bool mask -> `[G, R, d]`."""
        query = grouped_linear(z, of_part(self.query, at))
        key, value = grouped_linear(source, of_part(self.key_value, at)).chunk(2, dim=-1)
        attended = self.attention(query, [key], [value], [mask], self.heads, layout, [of_source])
        dropout = partial(self.dropout, layout=layout, draw=draw, first=start(at))
        z = self.norm(dropout(self.out(attended, at)), z, at)
        out: torch.Tensor = self.feed_forward(z, layout, at, draw)
        return out


class CrossmodalTransformers(nn.Module):
    """Six stacks of such layers, each of which attends to its source as it came in."""

    def __init__(
        self, models: int, d: int, heads: int, layers: int, dropout: float = 0.0, causal: bool = False
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(CrossmodalLayer(models, d, heads, dropout, causal) for _ in range(layers))

    def forward(
        self,
        streams: list[torch.Tensor],
        masks: list[torch.Tensor],
        layouts: list[Layout],
        draw: DrawKeys | None = None,
    ) -> list[torch.Tensor]:
        """Per modality `[S, R_m, d]`, `[S, R_m]` bool and whose rows they are -> per pair `[S, R_target, d]`."""
        if all(layout is layouts[0] for layout in layouts):
            z, source, mask = (
                torch.stack([of[pair[i]] for pair in PAIRS], dim=1).flatten(0, 1)
                for of, i in ((streams, 0), (streams, 1), (masks, 1))
            )
            for layer in self.layers:
                z = layer(z, source, mask, layouts[0], layouts[0], draw=draw)
            return list(z.unflatten(0, (-1, len(PAIRS))).unbind(1))
        complemented = []
        for i, (target, source_of) in enumerate(PAIRS):
            z, at = streams[target], (slice(None), slice(i, i + 1))
            for layer in self.layers:
                z = layer(z, streams[source_of], masks[source_of], layouts[target], layouts[source_of], at, draw)
            complemented.append(z)
        return complemented
