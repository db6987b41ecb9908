"""Crossmodal attention by what PyTorch has for it: what ours is measured against.

Shape legend: G groups, B samples, R rows, T frames, h heads, d width.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
import torch.nn.functional as F

from fastmmkd.ops.layout import Layout, pack, unpack

VARLEN_WIDTH = 8
"""PyTorch's kernels for sequences of any length want head widths that are multiples of it."""


def scaled_dot_product(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor],
    heads: int,
    layout: Layout | None = None,
    key_layouts: Sequence[Layout] = (),
) -> torch.Tensor:
    """`fastmmkd.ops.cross_attention` by PyTorch's fused attention; rows are padded, attended to, and packed again."""
    if layout is not None:
        key_layouts = key_layouts or [layout] * len(keys)
        keys, values, key_masks = (
            [unpack(x, of) for x, of in zip(segments, key_layouts, strict=True)]
            for segments in (keys, values, key_masks)
        )
        return pack(scaled_dot_product(unpack(query, layout), keys, values, key_masks, heads), layout)

    def per_head(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (heads, -1)).transpose(2, 3).flatten(0, 1)

    key, value = per_head(torch.cat(list(keys), 2)), per_head(torch.cat(list(values), 2))
    mask_gbk = torch.cat([_of_groups(mask, query) for mask in key_masks], 2)
    mask = mask_gbk.flatten(0, 1)[:, None, None]
    some = mask.any(-1, keepdim=True)
    attended = F.scaled_dot_product_attention(per_head(query), key, value, attn_mask=mask | ~some) * some
    return attended.unflatten(0, query.shape[:2]).transpose(2, 3).flatten(-2)


def jagged(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor],
    heads: int,
    layout: Layout,
    key_layouts: Sequence[Layout] = (),
) -> torch.Tensor:
    """`fastmmkd.ops.cross_attention` of one model by PyTorch's attention over sequences of any length.

    In half precision on CUDA `varlen_attn`, where PyTorch has it; else its fused attention over jagged nested tensors.
    Neither takes a mask, nor a sequence of no keys: keys that are masked are left out, but for one where all are.

    Raises:
        ValueError: there are several models, or rows of nobody.
    """
    key_layouts = key_layouts or [layout] * len(keys)
    if any(len(of.starts) > 1 or not of.is_full for of in (layout, *key_layouts)):
        raise ValueError("expected the rows of one model, all of them somebody's")
    groups, rows, _ = query.shape
    whose, order = torch.cat([of.sample[0] for of in key_layouts]).sort(stable=True)  # segments, sample by sample
    mask_gk = torch.cat([_of_groups(mask, query) for mask in key_masks], 1)[:, order]
    some_gb = _counts(mask_gk, whose, layout.batch) > 0
    is_first = F.pad(whose.diff() > 0, (1, 0), value=True)
    mask_gk = mask_gk | (is_first & ~some_gb[:, whose])
    ends = _counts(mask_gk, whose, layout.batch).flatten().cumsum(0)
    first = torch.arange(groups, device=query.device)[:, None]
    chosen = (first * len(order) + order)[mask_gk]

    def per_head(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (heads, -1))

    key, value = (
        per_head(torch.cat(list(segments), 1).flatten(0, 1).index_select(0, chosen)) for segments in (keys, values)
    )
    most = sum(of.longest for of in key_layouts)
    starts = torch.cat(((first * rows + layout.starts[:, :-1]).flatten(), first.new_tensor([groups * rows])))
    of_queries = per_head(query.flatten(0, 1)).contiguous()
    attended = _of_sequences(of_queries, key, value, starts, F.pad(ends, (1, 0)), layout.longest, most)
    return attended.reshape(query.shape) * some_gb[:, layout.sample[0]].unsqueeze(-1)


def _of_sequences(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    key_starts: torch.Tensor,
    longest: int,
    most: int,
) -> torch.Tensor:
    """`[rows, h, d / h]` each; where sequences start, and how many queries and keys one has at most."""
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16):
        with suppress(ImportError):
            from torch.nn.attention.varlen import varlen_attn

            width = query.shape[-1]
            q, k, v = (F.pad(x, (0, -width % VARLEN_WIDTH)) for x in (query, key, value))
            attended = varlen_attn(q, k, v, starts.int(), key_starts.int(), longest, most, scale=width**-0.5)
            assert isinstance(attended, torch.Tensor)
            return attended[..., :width]
    nested = torch.nested.nested_tensor_from_jagged
    q = nested(query, starts, min_seqlen=1, max_seqlen=longest).transpose(1, 2)
    k, v = (nested(x, key_starts, min_seqlen=1, max_seqlen=most).transpose(1, 2) for x in (key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).values()


def _counts(mask_gk: torch.Tensor, whose: torch.Tensor, batch: int) -> torch.Tensor:
    """Keys of each sample that are not masked, `[G, B]`."""
    return mask_gk.new_zeros(len(mask_gk), batch, dtype=torch.int64).scatter_add_(
        1, whose.expand_as(mask_gk), mask_gk.long()
    )


def _of_groups(mask: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A mask for each group: `[M, ...]` -> `[G, ...]`."""
    return mask if len(mask) == len(query) else mask.repeat_interleave(len(query) // len(mask), dim=0)
