"""Masked multi-head crossmodal attention over a key sequence spliced from modality segments (UMDF eq. 7)."""

from collections.abc import Sequence

import torch

from fastmmkd.ops.registry import implementation


def cross_attention(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor],
    heads: int,
) -> torch.Tensor:
    """`softmax(Q K^T / sqrt(d / heads)) V` per head, keys and values spliced along time.

    Args:
        query: `[G, B, T, d]`, projected; fp32, fp16, bf16 or fp64.
        keys, values: 1 to 3 segments `[G, B, T_i, d]` of the query's dtype.
        key_masks: one `[G, B, T_i]` bool per segment; True = the frame may be attended to.
        heads: h, a divisor of d.

    Returns:
        `[G, B, T, d]` in the query's dtype, accumulated in fp32 or better. A query whose keys are all masked gets 0,
        and sends gradient 0.

    Raises:
        ValueError: segments disagree with each other or with the query in number, shape, dtype, or mask.
    """
    groups, batch, _, width = query.shape
    if not len(keys) == len(values) == len(key_masks) or not keys:
        raise ValueError(f"{len(keys)} key, {len(values)} value and {len(key_masks)} mask segments; expected as many")
    if width % heads:
        raise ValueError(f"{heads} heads do not divide the width {width}")
    for i, (key, value, mask) in enumerate(zip(keys, values, key_masks, strict=True)):
        expected = (groups, batch, key.shape[2], width)
        if key.shape != expected or value.shape != expected:
            raise ValueError(f"segment {i}: keys {tuple(key.shape)}, values {tuple(value.shape)}; expected {expected}")
        if key.dtype != query.dtype or value.dtype != query.dtype:
            raise ValueError(f"segment {i}: keys {key.dtype}, values {value.dtype}; query is {query.dtype}")
        if mask.shape != expected[:3]:
            raise ValueError(f"segment {i}: key_mask is {tuple(mask.shape)}, keys need {expected[:3]}")
    return implementation("cross_attention", query)(query, keys, values, key_masks, heads)
