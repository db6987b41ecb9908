"""Gradients of gradients: under `create_graph=True` the definition differentiates, whatever ran forward."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial

import pytest
import torch
from torch._subclasses import FakeTensorMode

from fastmmkd import ops
from fastmmkd.ops import OPERATIONS, declaration, reference, use_provider
from fastmmkd.testing import attention, layers, losses, norm
from fastmmkd.testing.parity import BOUND, DEVICE, DTYPES, PROVIDER, needs

Function = Callable[..., torch.Tensor]
"""Of the inputs that are differentiated."""


def attend(implementation: Function) -> tuple[Function, list[torch.Tensor]]:
    """Ragged, of two models; a sample of which nothing is there among them, and rows of nobody."""
    lengths = [[4, 1, 3], [2, 3, 2]]
    case = attention.draw_ragged(2, (lengths, lengths, [[1, 2, 3], [2, 1, 2]]), (2, 2), 2, 3, spare=1)
    for mask, of in zip(case.masks, case.key_layouts, strict=True):
        mask[of.sample == 1] = False
    return case.call(implementation), case.inputs


def normalise(implementation: Function) -> tuple[Function, list[torch.Tensor]]:
    return implementation, norm.draw((2, 3, 5))[0]


def compare(name: str, implementation: Function) -> tuple[Function, list[torch.Tensor]]:
    case = losses.CASES[name](2, 4, 5)
    return lambda *inputs: implementation(*inputs, *case.constants), list(case.inputs)


def encode(implementation: Function) -> tuple[Function, list[torch.Tensor]]:
    """Of two models, with rows of nobody."""
    case = layers.draw_encoder((2,), [[3, 1], [2, 1]], 2, 1, 3, spare=1)
    return case.call(implementation), case.inputs


def cross(implementation: Function) -> tuple[Function, list[torch.Tensor]]:
    """The same."""
    case = layers.draw_crossmodal(2, [[3, 1], [2, 1]], 1, 3, spare=1)
    return case.call(implementation), case.inputs


def multiply(implementation: Function) -> tuple[Function, list[torch.Tensor]]:
    return implementation, layers.draw_linear((2,), (4,), 3, 3)[0]


def convolve(implementation: Function) -> tuple[Function, list[torch.Tensor]]:
    inputs, layout, _ = layers.draw_convolution(2, [[3, 1], [2, 1]], 3, 2, spare=1)
    return lambda x, weight, bias: implementation(x, layout, weight, bias), inputs


FUNCTIONS = {
    "grouped_linear": multiply,
    "temporal_convolution": convolve,
    "cross_attention": attend,
    "residual_layer_norm": normalise,
    "encoder_layer": encode,
    "crossmodal_layer": cross,
    **{name: partial(compare, name) for name in losses.CASES},
}
every_operation = pytest.mark.parametrize("name", [pytest.param(name, marks=needs(name)) for name in FUNCTIONS])


def weights(like: Sequence[torch.Tensor], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator).to(x) for x in like]


def weighted(xs: Sequence[torch.Tensor], seed: int) -> torch.Tensor:
    """A sum with fixed weights, in fp32 or better."""
    pairs = zip(xs, weights(xs, seed), strict=True)
    return torch.stack([(x * w).to(torch.promote_types(x.dtype, torch.float32)).sum() for x, w in pairs]).sum()


def twice(function: Function, inputs: Sequence[torch.Tensor], linear: bool) -> list[torch.Tensor]:
    """First and second derivatives of a sum of the results, or of their squares, by every input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    first = torch.autograd.grad(weighted([out if linear else out.square()], 1), leaves, create_graph=True)
    second = torch.autograd.grad(weighted(first, 2), leaves, allow_unused=True)
    second = [torch.zeros_like(y) if x is None else x for x, y in zip(second, leaves, strict=True)]
    return [*(x.detach() for x in first), *second]


def hold(derivatives: Sequence[torch.Tensor], exact: Sequence[torch.Tensor], dtype: torch.dtype) -> None:
    for i, (x, true) in enumerate(zip(derivatives, exact, strict=True)):
        assert x.dtype == dtype
        bound = 10 * BOUND[dtype] * max(1.0, true.abs().max().item())
        assert (x.double() - true).abs().max().item() <= bound, i


@every_operation
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("linear", [True, False], ids=["of the result", "of its square"])
def test_second_derivatives_are_those_of_the_definition(name, linear, dtype) -> None:
    inputs = [x.to(dtype) for x in FUNCTIONS[name](getattr(ops, name))[1]]
    with use_provider(PROVIDER):
        derivatives = twice(FUNCTIONS[name](getattr(ops, name))[0], inputs, linear)
    exact = twice(FUNCTIONS[name](getattr(reference, name))[0], [x.double() for x in inputs], linear)
    hold(derivatives, exact, dtype)


@every_operation
def test_an_inner_step_is_differentiated_through(name) -> None:
    """Two steps of gradient descent on an operation's first input: what the outer loss says of the start."""

    def outer(implementation: Function, dtype: torch.dtype) -> torch.Tensor:
        function, inputs = FUNCTIONS[name](implementation)
        start, *others = (x.to(dtype) for x in inputs)
        at = start.requires_grad_()
        for _ in range(2):
            at = at - 0.1 * torch.autograd.grad(function(at, *others).sum(), at, create_graph=True)[0]
        return torch.autograd.grad(weighted([function(at, *others)], 3), start)[0]

    with use_provider(PROVIDER):
        derivative = outer(getattr(ops, name), torch.float32)
    hold([derivative], [outer(getattr(reference, name), torch.float64)], torch.float32)


