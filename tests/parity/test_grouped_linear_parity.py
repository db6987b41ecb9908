"""Linear maps of groups: the compiled kernels against the fp64 reference."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from fastmmkd.ops import grouped_linear, reference, use_provider
from fastmmkd.testing.layers import draw_linear
from fastmmkd.testing.parity import (
    DTYPES,
    INSTRUCTION_SETS,
    PROVIDER,
    assert_as_exact,
    instruction_set,
    needs,
    poisoned_memory,
    value_and_gradients,
)

pytestmark = needs("grouped_linear")

NAMES = ("out", "grad x", "grad weight", "grad bias")
SHAPES = [
    ((1,), (1,), 1, 1),
    ((3,), (130,), 40, 160),
    ((2, 3), (70,), 12, 7),
    ((2,), (3, 3, 5), 40, 20),
    ((1,), (640,), 300, 120),
    ((2,), (0,), 4, 3),
]
"""Group axes, rows, and widths in and out."""


def fast(*inputs: torch.Tensor, relu: bool = False) -> torch.Tensor:
    with use_provider(PROVIDER):
        return grouped_linear(*inputs, relu=relu)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_plain_pytorch(shape, biased, relu, dtype, isa) -> None:
    if relu and not biased:
        with pytest.raises(ValueError, match="relu needs a bias"):
            fast(*draw_linear(*shape, dtype)[0][:2], relu=True)
        return
    inputs, grad = draw_linear(*shape, dtype)
    inputs = inputs if biased else inputs[:2]
    with instruction_set(isa), poisoned_memory():
        actual = value_and_gradients(partial(fast, relu=relu), inputs, grad)
    definition = partial(reference.grouped_linear, relu=relu)
    plain = value_and_gradients(definition, inputs, grad)
    exact = value_and_gradients(definition, [x.double() for x in inputs], grad)
    for name, *values in zip(NAMES, actual, plain, exact, strict=False):
        assert_as_exact(name, *values, 3, 10.0)


def test_only_what_is_wanted_is_computed() -> None:
    (x, weight, bias), grad = draw_linear((3,), (130,), 40, 20)
    expected = value_and_gradients(fast, [x, weight, bias], grad)
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        leaves = [t.clone().requires_grad_(w) for t, w in zip((x, weight, bias), wanted, strict=True)]
        fast(*leaves).backward(grad)
        for leaf, w, value in zip(leaves, wanted, expected[1:], strict=True):
            assert torch.equal(leaf.grad, value) if w else leaf.grad is None


def test_what_does_not_fit_together_is_refused() -> None:
    (x, weight, bias), _ = draw_linear((3,), (5,), 4, 2)
    with pytest.raises(ValueError, match=r"x is \(3, 5, 3\), weight is \(3, 4, 2\); expected"):
        grouped_linear(x[..., 1:], weight, bias)
    with pytest.raises(ValueError, match=r"bias is \(3, 1\), weight is \(3, 4, 2\)"):
        grouped_linear(x, weight, bias[:, 1:])


@pytest.mark.parametrize("relu", [False, True])
def test_opcheck(relu) -> None:
    inputs, grad = draw_linear((1, 3), (5,), 4, 2)
    x, weight, bias = (t.requires_grad_() for t in inputs)
    torch.library.opcheck(torch.ops.fastmmkd.grouped_linear.default, (x, weight, bias, relu))
    with torch.no_grad():
        out = torch.ops.fastmmkd.grouped_linear(x, weight, bias, relu)
    backward = (grad, x.detach(), weight.detach(), out, relu, [True, True, False])
    torch.library.opcheck(torch.ops.fastmmkd.grouped_linear_backward.default, backward)


def test_compiles_to_one_graph() -> None:
    inputs, grad = draw_linear((1, 3), (5,), 4, 2)
    compiled = torch.compile(partial(grouped_linear, relu=True), fullgraph=True, backend="aot_eager")
    expected = value_and_gradients(partial(grouped_linear, relu=True), inputs, grad)
    for actual, value in zip(value_and_gradients(compiled, inputs, grad), expected, strict=True):
        assert torch.equal(actual, value)
