"""Convolutions over the frames of ragged batches."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch._C import DispatchKeySet

from fastmmkd.ops.declaration import below, declare, declare_backward, differentiable_gradients, differentiate
from fastmmkd.ops.dispatch import implementation
from fastmmkd.ops.grouped_linear import grouped_linear
from fastmmkd.ops.layout import Layout, pack, unpack
from fastmmkd.ops.operation import Op
from fastmmkd.ops.work import Work


def temporal_convolution(x: torch.Tensor, layout: Layout, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """`Conv1d` over time with kernel 3 and padding 1: of the frame before, itself and the one after; a sample begins
    and ends with zeros.

    The C++ kernels compute in float32, whatever the dtype. Everywhere else, and under autocast, it is a product of
    windows.

    Args:
        x: `[S, R, n]`, the rows of `layout`.
        layout: whose they are. Rows of nobody count as one more sample.
        weight: `[S, 3 n, m]` of x's dtype: of the frame before, of itself, of the one after.
        bias: `[S, m]`.

    Returns:
        `[S, R, m]`.

    Raises:
        ValueError: x, layout, weight and bias do not fit together.
    """
    models, rows, n = x.shape
    if layout.rows != rows or models % len(layout.starts):
        raise ValueError(f"x is {tuple(x.shape)}; the layout has {layout.rows} rows of {len(layout.starts)} models")
    if weight.shape[:2] != (models, 3 * n):
        raise ValueError(f"weight is {tuple(weight.shape)}; x {tuple(x.shape)} needs {(models, 3 * n)} and a width")
    if bias.shape != (models, weight.shape[2]):
        raise ValueError(f"bias is {tuple(bias.shape)}; expected {(models, weight.shape[2])}")
    if torch.is_autocast_enabled(x.device.type):
        return _definition(x, layout, weight, bias)
    return implementation(OP, x, weight)(x, layout, weight, bias)


def temporal_windows(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Each row with its sample's rows before and after it, zero beyond the ends: `[S, R, n]` -> `[S, R, 3 n]`."""
    if layout.is_uniform:
        return pack(F.pad(unpack(x, layout), (0, 0, 1, 1)).unfold(-2, 3, 1).transpose(-1, -2).flatten(-2), layout)
    follows = (layout.sample[:, 1:] == layout.sample[:, :-1]).unsqueeze(-1)
    before = F.pad(x[:, :-1] * follows, (0, 0, 1, 0))
    after = F.pad(x[:, 1:] * follows, (0, 0, 0, 1))
    return torch.cat((before, x, after), dim=-1)


def _definition(x: torch.Tensor, layout: Layout, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.baddbmm(bias.unsqueeze(1), temporal_windows(x, layout), weight)


def _composed(x: torch.Tensor, layout: Layout, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return grouped_linear(_gathered_windows(x, layout), weight, bias)


def _gathered_windows(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The same as `temporal_windows`, of features, which have no gradient: one gather."""
    if layout.is_uniform or x.requires_grad or len(x) != len(layout.sample):
        return temporal_windows(x, layout)
    row, is_row = layout.neighbours
    windows = x.flatten(0, 1).index_select(0, row.flatten()).view(*row.shape, -1)
    return (windows * is_row.to(x.dtype).unsqueeze(-1)).flatten(2)


def _fake(x: torch.Tensor, starts: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return x.new_empty((*x.shape[:2], weight.shape[2]))


def _backward_fake(
    grad: torch.Tensor, x: torch.Tensor, starts: torch.Tensor, weight: torch.Tensor, wants_x: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        x.new_empty(x.shape if wants_x else (0,)),
        weight.new_empty(weight.shape),
        weight.new_empty((weight.shape[0], weight.shape[2])),
    )


_declared = declare("temporal_convolution", "(Tensor x, Tensor starts, Tensor weight, Tensor bias) -> Tensor", _fake)
_declared_backward = declare_backward(
    "temporal_convolution",
    "(Tensor grad, Tensor x, Tensor starts, Tensor weight, bool wants_x)"
    " -> (Tensor grad_x, Tensor grad_weight, Tensor grad_bias)",
    _backward_fake,
)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        keyset: DispatchKeySet,
        x: torch.Tensor,
        starts: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
    ) -> Any:
        ctx.save_for_backward(x, starts, weight, bias)
        return below(_declared, keyset, x, starts, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        x, starts, weight, bias = ctx.saved_tensors
        wants_x, _, *wanted = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            layout = Layout.of(starts.diff(dim=1), x.shape[1], x.shape[1])

            def definition(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
                return _definition(x, layout, weight, bias)

            grads = differentiable_gradients(definition, (x, weight, bias), (wants_x, *wanted), grad)
            return None, grads[0], None, *grads[1:]
        grad_x, *grads = _declared_backward(grad, x, starts, weight, wants_x)
        return None, grad_x if wants_x else None, None, *grads


differentiate(_declared, _Function.apply)


def _compiled(x: torch.Tensor, layout: Layout, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return _declared(x, layout.starts, weight, bias)


def _work(s: int, r: int, n: int, m: int, e: int) -> Work:
    """`S (R (N + M) + 3 N M + M) e` bytes: x, out, weight and bias. `S R (6 N M + M)` operations."""
    return Work(s * (r * (n + m) + 3 * n * m + m) * e, s * r * (6 * n * m + m))


def _backward_work(s: int, r: int, n: int, m: int, e: int) -> Work:
    """`S (R (M + 2 N) + 6 N M + M) e` bytes: grad, x and its gradient; weight, its and the bias' gradients.

    `S R (12 N M + M)` operations: two products and the sum of grad.
    """
    return Work(s * (r * (m + 2 * n) + 6 * n * m + m) * e, s * r * (12 * n * m + m))


OP = Op(
    "temporal_convolution",
    _definition,
    ("cpp",),
    _compiled,
    composed=_composed,
    gradient="backward",
    work=_work,
    backward_work=_backward_work,
    place=36,
)
