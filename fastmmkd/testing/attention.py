"""What the parity tests of attention share: inputs, and results against the fp64 reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from fastmmkd.ops import reference
from fastmmkd.ops.layout import Layout
from fastmmkd.ops.providers import INTERPRETED
from fastmmkd.testing.parity import DEVICE, assert_as_exact, value_and_gradients

Attention = Callable[..., torch.Tensor]
"""As `ops.cross_attention`."""


@dataclass
class AttentionCase:
    """Inputs of one call, as `value_and_gradients` wants them, and the gradient of its output."""

    inputs: list[torch.Tensor]
    masks: list[torch.Tensor]
    heads: int
    grad: torch.Tensor
    layout: Layout | None = None
    key_layouts: Sequence[Layout] = ()

    def names(self) -> list[str]:
        n = len(self.masks)
        return ["out", "grad query", *(f"grad {x} {i}" for x in ("key", "value") for i in range(n))]

    def call(self, implementation: Attention) -> Callable[..., torch.Tensor]:
        n = len(self.masks)
        how = self.masks, self.heads, self.layout, self.key_layouts
        return lambda query, *kv: implementation(query, kv[:n], kv[n:], *how)

    def run(self, implementation: Attention) -> list[torch.Tensor]:
        return value_and_gradients(self.call(implementation), self.inputs, self.grad)


def draw(
    groups: int,
    batch: int,
    queries: int,
    lengths: Sequence[int],
    heads: int,
    head_width: int,
    dtype: torch.dtype = torch.float32,
    present: float = 0.7,
    size: float = 1.0,
    seed: int = 0,
) -> AttentionCase:
    """Normal inputs, queries and keys times `size`; every frame is there with probability `present`."""
    generator = torch.Generator().manual_seed(seed)

    def normal(frames: int, size: float = 1.0) -> torch.Tensor:
        return (size * torch.randn(groups, batch, frames, heads * head_width, generator=generator)).to(DEVICE, dtype)

    masks = [(torch.rand(groups, batch, t, generator=generator) < present).to(DEVICE) for t in lengths]
    inputs = [*(normal(t, size) for t in (queries, *lengths)), *(normal(t) for t in lengths)]
    return AttentionCase(inputs, masks, heads, normal(queries))


Lengths = Sequence[Sequence[int]]
"""Of the samples of every model, `[S, B]`."""


def layout_of(lengths: Lengths, spare: int = 0) -> Layout:
    """Its rows are those of the model that has most, and `spare` of nobody."""
    rows = max(sum(of) for of in lengths) + spare
    return Layout.of(torch.tensor(lengths, device=DEVICE), rows, max(max(of) for of in lengths))


def draw_ragged(
    groups: int,
    lengths: Sequence[Lengths],
    masks: Sequence[int],
    heads: int,
    head_width: int,
    dtype: torch.dtype = torch.float32,
    present: float = 0.7,
    spare: int = 2,
    seed: int = 0,
) -> AttentionCase:
    """As `draw`. `lengths`: of the queries, then of each segment; `masks`: how many groups each segment's has."""
    generator = torch.Generator().manual_seed(seed)
    layout, *key_layouts = (layout_of(of, spare) for of in lengths)

    def normal(rows: int) -> torch.Tensor:
        return torch.randn(groups, rows, heads * head_width, generator=generator).to(DEVICE, dtype)

    there = [torch.rand(m, of.rows, generator=generator) < present for m, of in zip(masks, key_layouts, strict=True)]
    inputs = [normal(of.rows) for of in (layout, *key_layouts, *key_layouts)]
    if all(of == lengths[0] for of in lengths):
        key_layouts = []
    return AttentionCase(inputs, [mask.to(DEVICE) for mask in there], heads, normal(layout.rows), layout, key_layouts)


def hold(case: AttentionCase, actual: Sequence[torch.Tensor], terms: float = 1.0) -> None:
    """Hold an output and its gradients, in the order of `case.names()`, to the fp64 reference."""
    plain = case.run(reference.cross_attention)
    exact = replace(case, inputs=[x.double() for x in case.inputs]).run(reference.cross_attention)
    for i, name in enumerate(case.names()):
        assert_as_exact(name, actual[i], plain[i], exact[i], 3 if i else 2, terms)


SHAPES = [
    (1, 1, 1, (1,), 1, 4),
    (2, 2, 1, (1, 1, 1), 8, 5),
    (3, 2, 20, (20, 20), 8, 5),
    (1, 3, 50, (50, 50, 50), 8, 5),
    (2, 1, 63, (63, 31, 7), 2, 4),
    (1, 2, 17, (33,), 4, 8),
    (1, 2, 19, (18, 5), 2, 10),
    (1, 1, 21, (40, 3), 2, 16),
    (1, 1, 20, (20,), 8, 15),
    (1, 1, 5, (9, 8), 2, 1),
    (1, 1, 6, (20,), 2, 7),
    (1, 1, 5, (20,), 1, 23),
    (1, 1, 5, (18,), 1, 48),
    (1, 1, 3, (18,), 1, 150),
    (1, 1, 140, (9,), 1, 5),
]
if INTERPRETED:  # a program takes milliseconds
    SHAPES = [(min(groups, 2), 1, t, lengths, min(h, 2), e) for groups, _, t, lengths, h, e in SHAPES]

RAGGED: dict[str, tuple[int, tuple[Lengths, ...], tuple[int, ...]]] = {
    "aligned": (3, ([[13, 1, 20]],) * 4, (1, 1, 3)),
    "unaligned": (2, ([[5, 9]], [[30, 1]], [[3, 17]]), (1, 2)),
    "two models": (4, ([[3, 18], [11, 2]],) * 3, (2, 4)),
    "two models, unaligned": (4, ([[3, 8], [1, 2]], [[7, 19], [20, 1]], [[4, 4]]), (1, 2)),
    "a sample of a row": (1, ([[1]], [[1]]), (1,)),
}
"""Groups, lengths of queries and segments, and groups of the masks."""
