"""The multi-grained crossmodal interaction module, MCIM (UMDF eqs. 7 to 9).

A layer holds nine attentions: for each target modality t a coarse one over [Z_L, Z_A, Z_V] and two fine ones over
[Z_t, Z_s], s being one of the other two. Streams of one layout run with the targets (and the fine pair) as groups of
one call; streams of several (unaligned data) run one by one with the same weights.

Shape legend: S models, n attentions of a call, R_m rows of modality m, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import product

import torch
from torch import nn

from fastmmkd.nn.dropout import Dropout
from fastmmkd.nn.grouped import FeedForward, GroupedLinear, ResidualNorm, projection
from fastmmkd.ops import cross_attention, crossmodal_layer, grouped_linear, residual_layer_norm
from fastmmkd.ops.composition import OTHERS, AttentionWeights, CrossmodalWeights
from fastmmkd.ops.crossmodal_layer import composed_crossmodal_layer
from fastmmkd.ops.layout import Layout
from fastmmkd.ops.philox import DrawKeys

COARSE, FINE_1, FINE_2 = range(3)
Streams = list[torch.Tensor]
Use = tuple[int, int, int]
"""(source modality, target modality, block): the keys and values of one source for one attention."""


class CrossmodalInteraction(nn.Module):
    """One MCIM layer. With `crossmodal=False` ("w/o MCIM") every attention is a self-attention of its target."""

    def __init__(self, models: int, d: int, heads: int, crossmodal: bool = True, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.crossmodal = crossmodal
        groups = (models, 3, 3)  # model, target modality, block (coarse, fine 1, fine 2)
        self.query = projection(groups, d, d)
        self.key_value = projection(groups, d, 2 * d, fan_out=d)
        self.out = GroupedLinear(groups, d, d)
        self.coarse_dropout, self.fine_dropout = Dropout(dropout), Dropout(dropout)
        self.norm = ResidualNorm(groups, d)
        self.feed_forward = FeedForward((models, 3), d, dropout)

    def forward(self, streams: Streams, masks: Streams, layouts: list[Layout], draw: DrawKeys | None = None) -> Streams:
        """Per modality `[S, R_m, d]`, `[S, R_m]` bool and whose rows they are -> per modality `[S, R_m, d]`."""
        if all(layout is layouts[0] for layout in layouts):
            return self._together(streams, masks, layouts[0], draw)
        return self._one_by_one(streams, masks, layouts, draw)

    def _together(self, streams: Streams, masks: Streams, layout: Layout, draw: DrawKeys | None) -> Streams:
        last = self.feed_forward
        weights = CrossmodalWeights(
            *self._attention_weights(),
            *(last.expand.weight, last.expand.bias, last.contract.weight, last.contract.bias),
            *(last.norm.weight, last.norm.bias),
        )
        dropouts = self.coarse_dropout, self.fine_dropout, last.dropout
        if self.crossmodal and all(dropout.is_off(draw) for dropout in dropouts):
            return crossmodal_layer(streams, masks, layout, self.heads, weights)
        of_call = tuple(partial(dropout, layout=layout, draw=draw) for dropout in dropouts)
        return composed_crossmodal_layer(
            streams, masks, layout, self.heads, weights, dropouts=of_call, crossmodal=self.crossmodal
        )

    def _one_by_one(self, streams: Streams, masks: Streams, layouts: list[Layout], draw: DrawKeys | None) -> Streams:
        """A call for each of the nine attentions."""
        of_calls = map(AttentionWeights, *(weight.flatten(1, 2).unbind(1) for weight in self._attention_weights()))
        weights = dict(zip(product(range(3), range(3)), of_calls, strict=True))
        sources = self._project_sources(streams, weights) if self.crossmodal else {}
        outputs = []
        for target, z in enumerate(streams):

            def attend(z: torch.Tensor, block: int, used: tuple[int, ...], t: int = target) -> torch.Tensor:
                dropout = partial(self.coarse_dropout, layout=layouts[t], draw=draw, first=t)
                if block != COARSE:
                    dropout = partial(self.fine_dropout, layout=layouts[t], draw=draw, first=2 * t + block - FINE_1)
                of = weights[t, block]
                if not self.crossmodal:
                    return self._attend(z, of, [grouped_linear(z, of.key_value)], [masks[t]], layouts[t], [], dropout)
                key_values, key_masks, key_layouts = zip(
                    *((sources[source, t, block], masks[source], layouts[source]) for source in used), strict=True
                )
                return self._attend(z, of, key_values, key_masks, layouts[t], key_layouts, dropout)

            z_c = attend(z, COARSE, (0, 1, 2))
            fine = [attend(z_c, block, (target, OTHERS[target][block - 1])) for block in (FINE_1, FINE_2)]
            part = slice(None), slice(target, target + 1)
            outputs.append(self.feed_forward(fine[0] + fine[1], layouts[target], part, draw))
        return outputs

    def _project_sources(
        self, streams: Streams, weights: dict[tuple[int, int], AttentionWeights]
    ) -> dict[Use, torch.Tensor]:
        """Keys and values `[S, R_m, 2 d]` of every use of every source: one matrix product per modality."""
        projected: dict[Use, torch.Tensor] = {}
        for source, z in enumerate(streams):
            uses = [
                (source, target, block)
                for target, block in product(range(3), range(3))
                if block == COARSE or source == target or source == OTHERS[target][block - 1]
            ]
            weight = torch.cat([weights[target, block].key_value for _, target, block in uses], dim=-1)
            projected |= dict(zip(uses, grouped_linear(z, weight).chunk(len(uses), dim=-1), strict=True))
        return projected

    def _attention_weights(self) -> AttentionWeights:
        """`[S, 3, 3, ...]`."""
        return AttentionWeights(
            self.query, self.key_value, self.out.weight, self.out.bias, self.norm.weight, self.norm.bias
        )

    def _attend(
        self,
        z: torch.Tensor,
        weights: AttentionWeights,
        key_values: Sequence[torch.Tensor],
        key_masks: Sequence[torch.Tensor],
        layout: Layout,
        key_layouts: Sequence[Layout],
        dropout: partial[torch.Tensor],
    ) -> torch.Tensor:
        """`LN(dropout(CA(sources, z)) + z)`: `[S * n, R, d]` -> `[S * n, R, d]`."""
        keys, values = zip(*(kv.chunk(2, dim=-1) for kv in key_values), strict=True)
        query = grouped_linear(z, weights.query)
        attended = cross_attention(query, keys, values, key_masks, self.heads, layout, key_layouts)
        out = dropout(grouped_linear(attended, weights.out, weights.out_bias))
        return residual_layer_norm(out, z, weights.norm, weights.norm_bias)
