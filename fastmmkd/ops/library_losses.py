"""The compiled losses as PyTorch sees them; `fastmmkd.ops.library` has the other operations.

An operation returns its loss `[G]` in float32 and, since they cost little where the loss is computed, the gradients of
the inputs that `wanted` names: in float32, for an upstream gradient of 1. The gradient of another input is empty.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._C import DispatchKeySet
from torch.autograd.function import once_differentiable

from fastmmkd.ops.library import below, define, differentiate


class _Loss(torch.autograd.Function):
    """Arguments: the inputs that have gradients, anything else, and last `wanted`."""

    @staticmethod
    def forward(ctx: Any, keyset: DispatchKeySet, op: Any, *args: Any) -> Any:
        loss, *grads = below(op, keyset, *args)
        ctx.save_for_backward(*grads)
        ctx.mark_non_differentiable(*grads)
        ctx.set_materialize_grads(False)
        ctx.wanted = args[-1]
        ctx.dtypes = [x.dtype for x in args[: len(grads)]]
        ctx.others = len(args) - len(grads)
        return loss, *grads

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> Any:
        def scaled(wanted: bool, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
            if grad is None or not wanted:
                return None
            # One kernel multiplies and converts.
            return torch.mul(grad.view(-1, *(1,) * (x.dim() - 1)), x, out=torch.empty_like(x, dtype=dtype))

        grads = (scaled(*of_input) for of_input in zip(ctx.wanted, ctx.saved_tensors, ctx.dtypes, strict=True))
        return None, None, *grads, *(None,) * ctx.others


def _define_loss(name: str, schema: str, inputs: int) -> Any:
    """An operation whose first `inputs` arguments have gradients."""

    def fake(*args: Any) -> tuple[torch.Tensor, ...]:
        loss = args[0].new_empty(args[0].shape[:1], dtype=torch.float32)
        shapes = (x.shape if wanted else (0,) for x, wanted in zip(args[:inputs], args[-1], strict=True))
        return loss, *(loss.new_empty(shape) for shape in shapes)

    op = define(name, schema, fake)

    def apply(keyset: DispatchKeySet, *args: Any) -> Any:
        return _Loss.apply(keyset, op, *args) if any(args[-1]) else below(op, keyset, *args)

    differentiate(op, apply)
    return op


def _wanted(*inputs: torch.Tensor) -> list[bool]:
    return [torch.is_grad_enabled() and x.requires_grad for x in inputs]


_pairwise_contrastive = _define_loss(
    "pairwise_contrastive",
    "(Tensor student, Tensor teacher, float eta, int offset, bool mean, bool[2] wanted)"
    " -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
    2,
)


def pairwise_contrastive(
    student: torch.Tensor, teacher: torch.Tensor, eta: float, offset: int, reduction: str
) -> torch.Tensor:
    """See `fastmmkd.ops.pairwise_contrastive`."""
    wanted = _wanted(student, teacher)
    return _pairwise_contrastive(student, teacher, eta, offset, reduction == "mean", wanted)[0]


_jsd_mutual_information = _define_loss(
    "jsd_mutual_information",
    "(Tensor left, Tensor right, Tensor weight, Tensor bias, bool[4] wanted)"
    " -> (Tensor loss, Tensor grad_left, Tensor grad_right, Tensor grad_weight, Tensor grad_bias)",
    4,
)


def jsd_mutual_information(
    left: torch.Tensor, right: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """See `fastmmkd.ops.jsd_mutual_information`."""
    return _jsd_mutual_information(left, right, weight, bias, _wanted(left, right, weight, bias))[0]


_gaussian_mmd = _define_loss(
    "gaussian_mmd", "(Tensor x, Tensor y, bool[2] wanted) -> (Tensor loss, Tensor grad_x, Tensor grad_y)", 2
)


def gaussian_mmd(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """See `fastmmkd.ops.gaussian_mmd`."""
    return _gaussian_mmd(x, y, _wanted(x, y))[0]


_prototype_similarity = _define_loss(
    "prototype_similarity",
    "(Tensor student, Tensor teacher, Tensor classes, int count, bool[2] wanted)"
    " -> (Tensor loss, Tensor grad_student, Tensor grad_teacher)",
    2,
)


def prototype_similarity(
    student: torch.Tensor, teacher: torch.Tensor, classes: torch.Tensor, count: int
) -> torch.Tensor:
    """See `fastmmkd.ops.prototype_similarity`."""
    return _prototype_similarity(student, teacher, classes, count, _wanted(student, teacher))[0]


_js_divergence = _define_loss(
    "js_divergence",
    "(Tensor logits_a, Tensor logits_b, bool[2] wanted) -> (Tensor loss, Tensor grad_a, Tensor grad_b)",
    2,
)


def js_divergence(logits_a: torch.Tensor, logits_b: torch.Tensor) -> torch.Tensor:
    """See `fastmmkd.ops.js_divergence`."""
    return _js_divergence(logits_a, logits_b, _wanted(logits_a, logits_b))[0]
