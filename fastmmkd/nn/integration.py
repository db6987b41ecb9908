"""The dynamic feature integration module, DFIM (UMDF eqs. 10 and 11)."""

from __future__ import annotations

import torch
from torch import nn

from fastmmkd.nn.constants import constant
from fastmmkd.nn.embedding import temporal_windows
from fastmmkd.nn.encoder import TransformerEncoder
from fastmmkd.nn.grouped import GroupedLinear
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
        h_a: torch.Tensor,
        h_b: torch.Tensor,
        mask_a: torch.Tensor,
        mask_b: torch.Tensor,
        draw: DrawKeys | None = None,
    ) -> torch.Tensor:
        """`[S, B, T, d]` twice and their `[S, B, T]` masks -> the integrated representation `[S, B, T, d]`."""
        h_a, h_b = self.enhance(torch.cat((h_a, h_b), dim=1), torch.cat((mask_a, mask_b), dim=1)).chunk(2, dim=1)
        mu = self.gate(temporal_windows(torch.cat((h_a, h_b), dim=-1))).sigmoid()
        mask = mask_a | mask_b
        return self.encoder(torch.lerp(h_b, h_a, mu), mask, mask, draw=draw)

    def enhance(self, h: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Weight each frame by its importance, masked frames but the last by 0: `[S, B, T, d]` -> `[S, B, T, d]`."""
        mask = (mask | constant(_is_last, mask.shape[-1], device=mask.device, dtype=torch.bool)).unsqueeze(-1)
        score = accumulation(self.frame_score(h))
        weight = score.masked_fill(~mask, torch.finfo(score.dtype).min).softmax(dim=2) * mask
        return h * (weight * mask.sum(dim=2, keepdim=True)).to(h.dtype)


def _is_last(steps: int, device: torch.device) -> torch.Tensor:
    return torch.arange(steps, device=device) == steps - 1
