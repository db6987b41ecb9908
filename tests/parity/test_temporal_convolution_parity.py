"""Convolutions over time: the compiled kernels against the fp64 reference."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastmmkd.ops import reference, temporal_convolution, use_provider
from fastmmkd.ops.layout import Layout
from fastmmkd.testing.layers import draw_convolution
from fastmmkd.testing.parity import (
    DTYPES,
    INSTRUCTION_SETS,
    PROVIDER,
    assert_as_exact,
    instruction_set,
    needs,
    only_cpp,
    poisoned_memory,
    threads,
    value_and_gradients,
)

pytestmark = needs("temporal_convolution")

NAMES = ("out", "grad x", "grad weight", "grad bias")
CASES = {
    "words": (1, [[13, 1, 20, 2]], 300, 40),
    "two models": (2, [[5, 4], [1, 3]], 7, 6),
    "two models of one layout": (2, [[5, 4]], 3, 9),
    "one row": (1, [[1]], 1, 1),
}
"""Models, lengths, and widths in and out."""


def fast(x: torch.Tensor, layout: Layout, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    with use_provider(PROVIDER):
        return temporal_convolution(x, layout, weight, bias)


@pytest.mark.parametrize("isa", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("spare", [0, 2])
@pytest.mark.parametrize("name", CASES)
def test_as_exact_as_plain_pytorch(name, spare, dtype, isa) -> None:
    inputs, layout, grad = draw_convolution(*CASES[name], dtype, spare)
    if len(layout.starts) < len(inputs[0]):  # the definition takes a layout for every model
        definition_layout = Layout.of(layout.lengths.expand(len(inputs[0]), -1), layout.rows, layout.longest)
    else:
        definition_layout = layout

    def definition(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return reference.temporal_convolution(x, definition_layout, weight, bias)

    with instruction_set(isa), poisoned_memory():
        actual = value_and_gradients(lambda x, weight, bias: fast(x, layout, weight, bias), inputs, grad)
    plain = value_and_gradients(definition, inputs, grad)
    exact = value_and_gradients(definition, [x.double() for x in inputs], grad)
    for name, *values in zip(NAMES, actual, plain, exact, strict=True):
        assert_as_exact(name, *values, 3, 10.0)


def test_it_is_pytorchs_convolution_of_every_sample() -> None:
    (x, weight, bias), layout, _ = draw_convolution(1, [[13, 1, 20]], 6, 4)
    out = fast(x, layout, weight, bias)
    kernel = weight[0].view(3, 6, 4).permute(2, 1, 0)
    for start, end in layout.starts[0].unfold(0, 2, 1).tolist():
        expected = F.conv1d(x[0, start:end].T[None], kernel, bias[0], padding=1)[0].T
        torch.testing.assert_close(out[0, start:end], expected)


@only_cpp
def test_the_number_of_threads_matters_by_rounding_at_most() -> None:
    inputs, layout, grad = draw_convolution(1, [[50, 41, 12, 90, 33]], 74, 40)
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(value_and_gradients(lambda x, w, b: fast(x, layout, w, b), inputs, grad))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)


def test_what_does_not_fit_together_is_refused() -> None:
    (x, weight, bias), layout, _ = draw_convolution(1, [[3, 2]], 4, 2, spare=0)
    with pytest.raises(ValueError, match=r"x is \(1, 4, 4\); the layout has 5 rows of 1 models"):
        temporal_convolution(x[:, 1:], layout, weight, bias)
    with pytest.raises(ValueError, match=r"weight is \(1, 11, 2\); x \(1, 5, 4\) needs \(1, 12\) and a width"):
        temporal_convolution(x, layout, weight[:, 1:], bias)
    with pytest.raises(ValueError, match=r"bias is \(1, 1\); expected \(1, 2\)"):
        temporal_convolution(x, layout, weight, bias[:, 1:])


def test_opcheck() -> None:
    inputs, layout, grad = draw_convolution(2, [[3, 2], [1, 1]], 4, 2)
    x, weight, bias = (t.requires_grad_() for t in inputs)
    torch.library.opcheck(torch.ops.fastmmkd.temporal_convolution.default, (x, layout.starts, weight, bias))
    for wants_x in (True, False):
        backward = (grad, x.detach(), layout.starts, weight.detach(), wants_x)
        torch.library.opcheck(torch.ops.fastmmkd.temporal_convolution_backward.default, backward)


def test_compiles_to_one_graph() -> None:
    inputs, layout, grad = draw_convolution(2, [[3, 2], [1, 1]], 4, 2)

    def run(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return temporal_convolution(x, layout, weight, bias)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for actual, value in zip(
        value_and_gradients(compiled, inputs, grad), value_and_gradients(run, inputs, grad), strict=True
    ):
        assert torch.equal(actual, value)
