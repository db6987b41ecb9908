"""Attention that does not look ahead, in plain PyTorch: a switch for those who want it, without kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fastmmkd.ops.layout import Layout, pack, unpack


def causal_attention(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor],
    heads: int,
    layout: Layout,
    key_layouts: Sequence[Layout] = (),
) -> torch.Tensor:
    """`fastmmkd.ops.cross_attention` of one segment, where frame t of n sees those up to `t + |n - m|` of a sample's m
    (MulT's mask); frames count from the sample's first real one."""
    (key,), (value,), (mask,) = keys, values, key_masks
    of_keys = key_layouts[0] if key_layouts else layout
    q, k, v = (
        unpack(x, of).unflatten(-1, (heads, -1)).transpose(2, 3)  # [G, B, heads, T, d / heads]
        for x, of in ((query, layout), (key, of_keys), (value, of_keys))
    )
    at, at_key = (unpack(of.position, of) for of in (layout, of_keys))  # [S, B, T]
    ahead = (at.amax(-1) - at_key.amax(-1)).abs()
    seen = at_key.unsqueeze(2) <= (at + ahead.unsqueeze(-1)).unsqueeze(3)
    groups = len(query)
    counts = unpack(mask, of_keys).repeat_interleave(groups // len(mask), dim=0).unsqueeze(2)
    allowed = (counts & seen.repeat_interleave(groups // len(seen), dim=0)).unsqueeze(2)  # [G, B, 1, T, T']
    scores = (q @ k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
    weight = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min).softmax(-1) * allowed
    return pack((weight @ v).transpose(2, 3).flatten(3), layout)