@every_operation
def test_inputs_that_depend_on_each_other_are_not_counted_twice(name) -> None:
    """All inputs of a shape are one tensor; the others are constants."""

    def run(implementation: Function, dtype: torch.dtype) -> list[torch.Tensor]:
        function, inputs = FUNCTIONS[name](implementation)
        shape = inputs[0].shape
        constants = [x.to(dtype) for x in inputs]

        def of_one(x: torch.Tensor) -> torch.Tensor:
            return function(*(x if c.shape == shape and i < 2 else c for i, c in enumerate(constants)))

        return twice(of_one, constants[:1], False)

    with use_provider(PROVIDER):
        derivatives = run(getattr(ops, name), torch.float32)
    hold(derivatives, run(getattr(reference, name), torch.float64), torch.float32)


@every_operation
def test_the_third_derivative_is_there_too(name) -> None:
    def run(implementation: Function, dtype: torch.dtype) -> torch.Tensor:
        function, inputs = FUNCTIONS[name](implementation)
        start, *others = (x.to(dtype) for x in inputs)
        x, derivative = start.requires_grad_(), None
        for i in range(3):
            derivative = weighted([function(x, *others).square() if derivative is None else derivative], i)
            (derivative,) = torch.autograd.grad(derivative, x, create_graph=True)
        assert derivative is not None
        return derivative.detach()

    with use_provider(PROVIDER):
        derivative = run(getattr(ops, name), torch.float32)
    hold([derivative], [run(getattr(reference, name), torch.float64)], torch.float32)


@every_operation
def test_one_input_alone(name) -> None:
    """The others have gradients, but nobody asks for them first; then they are asked for."""

    def run(implementation: Function, dtype: torch.dtype) -> list[torch.Tensor]:
        function, inputs = FUNCTIONS[name](implementation)
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        (first,) = torch.autograd.grad(function(*leaves).square().sum(), leaves[0], create_graph=True)
        return list(torch.autograd.grad(weighted([first], 4), leaves))

    with use_provider(PROVIDER):
        derivatives = run(getattr(ops, name), torch.float32)
    hold(derivatives, run(getattr(reference, name), torch.float64), torch.float32)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs(name)) for name in FUNCTIONS if not OPERATIONS[name].composed]
)
def test_autocast_does_not_reach_the_definition(name) -> None:
    function, inputs = FUNCTIONS[name](getattr(ops, name))

    def first() -> Sequence[torch.Tensor]:
        leaves = [x.clone().requires_grad_() for x in inputs]
        return torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)

    with use_provider(PROVIDER):
        expected = first()
        with torch.autocast(DEVICE.type, DTYPES[-1]):
            gradients = first()
    assert all(torch.equal(x, y) for x, y in zip(gradients, expected, strict=True))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_value_is_read_by_the_host(name) -> None:
    """Tensors that have none refuse; so a step with second derivatives can be captured in a graph."""
    function, inputs = FUNCTIONS[name](getattr(ops, name))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        derivatives = twice(function, [mode.from_tensor(x) for x in inputs], False)
    assert [x.shape for x in derivatives] == [x.shape for x in (*inputs, *inputs)]


@every_operation
def test_without_create_graph_the_kernels_run(name, monkeypatch) -> None:
    """The definition is not asked."""
    function, inputs = FUNCTIONS[name](getattr(ops, name))
    for module in (declaration, sys.modules[f"fastmmkd.ops.{name}"]):
        monkeypatch.setattr(module, "differentiable_gradients", None, raising=False)
    leaves = [x.clone().requires_grad_() for x in inputs]
    with use_provider(PROVIDER):
        gradients = torch.autograd.grad(function(*leaves).square().sum(), leaves)
    assert all(not x.requires_grad for x in gradients)


@pytest.mark.parametrize("name", [name for name in FUNCTIONS if name != "gaussian_mmd"])  # its bandwidth is a constant
def test_the_definition_is_differentiated_twice_as_finite_differences_say(name) -> None:
    function, inputs = FUNCTIONS[name](getattr(reference, name))
    many = sum(x.numel() for x in inputs) > 200  # then along random directions
    assert torch.autograd.gradgradcheck(function, [x.double().requires_grad_() for x in inputs], fast_mode=many)


@needs("missing_draw")
def test_the_features_of_a_draw() -> None:
    feature = torch.arange(24.0, device=DEVICE).view(12, 2).requires_grad_()
    mask = torch.ones(12, dtype=torch.bool, device=DEVICE)
    starts = torch.arange(5, device=DEVICE) * 3
    keys = torch.arange(4, device=DEVICE)[None], *torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    layouts = [attention.layout_of([[3] * 8])]
    split = [feature], [mask], [starts], mask[:4, None]
    with use_provider(PROVIDER):
        (drawn,), (kept,) = ops.missing_draw(*split, *keys[:2], keys[2][0], layouts, 2, 0.7)
        (first,) = torch.autograd.grad(drawn.square().sum(), feature, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), feature)
    assert torch.equal(second, 2.0 * kept.view(2, 12, 1).sum(0).expand(-1, 2))


def test_every_operation_has_a_case() -> None:
    assert {*FUNCTIONS, "missing_draw"} == {name for name, op in OPERATIONS.items() if op.kernels}
