"""Masked multi-head crossmodal attention over a key sequence spliced from modality segments (UMDF eq. 7)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch._C import DispatchKeySet

from fastmmkd.ops.declaration import below, declare, declare_backward, differentiable_gradients, differentiate
from fastmmkd.ops.dispatch import implementation
from fastmmkd.ops.layout import Layout, pack, unpack
from fastmmkd.ops.operation import Op
from fastmmkd.ops.precision import accumulation
from fastmmkd.ops.work import FLOAT, Work


def cross_attention(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor],
    heads: int,
    layout: Layout | None = None,
    key_layouts: Sequence[Layout] = (),
) -> torch.Tensor:
    """`softmax(Q K^T / sqrt(d / heads)) V` per head and sample, keys and values spliced from segments.

    Args:
        query: `[G, R, d]`, projected, the rows of `layout`; fp32, fp16, bf16 or fp64.
        keys, values: 1 to 3 segments `[G, R_i, d]` of the query's dtype.
        key_masks: one `[M, R_i]` bool per segment, M a divisor of G: each mask serves G / M groups that follow each
            other. True = the row may be attended to.
        heads: h, a divisor of d.
        layout: whose rows the queries are, of S models, S a divisor of G. None: everything is padded, query and result
            `[G, B, T, d]`, keys and values `[G, B, T_i, d]`, masks `[M, B, T_i]`.
        key_layouts: those of the segments; by default the queries'.

    Returns:
        `[G, R, d]` in the query's dtype, accumulated in fp32 or better. A query whose keys are all masked gets 0,
        and sends gradient 0; so does a row of nobody.

    Raises:
        ValueError: segments disagree with each other or with the query in number, shape, dtype, mask or layout.
    """
    for name, segments in (("keys", keys), ("values", values), ("key_masks", key_masks)):
        if isinstance(segments, torch.Tensor):
            raise ValueError(f"{name} is a tensor {tuple(segments.shape)}; expected a list of 1 to 3 segments")
    if not len(keys) == len(values) == len(key_masks) or not keys:
        raise ValueError(f"{len(keys)} key, {len(values)} value and {len(key_masks)} mask segments; expected as many")
    groups, width = query.shape[0], query.shape[-1]
    if heads < 1 or width % heads:
        raise ValueError(f"{heads} heads do not divide the width {width}")
    if layout is not None:
        key_layouts = key_layouts or [layout] * len(keys)
        if len(key_layouts) != len(keys):
            raise ValueError(f"{len(key_layouts)} key layouts; expected one for each of {len(keys)} segments")
        sizes: list[tuple[int, ...]] = [(of.rows,) for of in (layout, *key_layouts)]
        if any(of.batch != layout.batch or groups % len(of.starts) for of in (layout, *key_layouts)):
            batches = [tuple(of.starts.shape) for of in (layout, *key_layouts)]
            raise ValueError(f"starts are {batches}; expected [S, B + 1] of one B and an S that divides {groups}")
    elif query.dim() == 4:
        sizes = [(query.shape[1], x.shape[2] if x.dim() == 4 else 0) for x in (query, *keys)]
    else:
        raise ValueError(f"query is {tuple(query.shape)}; expected [G, B, T, d], or rows [G, R, d] and their layout")
    if query.shape[1:-1] != sizes[0]:
        raise ValueError(f"query is {tuple(query.shape)}; expected {(groups, *sizes[0], width)}")
    for i, (key, value, mask, size) in enumerate(zip(keys, values, key_masks, sizes[1:], strict=True)):
        expected = (groups, *size, width)
        if key.shape != expected or value.shape != expected:
            raise ValueError(f"segment {i}: keys {tuple(key.shape)}, values {tuple(value.shape)}; expected {expected}")
        if key.dtype != query.dtype or value.dtype != query.dtype:
            raise ValueError(f"segment {i}: keys {key.dtype}, values {value.dtype}; query is {query.dtype}")
        if mask.dtype != torch.bool:
            raise ValueError(f"segment {i}: key_mask is of {mask.dtype}; expected bool, True = may be attended to")
        if mask.shape[1:] != size or not len(mask) or groups % len(mask):
            raise ValueError(f"segment {i}: key_mask is {tuple(mask.shape)}, keys need {expected[:-1]}")
    return implementation(OP, query)(query, keys, values, key_masks, heads, layout, key_layouts)


def _definition(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor],
    heads: int,
    layout: Layout | None = None,
    key_layouts: Sequence[Layout] = (),
) -> torch.Tensor:
    """Rows are padded, attended to, and packed again."""
    key_masks = [mask.repeat_interleave(len(query) // len(mask), dim=0) for mask in key_masks]
    if layout is not None:
        key_layouts = key_layouts or [layout] * len(keys)
        keys, values, key_masks = (
            [unpack(x, of) for x, of in zip(segments, key_layouts, strict=True)]
            for segments in (keys, values, key_masks)
        )
        return pack(_definition(unpack(query, layout), keys, values, key_masks, heads), layout)
    key_gbkd, value_gbkd = torch.cat(tuple(keys), dim=2), torch.cat(tuple(values), dim=2)
    mask_gb11k = torch.cat(tuple(key_masks), dim=2)[:, :, None, None, :]

    def per_head(x: torch.Tensor) -> torch.Tensor:
        return accumulation(x).unflatten(-1, (heads, -1)).transpose(2, 3)

    query_gbhqe = per_head(query) * (query.shape[-1] // heads) ** -0.5
    score_gbhqk = query_gbhqe @ per_head(key_gbkd).transpose(-1, -2)
    score_gbhqk.masked_fill_(~mask_gb11k, torch.finfo(score_gbhqk.dtype).min)
    # Where no key is left the softmax is uniform; the last factor turns it, and its gradient, into zeros.
    attended_gbhqe = score_gbhqk.softmax(-1) @ per_head(value_gbkd) * mask_gb11k.any(-1, keepdim=True)
    return attended_gbhqe.transpose(2, 3).flatten(-2).to(query.dtype)


def _fake(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor],
    starts: torch.Tensor,
    key_starts: Sequence[torch.Tensor],
    longest: Sequence[int],
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    groups, rows, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((groups, heads, 2, rows), dtype=torch.float32)


def _backward_fake(
    grad: torch.Tensor,
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor],
    starts: torch.Tensor,
    key_starts: Sequence[torch.Tensor],
    longest: Sequence[int],
    out: torch.Tensor,
    statistics: torch.Tensor,
    heads: int,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    return (
        query.new_empty(query.shape),
        [x.new_empty(x.shape) for x in keys],
        [x.new_empty(x.shape) for x in values],
    )


_INPUTS = (
    "Tensor query, Tensor[] keys, Tensor[] values, Tensor[] key_masks, Tensor starts, Tensor[] key_starts,"
    " SymInt[] longest"
)
"""Rows, where each sample's begin, and how many a sample has at most: of the query and of every segment."""
_declared = declare("cross_attention", f"({_INPUTS}, int heads) -> (Tensor out, Tensor statistics)", _fake)
_declared_backward = declare_backward(
    "cross_attention",
    f"(Tensor grad, {_INPUTS}, Tensor out, Tensor statistics, int heads)"
    " -> (Tensor grad_query, Tensor[] grad_keys, Tensor[] grad_values)",
    _backward_fake,
)


