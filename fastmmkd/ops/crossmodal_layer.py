"""A whole layer of multi-grained crossmodal interaction (UMDF eqs. 7 to 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch._C import DispatchKeySet

from fastmmkd.ops import reference
from fastmmkd.ops.composition import CrossmodalWeights, Dropout, Steps, compose_crossmodal_layer
from fastmmkd.ops.cross_attention import attention_backward_work, attention_work, cross_attention
from fastmmkd.ops.declaration import below, declare, declare_backward, differentiable_gradients, differentiate
from fastmmkd.ops.dispatch import implementation
from fastmmkd.ops.grouped_linear import grouped_linear
from fastmmkd.ops.layout import Layout
from fastmmkd.ops.operation import Op
from fastmmkd.ops.precision import accumulation
from fastmmkd.ops.residual_layer_norm import norm_backward_work, norm_work, residual_layer_norm
from fastmmkd.ops.work import FLOAT, Work

MODALITIES = 3


def crossmodal_layer(
    streams: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    layout: Layout,
    heads: int,
    weights: CrossmodalWeights,
    eps: float = 1e-5,
) -> list[torch.Tensor]:
    """Of each target t, with attention CA over the keys of the modalities named and biases included:

    `C_t = LN(CA(Z_t; Z_L, Z_A, Z_V) + Z_t)`, `F_t = sum over s != t of LN(CA(C_t; Z_t, Z_s) + C_t)`,
    `H_t = LN(W_2 relu(W_1 F_t) + F_t)`.

    The C++ kernels compute in float32, whatever the dtype. Everywhere else, and under autocast, the layer is composed
    of `cross_attention`, `residual_layer_norm` and products.

    Args:
        streams: Z, of each of three modalities `[S, R, d]`, the rows of one layout.
        masks: of each `[S, R]` bool, True = the row may be attended to. Where a sample has none in any source, CA is 0.
        layout: whose rows they are.
        heads: a divisor of d.
        weights: of the streams' dtype.

    Returns:
        H, three times `[S, R, d]` in the streams' dtype. Rows of nobody are 0, and send gradient 0.

    Raises:
        ValueError: streams, masks, layout, heads and weights do not fit together.
    """
    x = streams[0]
    models, rows, d = x.shape
    if len(streams) != MODALITIES or len(masks) != MODALITIES:
        raise ValueError(f"{len(streams)} streams and {len(masks)} masks; expected {MODALITIES}")
    if heads < 1 or d % heads:
        raise ValueError(f"{heads} heads do not divide the width {d}")
    if layout.rows != rows or models % len(layout.starts):
        raise ValueError(
            f"streams are {tuple(x.shape)}; the layout has {layout.rows} rows of {len(layout.starts)} models"
        )
    for i, (stream, mask) in enumerate(zip(streams, masks, strict=True)):
        if stream.shape != x.shape or stream.dtype != x.dtype:
            raise ValueError(
                f"stream {i} is {tuple(stream.shape)} {stream.dtype}; the first is {tuple(x.shape)} {x.dtype}"
            )
        if mask.shape != (models, rows):
            raise ValueError(f"mask {i} is {tuple(mask.shape)}; expected {(models, rows)}")
    for name, weight in zip(CrossmodalWeights._fields, weights, strict=True):
        if weight.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
            raise ValueError(f"{name} is {weight.dtype}; streams are {x.dtype}")
    return implementation(OP, x)(streams, masks, layout, heads, weights, eps)


def _definition(
    streams: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    layout: Layout,
    heads: int,
    weights: CrossmodalWeights,
    eps: float = 1e-5,
) -> list[torch.Tensor]:
    steps = Steps(reference.cross_attention, reference.residual_layer_norm, reference.grouped_linear)
    z, wide = [accumulation(x) for x in streams], CrossmodalWeights(*map(accumulation, weights))
    made = compose_crossmodal_layer(steps, z, masks, layout, heads, wide, eps)
    return [x.to(stream.dtype) for x, stream in zip(made, streams, strict=True)]


def composed_crossmodal_layer(
    streams: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    layout: Layout,
    heads: int,
    weights: CrossmodalWeights,
    eps: float = 1e-5,
    dropouts: tuple[Dropout, ...] | None = None,
    crossmodal: bool = True,
) -> list[torch.Tensor]:
    """The same of other operations.

    Args:
        dropouts: of the results of coarse and fine attentions and of the feed-forward network, before their residual
            connections.
        crossmodal: False: every attention is a self-attention of its target.
    """
    steps = Steps(cross_attention, residual_layer_norm, grouped_linear)
    if dropouts is not None:
        steps = steps._replace(dropouts=dropouts)
    return compose_crossmodal_layer(steps, streams, masks, layout, heads, weights, eps, crossmodal)


def _fake(
    streams: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    starts: torch.Tensor,
    weights: Sequence[torch.Tensor],
    longest: int,
    heads: int,
    eps: float,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    x = streams[0]
    models, rows, d = x.shape
    targets = (models * 3, rows)
    shapes = [
        (3, models, rows, 15 * d),
        *((*targets, width) for width in (d, d, 2, d)),
        *((2, *targets, width) for width in (d, d, d, 2)),
        (9, models, heads, 2, rows),
        *((*targets, width) for width in (d, 4 * d, d, 2)),
    ]
    return [x.new_empty(x.shape) for x in streams], [x.new_empty(shape, dtype=torch.float32) for shape in shapes]


def _backward_fake(
    grads: Sequence[torch.Tensor],
    streams: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    starts: torch.Tensor,
    weights: Sequence[torch.Tensor],
    kept: Sequence[torch.Tensor],
    longest: int,
    heads: int,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    return [x.new_empty(x.shape) for x in streams], [weight.new_empty(weight.shape) for weight in weights]


_INPUTS = "Tensor[] streams, Tensor[] masks, Tensor starts, Tensor[] weights"
_declared = declare(
    "crossmodal_layer",
    f"({_INPUTS}, SymInt longest, int heads, float eps) -> (Tensor[] out, Tensor[] kept)",
    _fake,
)
"""Kept for the gradient, in float32: what the streams are multiplied to; of the coarse attentions what is attended, the
sum that is normalised with its mean and 1 / deviation, and their result; of the fine ones their queries and the same;
the statistics of all; F, the hidden units, and the last norm's sum with mean and 1 / deviation."""
_declared_backward = declare_backward(
    "crossmodal_layer",
    f"(Tensor[] grads, {_INPUTS}, Tensor[] kept, SymInt longest, int heads)"
    " -> (Tensor[] grad_streams, Tensor[] grad_weights)",
    _backward_fake,
)


