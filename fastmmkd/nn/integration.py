"""The dynamic feature integration module, DFIM (UMDF eqs. 10 and 11)."""

from __future__ import annotations

import torch
from torch import nn

from fastmmkd.nn.encoder import TransformerEncoder
from fastmmkd.nn.grouped import GroupedLinear
from fastmmkd.ops import temporal_convolution
from fastmmkd.ops.layout import Layout, pack, split_versions, unpack
from fastmmkd.ops.philox import DrawKeys
from fastmmkd.ops.precision import accumulation


class DynamicFeatureIntegration(nn.Module):
    """Frame-level self-enhancement of both versions, then selective filtering of one by the other.

    Decision: `H~ = n w H` with `w` the softmax over the n frames that are not masked. The product keeps the sequence
    (the paper's matrix product would collapse it, and eq. 10 convolves over time), the factor keeps its scale. The last
    frame always counts, dropped or not: it is the one that predictions are read from.
    """

    def __init__(self, models: int, d: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.frame_score = GroupedLinear((models,), d, 1)
        self.gate = GroupedLinear((models,), 3 * 2 * d, d)
        self.encoder = TransformerEncoder((models,), d, heads, 1, dropout)

    def forward(
        self,
        h: torch.Tensor,
        mask: torch.Tensor,
        layout: Layout,
        one: Layout,
        draw: DrawKeys | None = None,
    ) -> torch.Tensor:
        """`H_a, H_b` as rows `[S, 2 R, d]` of `layout`, or one for both, and their mask -> the integrated `[S, R, d]`.

        Args:
            one: that of a single version.
        """
        of_h, of_mask = (split_versions(x, layout, one) for x in (self.enhance(h, mask, layout), mask))
        h_a, h_b = of_h[0], of_h[-1]
        mu = temporal_convolution(torch.cat((h_a, h_b), dim=-1), one, self.gate.weight, self.gate.bias).sigmoid()
        either = of_mask[0] | of_mask[-1]
        return self.encoder(torch.lerp(h_b, h_a, mu), either, either, one, draw=draw)

    def enhance(self, h: torch.Tensor, mask: torch.Tensor, layout: Layout) -> torch.Tensor:
        """Weight each frame by its importance, masked frames but the last by 0: `[S, R, d]` -> `[S, R, d]`."""
        counts = unpack((mask | layout.is_last) & layout.is_somebodys, layout)  # [S, B, T]
        score = unpack(accumulation(self.frame_score(h)).squeeze(-1), layout)
        weight = score.masked_fill(~counts, torch.finfo(score.dtype).min).softmax(dim=2) * counts
        return h * pack(weight * counts.sum(dim=2, keepdim=True), layout).unsqueeze(-1).to(h.dtype)