class _Function(torch.autograd.Function):
    """Autograd sees tensors only as arguments of their own, so the segments come one after another."""

    @staticmethod
    def forward(
        ctx: Any,
        keyset: DispatchKeySet,
        heads: int,
        longest: Sequence[int],
        query: torch.Tensor,
        starts: torch.Tensor,
        *segments: torch.Tensor,
    ) -> Any:
        keys, values, masks, key_starts = _quarters(segments)
        out, statistics = below(_declared, keyset, query, keys, values, masks, starts, key_starts, longest, heads)
        ctx.save_for_backward(query, out, statistics, starts, *segments)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.heads, ctx.longest = heads, longest
        return out, statistics

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, _: None) -> Any:
        query, out, statistics, starts, *segments = ctx.saved_tensors
        if grad is None:
            return (None,) * (5 + len(segments))
        keys, values, masks, key_starts = _quarters(segments)
        n, none = len(keys), (None,) * (2 * len(keys))
        if torch.is_grad_enabled():
            inputs, wanted = (query, *keys, *values), (ctx.needs_input_grad[3], *ctx.needs_input_grad[5 : 5 + 2 * n])
            layout, *key_layouts = (
                Layout.of(at.diff(dim=1), x.shape[1], t)
                for at, x, t in zip((starts, *key_starts), (query, *keys), ctx.longest, strict=True)
            )

            def definition(query: torch.Tensor, *kv: torch.Tensor) -> torch.Tensor:
                return _definition(query, kv[:n], kv[n:], masks, ctx.heads, layout, key_layouts)

            grad_query, *grads = differentiable_gradients(definition, inputs, wanted, grad)
            return None, None, None, grad_query, None, *grads, *none
        grad_query, grad_keys, grad_values = _declared_backward(
            grad, query, keys, values, masks, starts, key_starts, ctx.longest, out, statistics, ctx.heads
        )
        return None, None, None, grad_query, None, *grad_keys, *grad_values, *none


