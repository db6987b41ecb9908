"""`LN(x + r)`, the join of every residual block."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch._C import DispatchKeySet

from fastmmkd.ops.declaration import below, declare, declare_backward, differentiable_gradients, differentiate
from fastmmkd.ops.dispatch import implementation
from fastmmkd.ops.operation import Op
from fastmmkd.ops.precision import accumulation
from fastmmkd.ops.work import FLOAT, Work


def residual_layer_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    """Layer normalisation of `x + residual` over the last axis, with one affine map per group.

    Args:
        x, residual: `[G, ..., d]`, the same shape; the sum is taken in fp32 or better.
        weight, bias: `[G, d]`.

    Returns:
        `[G, ..., d]` in x's dtype.

    Raises:
        ValueError: shapes that do not fit.
    """
    if x.shape != residual.shape:
        raise ValueError(f"x is {tuple(x.shape)}, residual is {tuple(residual.shape)}; expected the same shape")
    if x.dim() < 2:
        raise ValueError(f"x is {tuple(x.shape)}; expected [G, ..., d]")
    for name, of_group in (("weight", weight), ("bias", bias)):
        if of_group.shape != (x.shape[0], x.shape[-1]):
            raise ValueError(f"{name} is {tuple(of_group.shape)}; expected {(x.shape[0], x.shape[-1])}")
    return implementation(OP, x, residual, weight, bias)(x, residual, weight, bias, eps)


def _definition(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-5
) -> torch.Tensor:
    shape = (weight.shape[0],) + (1,) * (x.dim() - 2) + (weight.shape[-1],)
    normed = F.layer_norm(accumulation(x) + accumulation(residual), x.shape[-1:], eps=eps)
    return (normed * accumulation(weight).view(shape) + accumulation(bias).view(shape)).to(x.dtype)


def _fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return x.new_empty(x.shape), mean, rstd


def _backward_fake(
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


_declared = declare(
    "residual_layer_norm",
    "(Tensor x, Tensor residual, Tensor weight, Tensor bias, float eps) -> (Tensor out, Tensor mean, Tensor rstd)",
    _fake,
)
_declared_backward = declare_backward(
    "residual_layer_norm",
    "(Tensor grad, Tensor x, Tensor residual, Tensor weight, Tensor mean, Tensor rstd)"
    " -> (Tensor grad_sum, Tensor grad_weight, Tensor grad_bias)",
    _backward_fake,
)


class _Function(torch.autograd.Function):
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
        out, mean, rstd = below(_declared, keyset, x, residual, weight, bias, eps)
        ctx.save_for_backward(x, residual, weight, bias, mean, rstd)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        ctx.eps = eps
        return out, mean, rstd

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> Any:
        if grad is None:
            return (None,) * 6
        x, residual, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs, definition = (x, residual, weight, bias), partial(_definition, eps=ctx.eps)
            return None, *differentiable_gradients(definition, inputs, ctx.needs_input_grad[1:5], grad), None
        grad_sum, grad_weight, grad_bias = _declared_backward(grad, x, residual, weight, mean, rstd)
        return (
            None,
            grad_sum.to(x.dtype),
            grad_sum.to(residual.dtype),
            grad_weight.to(weight.dtype),
            grad_bias.to(bias.dtype),
            None,
        )


differentiate(_declared, _Function.apply)


def _compiled(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float
) -> torch.Tensor:
    return _declared(x, residual, weight, bias, eps)[0]


def norm_work(g: int, r: int, d: int, e: int) -> Work:
    """`G (3 R D e + 2 D e + 8 R)` bytes: x, residual, out, the affine map, mean and 1 / deviation.

    `G R (8 D + 5)` operations: sum, mean, centre, square and add, scale, affine map; two divisions, eps, root, inverse.
    """
    return Work(g * (3 * r * d * e + 2 * d * e + 2 * FLOAT * r), g * r * (8 * d + 5))


def norm_backward_work(g: int, r: int, d: int, e: int) -> Work:
    """`G (4 R D e + 3 D e + 8 R)` bytes: grad, x, residual, gradient of their sum; weight, its and the bias'
    gradients; statistics.

    `G R (14 D + 2)` operations: the normalised x 3, gradients of weight 2 and bias 1, times weight 1, two means 3,
    what they take away and the scale 4; two divisions.
    """
    return Work(g * (4 * r * d * e + 3 * d * e + 2 * FLOAT * r), g * r * (14 * d + 2))


OP = Op(
    "residual_layer_norm",
    _definition,
    ("triton", "cuda", "cpp"),
    _compiled,
    gradient="backward",
    work=norm_work,
    backward_work=norm_backward_work,
    place=20,
)
