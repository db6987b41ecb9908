"""Masked multi-head crossmodal attention over a key sequence spliced from modality segments (UMDF eq. 7)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch._C import DispatchKeySet

from fastmmkd.ops import reference
from fastmmkd.ops.declaration import below, declare, declare_backward, differentiable_gradients, differentiate
from fastmmkd.ops.dispatch import implementation
from fastmmkd.ops.operation import Op
from fastmmkd.ops.work import FLOAT, Work


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
    return implementation(OP, query)(query, keys, values, key_masks, heads)


def _fake(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor],
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    groups, batch, queries, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((groups, batch, heads, 2, queries), dtype=torch.float32)


def _backward_fake(
    grad: torch.Tensor,
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor],
    out: torch.Tensor,
    statistics: torch.Tensor,
    heads: int,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    return (
        query.new_empty(query.shape),
        [x.new_empty(x.shape) for x in keys],
        [x.new_empty(x.shape) for x in values],
    )


_declared = declare(
    "cross_attention",
    "(Tensor query, Tensor[] keys, Tensor[] values, Tensor[] key_masks, int heads) -> (Tensor out, Tensor statistics)",
    _fake,
)
_declared_backward = declare_backward(
    "cross_attention",
    "(Tensor grad, Tensor query, Tensor[] keys, Tensor[] values, Tensor[] key_masks, Tensor out, Tensor statistics,"
    " int heads) -> (Tensor grad_query, Tensor[] grad_keys, Tensor[] grad_values)",
    _backward_fake,
)


class _Function(torch.autograd.Function):
    """Autograd sees tensors only as arguments of their own, so the segments come one after another."""

    @staticmethod
    def forward(ctx: Any, keyset: DispatchKeySet, heads: int, query: torch.Tensor, *segments: torch.Tensor) -> Any:
        out, statistics = below(_declared, keyset, query, *_thirds(segments), heads)
        ctx.save_for_backward(query, out, statistics, *segments)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.heads = heads
        return out, statistics

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, _: None) -> Any:
        query, out, statistics, *segments = ctx.saved_tensors
        if grad is None:
            return (None,) * (3 + len(segments))
        keys, values, masks = _thirds(segments)
        if torch.is_grad_enabled():
            inputs, wanted = (query, *keys, *values), ctx.needs_input_grad[2 : 3 + 2 * len(keys)]

            def definition(query: torch.Tensor, *kv: torch.Tensor) -> torch.Tensor:
                return reference.cross_attention(query, kv[: len(keys)], kv[len(keys) :], masks, ctx.heads)

            return None, None, *differentiable_gradients(definition, inputs, wanted, grad), *(None,) * len(masks)
        grad_query, grad_keys, grad_values = _declared_backward(
            grad, query, keys, values, masks, out, statistics, ctx.heads
        )
        return None, None, grad_query, *grad_keys, *grad_values, *(None,) * len(masks)


def _thirds(segments: Sequence[torch.Tensor]) -> tuple[Sequence[torch.Tensor], ...]:
    n = len(segments) // 3
    return segments[:n], segments[n : 2 * n], segments[2 * n :]


differentiate(
    _declared,
    lambda keyset, query, keys, values, key_masks, heads: _Function.apply(
        keyset, heads, query, *keys, *values, *key_masks
    ),
)


def _compiled(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor],
    heads: int,
) -> torch.Tensor:
    return _declared(query, keys, values, key_masks, heads)[0]


def _work(g: int, b: int, t: int, k: int, d: int, h: int, e: int) -> Work:
    """`G B ((2 T D + 2 K D) e + K + 8 H T)` bytes: query, out, keys, values, mask, statistics.

    `G B (T K (4 D + 3 H) + 2 T D)` operations: two products; difference, exponential and sum of a score; scaling the
    query and dividing by the sum. K counts the keys that are present.
    """
    return Work(
        g * b * ((2 * t * d + 2 * k * d) * e + k + 2 * FLOAT * h * t), g * b * (t * k * (4 * d + 3 * h) + 2 * t * d)
    )


def _backward_work(g: int, b: int, t: int, k: int, d: int, h: int, e: int) -> Work:
    """`G B ((4 T D + 4 K D) e + K + 8 H T)` bytes: grad, query, out, grad of query; keys, values and their gradients.

    `G B (T K (10 D + 5 H) + 4 T D)` operations: five products; a score's weight (difference, exponential, product) and
    its gradient (difference, product); scaling the query and its gradient, and the product of grad and out.
    """
    return Work(
        g * b * ((4 * t * d + 4 * k * d) * e + k + 2 * FLOAT * h * t), g * b * (t * k * (10 * d + 5 * h) + 4 * t * d)
    )


OP = Op(
    "cross_attention",
    ("triton", "cuda", "cpp"),
    _compiled,
    gradient="backward",
    work=_work,
    backward_work=_backward_work,
)
