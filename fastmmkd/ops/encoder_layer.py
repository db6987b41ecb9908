"""A whole layer of a transformer encoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._C import DispatchKeySet

from fastmmkd.ops import reference
from fastmmkd.ops.composition import Dropout, EncoderWeights, Steps, compose_encoder_layer
from fastmmkd.ops.cross_attention import attention_backward_work, attention_work, cross_attention
from fastmmkd.ops.declaration import below, declare, declare_backward, differentiable_gradients, differentiate
from fastmmkd.ops.dispatch import implementation
from fastmmkd.ops.grouped_linear import grouped_linear
from fastmmkd.ops.layout import Layout
from fastmmkd.ops.operation import Op
from fastmmkd.ops.precision import accumulation
from fastmmkd.ops.residual_layer_norm import norm_backward_work, norm_work, residual_layer_norm
from fastmmkd.ops.work import FLOAT, Work


def encoder_layer(
    x: torch.Tensor, mask: torch.Tensor, layout: Layout, heads: int, weights: EncoderWeights, eps: float = 1e-5
) -> torch.Tensor:
    """`X = LN(X + SA(X) W_o)`, `X = LN(X + W_2 relu(W_1 X))` (Vaswani et al. 2017, post-norm), biases included.

    The C++ kernels compute in float32, whatever the dtype. Everywhere else, and under autocast, the layer is composed
    of `cross_attention`, `residual_layer_norm` and `grouped_linear`.

    Args:
        x: `[G, R, d]`, the rows of `layout`.
        mask: `[M, R]` bool, M a divisor of G, True = the row may be attended to. A row whose sample has none attends
            to nothing: SA is 0 there.
        layout: whose rows they are, of S models, S a divisor of G.
        heads: a divisor of d.
        weights: of x's dtype, each with any group axes whose sizes multiply to G.

    Returns:
        `[G, R, d]` in x's dtype. Rows of nobody are 0, and send gradient 0.

    Raises:
        ValueError: x, mask, layout, heads and weights do not fit together.
    """
    groups, rows, d = x.shape
    if heads < 1 or d % heads:
        raise ValueError(f"{heads} heads do not divide the width {d}")
    if layout.rows != rows or groups % len(layout.starts):
        raise ValueError(f"x is {tuple(x.shape)}; the layout has {layout.rows} rows of {len(layout.starts)} models")
    if mask.dim() != 2 or mask.shape[1] != rows or not len(mask) or groups % len(mask):
        raise ValueError(f"mask is {tuple(mask.shape)}; expected {(groups, rows)}, or a divisor of {groups}")
    for name, weight in zip(EncoderWeights._fields, weights, strict=True):
        if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{name} is {weight.dtype}; x is {x.dtype}")
    return implementation(OP, x)(x, mask, layout, heads, weights, eps)


def _definition(
    x: torch.Tensor, mask: torch.Tensor, layout: Layout, heads: int, weights: EncoderWeights, eps: float = 1e-5
) -> torch.Tensor:
    steps = Steps(reference.cross_attention, reference.residual_layer_norm, reference.grouped_linear)
    wide = EncoderWeights(*map(accumulation, weights))
    return compose_encoder_layer(steps, accumulation(x), mask, layout, heads, wide, eps).to(x.dtype)


def composed_encoder_layer(
    x: torch.Tensor,
    mask: torch.Tensor,
    layout: Layout,
    heads: int,
    weights: EncoderWeights,
    eps: float = 1e-5,
    dropouts: Sequence[Dropout] | None = None,
) -> torch.Tensor:
    """The same of other operations, with dropouts of the results of both halves before their residual connections."""
    steps = Steps(cross_attention, residual_layer_norm, grouped_linear)
    if dropouts is not None:
        steps = steps._replace(dropouts=tuple(dropouts))
    return compose_encoder_layer(steps, x, mask, layout, heads, weights, eps)


def _fake(
    x: torch.Tensor,
    mask: torch.Tensor,
    starts: torch.Tensor,
    weights: Sequence[torch.Tensor],
    longest: int,
    heads: int,
    eps: float,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    groups, rows, d = x.shape

    def kept(*shape: int) -> torch.Tensor:
        return x.new_empty(shape, dtype=torch.float32)

    return x.new_empty(x.shape), [
        kept(groups, rows, 3 * d),
        kept(groups, rows, d),
        kept(groups, heads, 2, rows),
        *(kept(groups, rows, width) for width in (d, 2, d, 4 * d, d, 2)),
    ]


def _backward_fake(
    grad: torch.Tensor,
    x: torch.Tensor,
    mask: torch.Tensor,
    starts: torch.Tensor,
    weights: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor],
    longest: int,
    heads: int,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    return x.new_empty(x.shape), [weight.new_empty(weight.shape) for weight in weights]


_INPUTS = "Tensor x, Tensor mask, Tensor starts, Tensor[] weights"
_declared = declare(
    "encoder_layer", f"({_INPUTS}, SymInt longest, int heads, float eps) -> (Tensor out, Tensor[] kept)", _fake
)
"""Kept for the gradient, in float32: queries, keys and values; what is attended; its statistics; per half, the sum that
is normalised with its mean and 1 / deviation; between them, the first half's result and the hidden units."""
_declared_backward = declare_backward(
    "encoder_layer",
    f"(Tensor grad, {_INPUTS}, Tensor[] kept, SymInt longest, int heads) -> (Tensor grad_x, Tensor[] grad_weights)",
    _backward_fake,
)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        keyset: DispatchKeySet,
        longest: int,
        heads: int,
        eps: float,
        x: torch.Tensor,
        mask: torch.Tensor,
        starts: torch.Tensor,
        *weights: torch.Tensor,
    ) -> Any:
        out, kept = below(_declared, keyset, x, mask, starts, weights, longest, heads, eps)
        ctx.save_for_backward(x, mask, starts, *weights, *kept)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.longest, ctx.heads, ctx.eps, ctx.weights = longest, heads, eps, len(weights)
        return out, *kept

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> Any:
        if grad is None:
            return (None,) * (7 + ctx.weights)
        x, mask, starts, *others = ctx.saved_tensors
        weights, kept = others[: ctx.weights], others[ctx.weights :]
        if torch.is_grad_enabled():
            layout = Layout.of(starts.diff(dim=1), x.shape[1], ctx.longest)

            def definition(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
                return _definition(x, mask, layout, ctx.heads, EncoderWeights(*weights), ctx.eps)

            wanted = ctx.needs_input_grad[4], *ctx.needs_input_grad[7:]
            grad_x, *grads = differentiable_gradients(definition, (x, *weights), wanted, grad)
        else:
            grad_x, grads = _declared_backward(grad, x, mask, starts, weights, kept, ctx.longest, ctx.heads)
        return None, None, None, None, grad_x, None, None, *grads


def _apply(
    keyset: DispatchKeySet,
    x: torch.Tensor,
    mask: torch.Tensor,
    starts: torch.Tensor,
    weights: Sequence[torch.Tensor],
    longest: int,
    heads: int,
    eps: float,
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    out, *kept = _Function.apply(keyset, longest, heads, eps, x, mask, starts, *weights)
    return out, kept


differentiate(_declared, _apply)


def _compiled(
    x: torch.Tensor, mask: torch.Tensor, layout: Layout, heads: int, weights: EncoderWeights, eps: float
) -> torch.Tensor:
    if torch.is_autocast_enabled(x.device.type):
        return composed_encoder_layer(x, mask, layout, heads, weights, eps)
    return _declared(x, mask, layout.starts, list(weights), layout.longest, heads, eps)[0]


def _work(g: int, t: Sequence[int], d: int, h: int, e: int) -> Work:
    """Of samples with T frames each, R in all: `G R (2 D e + 1)` bytes of x, out and mask, `G (12 D^2 + 10 D) e` of
    weights, and `4 G R (11 D + 2 H + 4)` of what is kept.

    Operations: those of attention and of two norms; `24 D^2` of products and `6 D` of biases for each of `G R` rows.
    """
    rows = g * sum(t)
    attention = attention_work(g, t, t, d, h, e).operations
    norms = 2 * norm_work(g, sum(t), d, e).operations
    return Work(
        rows * (2 * d * e + 1) + g * (12 * d * d + 10 * d) * e + rows * FLOAT * (11 * d + 2 * h + 4),
        attention + norms + rows * (24 * d * d + 6 * d),
    )


def _backward_work(g: int, t: Sequence[int], d: int, h: int, e: int) -> Work:
    """`G R (3 D e + 1)` bytes of grad, x, its gradient and mask, `2 G (12 D^2 + 10 D) e` of weights and their
    gradients, and what was kept.

    Operations: those of attention and of two norms; `48 D^2` of products, `6 D` of biases and `2 D` of residuals for
    each of `G R` rows.
    """
    rows = g * sum(t)
    attention = attention_backward_work(g, t, t, d, h, e).operations
    norms = 2 * norm_backward_work(g, sum(t), d, e).operations
    return Work(
        rows * (3 * d * e + 1) + 2 * g * (12 * d * d + 10 * d) * e + rows * FLOAT * (11 * d + 2 * h + 4),
        attention + norms + rows * (48 * d * d + 8 * d),
    )


OP = Op(
    "encoder_layer",
    _definition,
    ("cpp",),
    _compiled,
    composed=composed_encoder_layer,
    gradient="backward",
    work=_work,
    backward_work=_backward_work,
    place=30,
)
