"""What the parity tests of whole layers share: inputs, and results against the fp64 reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from fastmmkd.ops import reference
from fastmmkd.ops.composition import CrossmodalWeights, EncoderWeights
from fastmmkd.ops.layout import Layout
from fastmmkd.testing.attention import Lengths, layout_of
from fastmmkd.testing.parity import DEVICE, assert_as_exact, value_and_gradients

Implementation = Callable[..., Any]
"""As `ops.encoder_layer`, or `ops.crossmodal_layer`."""


@dataclass
class LayerCase:
    """Inputs of one call, as `value_and_gradients` wants them, and the gradient of its output."""

    op: str
    inputs: list[torch.Tensor]
    """x, or three streams; then the weights."""
    masks: list[torch.Tensor]
    """As many as there are streams."""
    layout: Layout
    heads: int
    grad: torch.Tensor

    def names(self) -> list[str]:
        fields = EncoderWeights._fields if self.op == "encoder_layer" else CrossmodalWeights._fields
        streams = [f"grad stream {i}" for i in range(len(self.masks))]
        return ["out", *streams, *(f"grad {name}" for name in fields)]

    def call(self, implementation: Implementation) -> Callable[..., torch.Tensor]:
        """From an implementation to a function of the inputs; three streams come out as one tensor, `[3, S, R, d]`."""

        def encoder(x: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
            return implementation(x, self.masks[0], self.layout, self.heads, EncoderWeights(*weights))

        def crossmodal(*inputs: torch.Tensor) -> torch.Tensor:
            weights = CrossmodalWeights(*inputs[3:])
            return torch.stack(implementation(inputs[:3], self.masks, self.layout, self.heads, weights))

        return encoder if self.op == "encoder_layer" else crossmodal

    def run(self, implementation: Implementation) -> list[torch.Tensor]:
        return value_and_gradients(self.call(implementation), self.inputs, self.grad)


def draw_encoder(
    groups: tuple[int, ...],
    lengths: Lengths,
    masks: int,
    heads: int,
    head_width: int,
    dtype: torch.dtype = torch.float32,
    present: float = 0.7,
    spare: int = 2,
    seed: int = 0,
) -> LayerCase:
    """Of a layer with these group axes; every row may be attended to with probability `present`.

    Args:
        lengths: of the samples of every model.
        masks: how many groups the mask has.
        spare: rows of nobody.
    """
    make = _Make(torch.Generator().manual_seed(seed), dtype)
    layout, d = layout_of(lengths, spare), heads * head_width
    count = int(torch.tensor(groups).prod())
    weights = [
        *(make.matrix(*groups, d, 3 * d), make.matrix(*groups, d, d), make.normal(*groups, d)),
        *(make.normal(*groups, d) for _ in range(2)),
        *_feed_forward(make, groups, d),
    ]
    x, grad = (make.normal(count, layout.rows, d) for _ in range(2))
    return LayerCase("encoder_layer", [x, *weights], [make.mask(masks, layout.rows, present)], layout, heads, grad)


def draw_crossmodal(
    models: int,
    lengths: Lengths,
    heads: int,
    head_width: int,
    dtype: torch.dtype = torch.float32,
    present: float = 0.7,
    spare: int = 2,
    seed: int = 0,
) -> LayerCase:
    """As `draw_encoder`."""
    make = _Make(torch.Generator().manual_seed(seed), dtype)
    layout, d = layout_of(lengths, spare), heads * head_width
    attentions = models, 3, 3
    weights = [
        *(make.matrix(*attentions, d, n * d) for n in (1, 2, 1)),
        *(make.normal(*attentions, d) for _ in range(3)),
        *_feed_forward(make, (models, 3), d),
    ]
    streams = [make.normal(models, layout.rows, d) for _ in range(3)]
    masks = [make.mask(models, layout.rows, present) for _ in range(3)]
    grad = make.normal(3, models, layout.rows, d)
    return LayerCase("crossmodal_layer", [*streams, *weights], masks, layout, heads, grad)


@dataclass
class _Make:
    generator: torch.Generator
    dtype: torch.dtype

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator).to(DEVICE, self.dtype)

    def matrix(self, *shape: int) -> torch.Tensor:
        """That keeps the size of what it is multiplied with."""
        return (torch.randn(shape, generator=self.generator) * shape[-2] ** -0.5).to(DEVICE, self.dtype)

    def mask(self, groups: int, rows: int, present: float) -> torch.Tensor:
        return (torch.rand(groups, rows, generator=self.generator) < present).to(DEVICE)


def _feed_forward(make: _Make, groups: tuple[int, ...], d: int) -> list[torch.Tensor]:
    expand, contract = make.matrix(*groups, d, 4 * d), make.matrix(*groups, 4 * d, d)
    biases = make.normal(*groups, 4 * d), make.normal(*groups, d)
    return [expand, biases[0], contract, biases[1], make.normal(*groups, d), make.normal(*groups, d)]


def hold(case: LayerCase, actual: Sequence[torch.Tensor], terms: float = 10.0) -> None:
    """Hold an output and its gradients, in the order of `case.names()`, to the fp64 reference."""
    definition = getattr(reference, case.op)
    plain = case.run(definition)
    exact = value_and_gradients(case.call(definition), [x.double() for x in case.inputs], case.grad)
    for i, name in enumerate(case.names()):
        assert_as_exact(name, actual[i], plain[i], exact[i], 3, terms)


def draw_linear(
    groups: tuple[int, ...],
    rows: tuple[int, ...],
    d_in: int,
    d_out: int,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """x `[G, *rows, d_in]`, weight and bias of a linear map with these group axes; the gradient of the output."""
    make = _Make(torch.Generator().manual_seed(seed), dtype)
    count = int(torch.tensor(groups).prod())
    inputs = [make.normal(count, *rows, d_in), make.matrix(*groups, d_in, d_out), make.normal(*groups, d_out)]
    return inputs, make.normal(count, *rows, d_out)


def draw_convolution(
    models: int, lengths: Lengths, d_in: int, d_out: int, dtype: torch.dtype = torch.float32, spare: int = 2
) -> tuple[list[torch.Tensor], Layout, torch.Tensor]:
    """x, weight and bias of a temporal convolution, and the layout of x; the gradient of the output."""
    make, layout = _Make(torch.Generator().manual_seed(0), dtype), layout_of(lengths, spare)
    inputs = [make.normal(models, layout.rows, d_in), make.matrix(models, 3 * d_in, d_out), make.normal(models, d_out)]
    return inputs, layout, make.normal(models, layout.rows, d_out)