def _quarters(segments: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], ...]:
    n = len(segments) // 4
    return segments[:n], segments[n : 2 * n], segments[2 * n : 3 * n], segments[3 * n :]


differentiate(
    _declared,
    lambda keyset, query, keys, values, key_masks, starts, key_starts, longest, heads: _Function.apply(
        keyset, heads, longest, query, starts, *keys, *values, *key_masks, *key_starts
    ),
)


def operands(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor],
    layout: Layout | None,
    key_layouts: Sequence[Layout],
) -> tuple[Any, ...]:
    """What the compiled operations take for these, padded or rows: all but the heads."""
    if layout is None:  # the rows of samples of one length
        rows = [x.flatten(1, 2) for x in (query, *keys, *values, *key_masks)]
        n, longest = len(keys), [x.shape[2] for x in (query, *keys)]
        starts, *key_starts = (torch.arange(query.shape[1] + 1, device=query.device)[None] * t for t in longest)
        return rows[0], rows[1 : 1 + n], rows[1 + n : 1 + 2 * n], rows[1 + 2 * n :], starts, key_starts, longest
    longest = [of.longest for of in (layout, *key_layouts)]
    return query, keys, values, key_masks, layout.starts, [of.starts for of in key_layouts], longest


def _compiled(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor],
    heads: int,
    *layouts: Any,
) -> torch.Tensor:
    out = _declared(*operands(query, keys, values, key_masks, *layouts), heads)[0]
    return out if out.shape == query.shape else out.view(query.shape)


def attention_work(g: int, t: Sequence[int], k: Sequence[int], d: int, h: int, e: int) -> Work:
    """Of samples with T queries and K keys each, one mask for all groups; where their rows lie is left out.

    `sum (G ((2 T D + 2 K D) e + 8 H T) + K)` bytes: query, out, keys, values, statistics, mask.

    `sum G (T K (4 D + 3 H) + 2 T D)` operations: two products; difference, exponential and sum of a score; scaling the
    query and dividing by the sum. K counts the keys that are present.
    """
    queries, keys, pairs = sum(t), sum(k), _pairs(t, k)
    moved = (2 * queries * d + 2 * keys * d) * e + 2 * FLOAT * h * queries
    return Work(g * moved + keys, g * (pairs * (4 * d + 3 * h) + 2 * queries * d))


def attention_backward_work(g: int, t: Sequence[int], k: Sequence[int], d: int, h: int, e: int) -> Work:
    """`sum (G ((4 T D + 4 K D) e + 8 H T) + K)` bytes: grad, query, out, grad of query; keys, values, their gradients.

    `sum G (T K (10 D + 5 H) + 4 T D)` operations: five products; a score's weight (difference, exponential, product)
    and its gradient (difference, product); scaling the query and its gradient, and the product of grad and out.
    """
    queries, keys, pairs = sum(t), sum(k), _pairs(t, k)
    moved = (4 * queries * d + 4 * keys * d) * e + 2 * FLOAT * h * queries
    return Work(g * moved + keys, g * (pairs * (10 * d + 5 * h) + 4 * queries * d))


def _pairs(queries: Sequence[int], keys: Sequence[int]) -> int:
    return sum(t * k for t, k in zip(queries, keys, strict=True))


OP = Op(
    "cross_attention",
    _definition,
    ("triton", "cuda", "cpp"),
    _compiled,
    gradient="backward",
    work=attention_work,
    backward_work=attention_backward_work,
    place=10,
)
