"""How an operation is declared to PyTorch: its schema, its shapes, where its kernels are, its gradient.

A compiled operation is opaque: `torch.compile` sees one call forward and one backward. Its gradient is an
`autograd.Function` under the Autograd key. Under `create_graph=True` the gradient is computed by the definition in
place of the kernels, so that it can be differentiated again, as often as PyTorch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch._C import DispatchKeySet, _after_autograd_keyset, _AutoDispatchBelowAutograd  # type: ignore[attr-defined]

from fastmmkd.ops.dispatch import launch
from fastmmkd.ops.operation import backward_of
from fastmmkd.ops.providers import INTERPRETED

LIBRARY = torch.library.Library("fastmmkd", "DEF")


def declare(op: str, schema: str, fake: Callable[..., Any]) -> Any:
    """The compiled operation `op`. `fake` makes outputs of the right shapes and dtypes, without values.

    The extension registers the kernels for CPU tensors; for CUDA tensors `dispatch.launch` chooses some on every call.
    """
    return _declare(op, op, schema, fake)


def declare_backward(op: str, schema: str, fake: Callable[..., Any]) -> Any:
    """The compiled operation that computes the gradient of `op`."""
    return _declare(op, backward_of(op), schema, fake)


def _declare(op: str, function: str, schema: str, fake: Callable[..., Any]) -> Any:
    LIBRARY.define(f"{function}{schema}")
    torch.library.register_fake(f"fastmmkd::{function}", fake, lib=LIBRARY)
    LIBRARY.impl(function, partial(launch, op, function), "CPU" if INTERPRETED else "CUDA")
    return getattr(torch.ops.fastmmkd, function).default


def differentiate(declared: Any, apply: Callable[..., Any]) -> None:
    """Let `apply(keyset, *args)` run where autograd watches an operation; it calls `below(declared, keyset, ...)`."""

    def autograd(keyset: DispatchKeySet, *args: Any) -> Any:
        return apply(keyset & _after_autograd_keyset, *args)

    LIBRARY.impl(declared, autograd, "Autograd", with_keyset=True)


def below(declared: Any, keyset: DispatchKeySet, *args: Any) -> Any:
    """The kernels' results."""
    with _AutoDispatchBelowAutograd():
        return declared.redispatch(keyset, *args)


def differentiable_gradients(
    definition: Callable[..., torch.Tensor],
    inputs: Sequence[torch.Tensor],
    wanted: Sequence[bool],
    grad: torch.Tensor,
) -> list[torch.Tensor | None]:
    """Gradients of `sum(grad * definition(*inputs))` that can be differentiated themselves, by `inputs` and `grad`.

    For the backward pass under `create_graph=True`, which is when gradients are enabled in it.
    """
    # An alias of each input: with the inputs themselves, one that is computed from another would count twice.
    own = [x.view_as(x) if w else x for x, w in zip(inputs, wanted, strict=True)]
    with torch.autocast(grad.device.type, enabled=False):
        gradients = torch.autograd.grad(
            definition(*own), [x for x, w in zip(own, wanted, strict=True) if w], grad, create_graph=True
        )
    of_wanted = iter(gradients)
    return [next(of_wanted) if w else None for w in wanted]


class _DeclaredLoss(NamedTuple):
    """A loss `[G]` that is computed together with its gradients."""

    declared: Any
    inputs: int
    """Its first arguments, those that have gradients."""
    definition: Callable[..., torch.Tensor]


class _LossFunction(torch.autograd.Function):
    """Arguments: the inputs that have gradients, other tensors, anything else, and last `wanted`."""

    @staticmethod
    def forward(ctx: Any, keyset: DispatchKeySet, of: _DeclaredLoss, *args: Any) -> Any:
        loss, *grads = below(of.declared, keyset, *args)
        tensors = [x for x in args if isinstance(x, torch.Tensor)]
        ctx.save_for_backward(*grads, *tensors)
        ctx.mark_non_differentiable(*grads)
        ctx.set_materialize_grads(False)
        ctx.of, ctx.wanted, ctx.constants = of, args[-1], args[len(tensors) : -1]
        return loss, *grads

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, *_: None) -> Any:
        n, others = ctx.of.inputs, len(ctx.needs_input_grad) - 2 - ctx.of.inputs
        saved = ctx.saved_tensors
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled():
            inputs, constants = saved[n : 2 * n], (*saved[2 * n :], *ctx.constants)
            grads = differentiable_gradients(
                lambda *x: ctx.of.definition(*x, *constants), inputs, ctx.needs_input_grad[2 : 2 + n], grad
            )
        else:
            pairs = [(x, like.dtype) for x, like, w in zip(saved[:n], saved[n : 2 * n], ctx.wanted, strict=True) if w]
            scaled = iter(_scaled([x for x, _ in pairs], grad, [dtype for _, dtype in pairs]))
            grads = [next(scaled) if wanted else None for wanted in ctx.wanted]
        return None, None, *grads, *(None,) * others


def _scaled(xs: list[torch.Tensor], grad: torch.Tensor, dtypes: list[torch.dtype]) -> Sequence[torch.Tensor]:
    """x `[G, ...]` times grad `[G]`, of each; one kernel multiplies and converts."""
    of_axes = {axes: grad.view(-1, *(1,) * (axes - 1)) for axes in {x.dim() for x in xs}}
    grads = [of_axes[x.dim()] for x in xs]
    if all(dtype == torch.float32 for dtype in dtypes):
        return torch._foreach_mul(xs, grads)  # type: ignore[attr-defined]
    scaled = zip(xs, grads, dtypes, strict=True)
    return [torch.mul(x, factor, out=torch.empty_like(x, dtype=dtype)) for x, factor, dtype in scaled]


def declare_loss(op: str, schema: str, inputs: int, definition: Callable[..., torch.Tensor]) -> Any:
    """The compiled operation of a loss, which since they cost little there also computes the gradients that are wanted.

    Args:
        op: its name.
        schema: the first `inputs` arguments have gradients, other tensors follow, the last is `bool[] wanted`; it
            returns the loss `[G]` in float32 and for each input the gradient for an upstream gradient of 1, in
            float32 and empty where it is not wanted.
        inputs: how many.
        definition: the reference, with the arguments of the schema but `wanted`.
    """

    def fake(*args: Any) -> tuple[torch.Tensor, ...]:
        loss = args[0].new_empty(args[0].shape[:1], dtype=torch.float32)
        shapes = (x.shape if wanted else (0,) for x, wanted in zip(args[:inputs], args[-1], strict=True))
        return loss, *(loss.new_empty(shape) for shape in shapes)

    of = _DeclaredLoss(declare(op, schema, fake), inputs, definition)

    def apply(keyset: DispatchKeySet, *args: Any) -> Any:
        return _LossFunction.apply(keyset, of, *args) if any(args[-1]) else below(of.declared, keyset, *args)

    differentiate(of.declared, apply)
    return of.declared


def wanted(*inputs: torch.Tensor) -> list[bool]:
    """Which of a loss' inputs its gradients are wanted of."""
    return [torch.is_grad_enabled() and x.requires_grad for x in inputs]
