"""Every compiled operation as PyTorch sees it: schemas, shapes (fake implementations) and autograd formulas.

Kernels register themselves per device: csrc/ for the CPU. Nothing here computes. An operation's gradient is an
`autograd.Function` under the Autograd key, so that `torch.compile` sees one opaque call forward and one backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import DispatchKeySet, _after_autograd_keyset, _AutoDispatchBelowAutograd  # type: ignore[attr-defined]
from torch.autograd.function import once_differentiable

LIBRARY = torch.library.Library("fastmmkd", "DEF")


def define(name: str, schema: str, fake: Callable[..., Any]) -> Any:
    LIBRARY.define(f"{name}{schema}")
    torch.library.register_fake(f"fastmmkd::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.fastmmkd, name).default


def differentiate(op: Any, apply: Callable[..., Any]) -> None:
    """Let `apply(keyset, *args)` run where autograd watches `op`; it calls `below(op, keyset, ...)`."""

    def autograd(keyset: DispatchKeySet, *args: Any) -> Any:
        return apply(keyset & _after_autograd_keyset, *args)

    LIBRARY.impl(op, autograd, "Autograd", with_keyset=True)


def below(op: Any, keyset: DispatchKeySet, *args: Any) -> Any:
    with _AutoDispatchBelowAutograd():
        return op.redispatch(keyset, *args)


def _residual_layer_norm_fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


def _residual_layer_norm_backward_fake(
    grad: torch.Tensor,
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    grad_sum = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    grad_weight, grad_bias = (weight.new_empty(weight.shape) for _ in range(2))
    return grad_sum, grad_weight, grad_bias


_residual_layer_norm = define(
    "residual_layer_norm",
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> (Tensor out, Tensor mean, Tensor rstd)",
    _residual_layer_norm_fake,
)
_residual_layer_norm_backward = define(
    "residual_layer_norm_backward",
    "(Tensor grad, Tensor x, Tensor residual, Tensor weight, Tensor mean, Tensor rstd)"
    " -> (Tensor grad_sum, Tensor grad_weight, Tensor grad_bias)",
    _residual_layer_norm_backward_fake,
)


class _ResidualLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        keyset: DispatchKeySet,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        eps: float,
    ) -> Any:
        out, mean, rstd = below(_residual_layer_norm, keyset, x, residual, weight, bias, eps)
        ctx.save_for_backward(x, residual, weight, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.bias_dtype = bias.dtype
        return out, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> Any:
        if grad is None:
            return (None,) * 6
        x, residual, weight, mean, rstd = ctx.saved_tensors
        grad_sum, grad_weight, grad_bias = _residual_layer_norm_backward(grad, x, residual, weight, mean, rstd)
        return (
            None,
            grad_sum.to(x.dtype),
            grad_sum.to(residual.dtype),
            grad_weight.to(weight.dtype),
            grad_bias.to(ctx.bias_dtype),
            None,
        )


differentiate(_residual_layer_norm, _ResidualLayerNorm.apply)


def residual_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    """See `fastmmkd.ops.residual_layer_norm`; float32 and bfloat16 in any mixture."""
    return _residual_layer_norm(x, residual, weight, bias, eps)[0]


def _cross_attention_fake(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor],
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    groups, batch, queries, _ = query.shape
    return query.new_empty(query.shape), query.new_empty((groups, batch, heads, 2, queries), dtype=torch.float32)


def _cross_attention_backward_fake(
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


_cross_attention = define(
    "cross_attention",
    "(Tensor query, Tensor[] keys, Tensor[] values, Tensor[] key_masks, int heads) -> (Tensor out, Tensor statistics)",
    _cross_attention_fake,
)
_cross_attention_backward = define(
    "cross_attention_backward",
    "(Tensor grad, Tensor query, Tensor[] keys, Tensor[] values, Tensor[] key_masks, Tensor out, Tensor statistics,"
    " int heads) -> (Tensor grad_query, Tensor[] grad_keys, Tensor[] grad_values)",
    _cross_attention_backward_fake,
)


class _CrossAttention(torch.autograd.Function):
    """Autograd sees tensors only as arguments of their own, so the segments come one after another."""

    @staticmethod
    def forward(ctx: Any, keyset: DispatchKeySet, heads: int, query: torch.Tensor, *segments: torch.Tensor) -> Any:
        n = len(segments) // 3
        keys, values, masks = segments[:n], segments[n : 2 * n], segments[2 * n :]
        out, statistics = below(_cross_attention, keyset, query, keys, values, masks, heads)
        ctx.save_for_backward(query, out, statistics, *segments)
        ctx.mark_non_differentiable(statistics)
        ctx.set_materialize_grads(False)
        ctx.heads = heads
        return out, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, _: None) -> Any:
        query, out, statistics, *segments = ctx.saved_tensors
        if grad is None:
            return (None,) * (3 + len(segments))
        n = len(segments) // 3
        keys, values, masks = segments[:n], segments[n : 2 * n], segments[2 * n :]
        grad_query, grad_keys, grad_values = _cross_attention_backward(
            grad, query, keys, values, masks, out, statistics, ctx.heads
        )
        return None, None, grad_query, *grad_keys, *grad_values, *(None,) * n


differentiate(
    _cross_attention,
    lambda keyset, query, keys, values, key_masks, heads: _CrossAttention.apply(
        keyset, heads, query, *keys, *values, *key_masks
    ),
)


def cross_attention(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor],
    heads: int,
) -> torch.Tensor:
    """See `fastmmkd.ops.cross_attention`; float32 or bfloat16, one for all."""
    return _cross_attention(query, keys, values, key_masks, heads)[0]
