"""Crossmodal transformers, one for each ordered pair of modalities (Tsai et al., ACL 2019), post-norm.

Shape legend: S models, R_m rows of modality m, d width.
"""

from __future__ import annotations

import torch
from torch import nn

from fastmmkd.nn.causal import causal_attention
from fastmmkd.nn.decoder import DecoderAttention
from fastmmkd.nn.grouped import WHOLE, FeedForward, Part
from fastmmkd.ops import cross_attention
from fastmmkd.ops.composition import OTHERS
from fastmmkd.ops.layout import Layout
from fastmmkd.ops.philox import DrawKeys

PAIRS = tuple((target, source) for target in range(3) for source in OTHERS[target])
"""Each modality with each of the others: the one that is complemented, and the one it attends to."""


class CrossmodalLayer(DecoderAttention):
    """`Z = LN(Z + dropout(CA(source, Z)))`, `Z = LN(Z + dropout(FFN(Z)))` for every pair, with weights of its own."""

    def __init__(self, models: int, d: int, heads: int, dropout: float = 0.0, causal: bool = False) -> None:
        groups = (models, len(PAIRS))
        super().__init__(groups, d, heads, dropout, causal_attention if causal else cross_attention)
        self.feed_forward = FeedForward(groups, d, dropout)

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
        """`[G, R, d]`, and of what is attended to `[G, R', d]` and a `[G, R']` bool mask -> `[G, R, d]`."""
        attended = super().forward(x, layout, source, mask, source_layout, at, draw)
        out: torch.Tensor = self.feed_forward(attended, layout, at, draw)
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
                z = layer(z, layouts[0], source, mask, layouts[0], draw=draw)
            return list(z.unflatten(0, (-1, len(PAIRS))).unbind(1))
        complemented = []
        for i, (target, source_of) in enumerate(PAIRS):
            z, at = streams[target], (slice(None), slice(i, i + 1))
            for layer in self.layers:
                z = layer(z, layouts[target], streams[source_of], masks[source_of], layouts[source_of], at, draw)
            complemented.append(z)
        return complemented
