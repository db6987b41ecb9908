"""The multi-grained crossmodal interaction module, MCIM (UMDF eqs. 7 to 9).

A layer holds nine attentions: for each target modality t a coarse one over [Z_L, Z_A, Z_V] and two fine ones over
[Z_t, Z_s], s being one of the other two. Streams of equal length run with the targets (and the fine pair) as groups of
one call; streams of different lengths (unaligned data) run one by one with the same weights.

Shape legend: S models, n attentions of a call, B rows, T_m frames of modality m, d width.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import NamedTuple

import torch
from torch import nn

from fastmmkd.nn.constants import constant
from fastmmkd.nn.dropout import Dropout
from fastmmkd.nn.grouped import FeedForward, GroupedLinear, ResidualNorm, join_groups, linear, projection
from fastmmkd.ops import cross_attention, residual_layer_norm
from fastmmkd.ops.philox import DrawKeys

OTHERS = ((1, 2), (0, 2), (0, 1))
"""Per target modality, the other two: the sources of its fine attentions."""
COARSE, FINE_1, FINE_2 = range(3)
FINE_SOURCES = tuple((target, other) for target in range(3) for other in OTHERS[target])
"""Per fine attention, targets outermost: the modalities of its two segments of keys."""

Streams = list[torch.Tensor]
Use = tuple[int, int, int]
"""(source modality, target modality, block): the keys and values of one source for one attention."""


class Weights(NamedTuple):
    """Of the n attentions of a call, `[S * n, ...]` each."""

    query: torch.Tensor
    key_value: torch.Tensor
    out: torch.Tensor
    out_bias: torch.Tensor
    norm: torch.Tensor
    norm_bias: torch.Tensor


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
        return self._together(streams, masks, draw) if aligned else self._one_by_one(streams, masks, draw)

    def _together(self, streams: Streams, masks: Streams, draw: DrawKeys | None) -> Streams:
        """One call for the coarse attentions of all targets, and one for the fine ones."""
        parts = [[x.flatten(0, 2) for x in weight.split([1, 2], dim=2)] for weight in self._weights()]
        coarse, fine = (Weights(*of_call) for of_call in zip(*parts, strict=True))
        z = join_groups(streams)  # [S * 3, B, T, d]
        z_c = self._attend(z, coarse, *self._coarse_sources(z, coarse, masks), partial(self.coarse_dropout, draw=draw))
        z_c = z_c.repeat_interleave(2, dim=0)  # [S * 6, B, T, d]
        z_f = self._attend(z_c, fine, *self._fine_sources(z, z_c, fine, masks), partial(self.fine_dropout, draw=draw))
        z_h = self.feed_forward(z_f.unflatten(0, (-1, 2)).sum(1), draw=draw)
        return list(z_h.unflatten(0, (-1, 3)).unbind(1))

    def _coarse_sources(self, z: torch.Tensor, weights: Weights, masks: Streams) -> tuple[Streams, Streams]:
        """Keys and values `[S * 3, B, T, 2 d]` of each source for every target, one product, and the sources' masks.

        Both are views where S is 1.
        """
        if not self.crossmodal:
            return [linear(z, weights.key_value)], [join_groups(masks)]
        weight = weights.key_value.unflatten(0, (-1, 3)).transpose(1, 2).flatten(2)  # [S, d, 3 * 2 d]
        of_sources = linear(z.unflatten(0, (-1, 3)), weight).unflatten(-1, (3, -1)).unbind(1)  # [S, B, T, 3, 2 d]
        key_masks = [mask.unsqueeze(1).expand(-1, 3, -1, -1).flatten(0, 1) for mask in masks]
        return [kv.permute(0, 3, 1, 2, 4).flatten(0, 1) for kv in of_sources], key_masks

    def _fine_sources(
        self, z: torch.Tensor, z_c: torch.Tensor, weights: Weights, masks: Streams
    ) -> tuple[Streams, Streams]:
        """Keys and values `[S * 6, B, T, 2 d]` of the target and of the other modality, one product, and masks."""
        of_target, of_other = ([masks[source] for source in sources] for sources in zip(*FINE_SOURCES, strict=True))
        if not self.crossmodal:
            return [linear(z_c, weights.key_value)], [join_groups(of_target)]
        # A product with ones and zeros is exact; the gradient of an index would be added by atomics, in any order.
        chosen = constant(_one_hot, FINE_SOURCES, device=z.device, dtype=z.dtype)  # [12, 3]
        of_pairs = (chosen @ z.unflatten(0, (-1, 3)).flatten(2)).view(-1, 2, *z.shape[1:])  # [S * 6, 2, B, T, d]
        key_masks = torch.stack([*of_target, *of_other], dim=1).chunk(2, dim=1)
        return list(linear(of_pairs, weights.key_value).unbind(1)), [mask.flatten(0, 1) for mask in key_masks]

    def _one_by_one(self, streams: Streams, masks: Streams, draw: DrawKeys | None) -> Streams:
        """A call for each of the nine attentions."""
        of_calls = map(Weights, *(weight.flatten(1, 2).unbind(1) for weight in self._weights()))
        weights = dict(zip(product(range(3), range(3)), of_calls, strict=True))
        sources = self._project_sources(streams, weights) if self.crossmodal else {}
        outputs = []
        for target, z in enumerate(streams):

            def attend(z: torch.Tensor, block: int, used: tuple[int, ...], t: int = target) -> torch.Tensor:
                dropout = partial(self.coarse_dropout, draw=draw, first=t)
                if block != COARSE:
                    dropout = partial(self.fine_dropout, draw=draw, first=2 * t + block - FINE_1)
                if not self.crossmodal:
                    key_values = [linear(z, weights[t, block].key_value)]
                    return self._attend(z, weights[t, block], key_values, [masks[t]], dropout)
                key_values = [sources[source, t, block] for source in used]
                return self._attend(z, weights[t, block], key_values, [masks[source] for source in used], dropout)

            z_c = attend(z, COARSE, (0, 1, 2))
            fine = [attend(z_c, block, (target, OTHERS[target][block - 1])) for block in (FINE_1, FINE_2)]
            outputs.append(self.feed_forward(fine[0] + fine[1], (slice(None), slice(target, target + 1)), draw))
        return outputs

    def _project_sources(self, streams: Streams, weights: dict[tuple[int, int], Weights]) -> dict[Use, torch.Tensor]:
        """Keys and values `[S, B, T_m, 2 d]` of every use of every source: one matrix product per modality."""
        projected: dict[Use, torch.Tensor] = {}
        for source, z in enumerate(streams):
            uses = [
                (source, target, block)
                for target, block in product(range(3), range(3))
                if block == COARSE or source == target or source == OTHERS[target][block - 1]
            ]
            weight = torch.cat([weights[target, block].key_value for _, target, block in uses], dim=-1)
            projected |= dict(zip(uses, linear(z, weight).chunk(len(uses), dim=-1), strict=True))
        return projected

    def _weights(self) -> Weights:
        return Weights(self.query, self.key_value, self.out.weight, self.out.bias, self.norm.weight, self.norm.bias)

    def _attend(
        self, z: torch.Tensor, weights: Weights, key_values: Streams, key_masks: Streams, dropout: partial[torch.Tensor]
    ) -> torch.Tensor:
        """`LN(dropout(CA(sources, z)) + z)`: `[S * n, B, T, d]` -> `[S * n, B, T, d]`."""
        keys, values = zip(*(kv.chunk(2, dim=-1) for kv in key_values), strict=True)
        attended = cross_attention(linear(z, weights.query), keys, values, key_masks, self.heads)
        out = dropout(linear(attended, weights.out, weights.out_bias))
        return residual_layer_norm(out, z, weights.norm, weights.norm_bias)


def _one_hot(pairs: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """A row for each modality named, which has a 1 there: `[2 * pairs, 3]`."""
    rows = torch.eye(3, device=device).unbind()
    return torch.stack([rows[source] for pair in pairs for source in pair])