class _Function(torch.autograd.Function):
    """Arguments: three streams, three masks, starts, and the weights."""

    @staticmethod
    def forward(ctx: Any, keyset: DispatchKeySet, longest: int, heads: int, eps: float, *tensors: torch.Tensor) -> Any:
        out, kept = below(_declared, keyset, tensors[:3], tensors[3:6], tensors[6], tensors[7:], longest, heads, eps)
        ctx.save_for_backward(*tensors, *kept)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.longest, ctx.heads, ctx.eps, ctx.inputs = longest, heads, eps, len(tensors)
        return *out, *kept

    @staticmethod
    def backward(ctx: Any, *of_outputs: torch.Tensor | None) -> Any:
        saved = ctx.saved_tensors
        grads = [torch.zeros_like(x) if g is None else g for g, x in zip(of_outputs[:3], saved[:3], strict=True)]
        tensors, kept = saved[: ctx.inputs], saved[ctx.inputs :]
        streams, masks, starts, weights = tensors[:3], tensors[3:6], tensors[6], tensors[7:]
        if torch.is_grad_enabled():
            layout = Layout.of(starts.diff(dim=1), streams[0].shape[1], ctx.longest)

            def definition(*inputs: torch.Tensor) -> torch.Tensor:
                of_weights = CrossmodalWeights(*inputs[3:])
                return torch.stack(_definition(inputs[:3], masks, layout, ctx.heads, of_weights, ctx.eps))

            wanted = *ctx.needs_input_grad[4:7], *ctx.needs_input_grad[11:]
            made = differentiable_gradients(definition, (*streams, *weights), wanted, torch.stack(grads))
            grad_streams, grad_weights = made[:3], made[3:]
        else:
            grad_streams, grad_weights = _declared_backward(
                grads, streams, masks, starts, weights, kept, ctx.longest, ctx.heads
            )
        return None, None, None, None, *grad_streams, None, None, None, None, *grad_weights


