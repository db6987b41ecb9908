"""Crossmodal attention by PyTorch's own fused kernel: what ours is measured against."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def scaled_dot_product(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor],
    heads: int,
) -> torch.Tensor:
    """`fastmmkd.ops.cross_attention` by PyTorch's fused attention: `[G, B, T, d]`."""

    def per_head(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(2, 3).flatten(0, 1)

    key, value = per_head(torch.cat(list(keys), 2)), per_head(torch.cat(list(values), 2))
    mask = torch.cat(list(key_masks), 2).flatten(0, 1)[:, None, None]
    some = mask.any(-1, keepdim=True)
    attended = F.scaled_dot_product_attention(per_head(query), key, value, attn_mask=mask | ~some) * some
    return attended.unflatten(0, query.shape[:2]).transpose(2, 3).flatten(-2)
