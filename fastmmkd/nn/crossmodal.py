"""The multi-grained crossmodal interaction module, MCIM (UMDF eqs. 7 to 9).

A layer holds nine attentions: for each target modality t a coarse one over [Z_L, Z_A, Z_V] and two fine ones over
[Z_t, Z_s], s being one of the other two. Streams of equal length run with the targets (and the fine pair) as groups of
one call; streams of different lengths (unaligned data) run one by one with the same weights.

Shape legend: S models, n attentions of a call, B rows, T_m frames of modality m, d width.
"""

from __future__ import annotations

from itertools import product

import torch
from torch import nn

from fastmmkd.nn.dropout import Dropout
from fastmmkd.nn.grouped import FeedForward, GroupedLinear, Part, ResidualNorm, join_groups, linear, projection
from fastmmkd.ops import cross_attention
from fastmmkd.ops.philox import DrawKeys

OTHERS = ((1, 2), (0, 2), (0, 1))
"""Per target modality, the other two: the sources of its fine attentions."""
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

    def forward(self, streams: Streams, masks: Streams, draw: DrawKeys | None = None) -> Streams:
        """Per modality `[S, B, T_m, d]` and `[S, B, T_m]` bool -> per modality `[S, B, T_m, d]`."""
        aligned = len({z.shape[2] for z in streams}) == 1
        sources = self._project_sources(streams) if self.crossmodal else {}
        outputs = []
        for targets in [(0, 1, 2)] if aligned else [(0,), (1,), (2,)]:
            z_t = join_groups([streams[t] for t in targets])
            z_c = self._attend(z_t, targets, (COARSE,), sources, masks, draw)
            z_f = torch.zeros_like(z_c)
            for blocks in [(FINE_1, FINE_2)] if aligned else [(FINE_1,), (FINE_2,)]:
                fine = self._attend(z_c, targets, blocks, sources, masks, draw)
                z_f = z_f + fine.unflatten(0, (-1, len(blocks))).sum(1)
            z_h = self.feed_forward(z_f, (slice(None), _span(targets)), draw)
            outputs += z_h.unflatten(0, (-1, len(targets))).unbind(1)
        return outputs

    def _project_sources(self, streams: Streams) -> dict[Use, torch.Tensor]:
        """Keys and values `[S, B, T_m, 2 d]` of every use of every source: one matrix product per modality."""
        projected: dict[Use, torch.Tensor] = {}
        for source, z in enumerate(streams):
            uses = [
                (source, target, block)
                for target, block in product(range(3), range(3))
                if block == COARSE or source == target or source == OTHERS[target][block - 1]
            ]
            weight = torch.cat([self.key_value[:, target, block] for _, target, block in uses], dim=-1)
            projected |= dict(zip(uses, linear(z, weight).chunk(len(uses), dim=-1), strict=True))
        return projected

    def _attend(
        self,
        z: torch.Tensor,
        targets: tuple[int, ...],
        blocks: tuple[int, ...],
        sources: dict[Use, torch.Tensor],
        masks: Streams,
        draw: DrawKeys | None,
    ) -> torch.Tensor:
        """`LN(dropout(CA(sources, z)) + z)` for every (target, block): `[S * targets, ...]` -> `[S * n, B, T, d]`."""
        at: Part = (slice(None), _span(targets), _span(blocks))
        z = z.repeat_interleave(len(blocks), dim=0) if len(blocks) > 1 else z
        attentions = list(product(targets, blocks))
        if self.crossmodal:
            segments = [[(source, t, b) for t, b in attentions] for source in range(3)]
            if COARSE not in blocks:
                segments = [[(t, t, b) for t, b in attentions], [(OTHERS[t][b - 1], t, b) for t, b in attentions]]
            key_values = [join_groups([sources[use] for use in segment]) for segment in segments]
            key_masks = [join_groups([masks[source] for source, _, _ in segment]) for segment in segments]
        else:
            key_values = [linear(z, self.key_value[at].flatten(0, 2))]
            key_masks = [join_groups([masks[t] for t, _ in attentions])]
        keys, values = zip(*(kv.chunk(2, dim=-1) for kv in key_values), strict=True)
        query = linear(z, self.query[at].flatten(0, 2))
        attended = cross_attention(query, keys, values, key_masks, self.heads)
        out = self.out(attended, at)
        if blocks == (COARSE,):
            out = self.coarse_dropout(out, draw, targets[0])
        else:
            out = self.fine_dropout(out, draw, 2 * targets[0] + blocks[0] - FINE_1)
        return self.norm(out, z, at)


def _span(indices: tuple[int, ...]) -> slice:
    return slice(indices[0], indices[-1] + 1)