def _apply(
    keyset: DispatchKeySet,
    streams: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    starts: torch.Tensor,
    weights: Sequence[torch.Tensor],
    longest: int,
    heads: int,
    eps: float,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    made = _Function.apply(keyset, longest, heads, eps, *streams, *masks, starts, *weights)
    return list(made[:3]), list(made[3:])


differentiate(_declared, _apply)


def _compiled(
    streams: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    layout: Layout,
    heads: int,
    weights: CrossmodalWeights,
    eps: float,
) -> list[torch.Tensor]:
    if torch.is_autocast_enabled(streams[0].device.type):
        return composed_crossmodal_layer(streams, masks, layout, heads, weights, eps)
    out, _ = _declared(list(streams), list(masks), layout.starts, list(weights), layout.longest, heads, eps)
    return list(out)


def _work(g: int, t: Sequence[int], d: int, h: int, e: int) -> Work:
    """Of G models and samples with T frames each, R in all: `3 G R (2 D e + 1)` bytes of streams, results and masks,
    `G (60 D^2 + 48 D) e` of weights, and `4 G R (90 D + 18 H + 24)` of what is kept.

    Operations: those of three coarse attentions, six fine ones and twelve norms; `168 D^2` of products (9 of queries,
    21 of keys and values, 9 of what is attended, 3 feed-forward networks), `24 D` of biases and `3 D` of the sum of
    fine attentions for each of `G R` rows.
    """
    rows = g * sum(t)
    coarse = attention_work(3 * g, t, [3 * n for n in t], d, h, e).operations
    fine = attention_work(6 * g, t, [2 * n for n in t], d, h, e).operations
    norms = norm_work(12 * g, sum(t), d, e).operations
    return Work(
        3 * rows * (2 * d * e + 1) + g * (60 * d * d + 48 * d) * e + rows * FLOAT * (90 * d + 18 * h + 24),
        coarse + fine + norms + rows * (168 * d * d + 27 * d),
    )


def _backward_work(g: int, t: Sequence[int], d: int, h: int, e: int) -> Work:
    """`3 G R (3 D e + 1)` bytes of gradients, streams and masks, `2 G (60 D^2 + 48 D) e` of weights and their
    gradients, and what was kept.

    Operations: those of the attentions and norms; `336 D^2` of products, `24 D` of biases and `12 D` of residuals for
    each of `G R` rows.
    """
    rows = g * sum(t)
    coarse = attention_backward_work(3 * g, t, [3 * n for n in t], d, h, e).operations
    fine = attention_backward_work(6 * g, t, [2 * n for n in t], d, h, e).operations
    norms = norm_backward_work(12 * g, sum(t), d, e).operations
    return Work(
        3 * rows * (3 * d * e + 1) + 2 * g * (60 * d * d + 48 * d) * e + rows * FLOAT * (90 * d + 18 * h + 24),
        coarse + fine + norms + rows * (336 * d * d + 36 * d),
    )


OP = Op(
    "crossmodal_layer",
    _definition,
    ("cpp",),
    _compiled,
    composed=composed_crossmodal_layer,
    gradient="backward",
    work=_work,
    backward_work=_backward_work,
    place=40,
)
