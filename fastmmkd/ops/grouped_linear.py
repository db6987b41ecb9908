"""Linear maps of groups that have weights of their own."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch._C import DispatchKeySet

from fastmmkd.ops.declaration import below, declare, declare_backward, differentiable_gradients, differentiate
from fastmmkd.ops.dispatch import implementation
from fastmmkd.ops.operation import Op
from fastmmkd.ops.work import Work


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, relu: bool = False
) -> torch.Tensor:
    """`x W + b` per group, or `relu(x W + b)`.

    The C++ and Triton kernels add up in float32, whatever the dtype. Everywhere else, and under autocast, these are
    PyTorch's products.

    Args:
        x: `[G, ..., n]`, or `[*groups, ..., n]`.
        weight: `[*groups, n, m]` of x's dtype, with any group axes whose sizes multiply to G.
        bias: `[*groups, m]`.
        relu: needs a bias.

    Returns:
        x's shape with m for n.

    Raises:
        ValueError: x, weight and bias do not fit together.
    """
    groups = weight.shape[:-2]
    if x.shape[-1] != weight.shape[-2] or (x.shape[0] != math.prod(groups) and x.shape[: len(groups)] != groups):
        sizes = f"x is {tuple(x.shape)}, weight is {tuple(weight.shape)}"
        raise ValueError(f"{sizes}; expected [G, ..., n] and [*groups, n, m]")
    if bias is not None and bias.shape != (*weight.shape[:-2], weight.shape[-1]):
        raise ValueError(f"bias is {tuple(bias.shape)}, weight is {tuple(weight.shape)}")
    if relu and bias is None:
        raise ValueError("relu needs a bias")
    if torch.is_autocast_enabled(x.device.type):
        return _definition(x, weight, bias, relu)
    return implementation(OP, x, weight)(x, weight, bias, relu)


def _definition(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, relu: bool = False
) -> torch.Tensor:
    groups = math.prod(weight.shape[:-2])
    rows = x if x.dim() == 3 and len(x) == groups else x.reshape(groups, math.prod(x.shape[:-1]) // groups, x.shape[-1])
    weight = weight if weight.dim() == 3 else weight.flatten(0, -3)
    if bias is None:
        y = torch.bmm(rows, weight)
    else:
        y = torch.baddbmm((bias if bias.dim() == 2 else bias.flatten(0, -2)).unsqueeze(1), rows, weight)
    y = y.relu() if relu else y
    return y if y.shape[:-1] == x.shape[:-1] else y.view(*x.shape[:-1], weight.shape[-1])


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, relu: bool) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[-1]))


def _backward_fake(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, relu: bool, wanted: list[bool]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    bias = *weight.shape[:-2], weight.shape[-1]
    return (
        x.new_empty(x.shape if wanted[0] else (0,)),
        weight.new_empty(weight.shape if wanted[1] else (0,)),
        weight.new_empty(bias if relu or wanted[2] else (0,)),
    )


_declared = declare("grouped_linear", "(Tensor x, Tensor weight, Tensor? bias, bool relu) -> Tensor", _fake)
_declared_backward = declare_backward(
    "grouped_linear",
    "(Tensor grad, Tensor x, Tensor weight, Tensor out, bool relu, bool[3] wanted)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _backward_fake,
)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        keyset: DispatchKeySet,
        relu: bool,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> Any:
        out = below(_declared, keyset, x, weight, bias, relu)
        ctx.save_for_backward(x, weight, bias, out if relu else None)
        ctx.relu = relu
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        x, weight, bias, out = ctx.saved_tensors
        wanted = list(ctx.needs_input_grad[2:])
        if torch.is_grad_enabled():
            inputs = [x, weight] if bias is None else [x, weight, bias]
            definition = partial(_definition, relu=ctx.relu)
            grads = differentiable_gradients(definition, inputs, wanted[: len(inputs)], grad)
            return None, None, *grads, *(None,) * (3 - len(grads))
        grads = _declared_backward(grad, x, weight, x if out is None else out, ctx.relu, wanted)
        return None, None, *(x if is_wanted else None for x, is_wanted in zip(grads, wanted, strict=True))


differentiate(_declared, lambda keyset, x, weight, bias, relu: _Function.apply(keyset, relu, x, weight, bias))


def _work(g: int, r: int, n: int, m: int, e: int) -> Work:
    """`G (R (N + M) + N M + M) e` bytes: x, out, weight and bias. `G R (2 N M + M)` operations."""
    return Work(g * (r * (n + m) + n * m + m) * e, g * r * (2 * n * m + m))


def _backward_work(g: int, r: int, n: int, m: int, e: int) -> Work:
    """`G (R (2 M + 2 N) + 2 N M + M) e` bytes: grad, out, x and its gradient; weight, its and the bias' gradients.

    `G R (4 N M + M)` operations: two products and the sum of grad.
    """
    return Work(g * (r * (2 * m + 2 * n) + 2 * n * m + m) * e, g * r * (4 * n * m + m))


OP = Op(
    "grouped_linear",
    _definition,
    ("triton", "cpp"),
    _declared,
    composed=_definition,
    gradient="backward",
    work=_work,
    backward_work=_backward_work,
    place=33,
)
