"""Crossmodal attention, forward and backward: ours, plain PyTorch, scaled_dot_product_attention.

`OMP_NUM_THREADS=2 python -m pytest bench/bench_cross_attention.py --benchmark-enable`; every contender is held to plain
PyTorch before it is timed. Samples are all as long as the longest, or as long as MOSEI's, 20 of 50 frames on average:
then ours gets their rows, the others get them padded, or padded as far as the longest of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.attention import scaled_dot_product
from bench.workload import FULL, Shape, lengths_of
from fastmmkd.ops import cross_attention, extension, reference, use_provider
from fastmmkd.ops.layout import Layout, pack, unpack

BATCH, HEADS, HEAD_WIDTH = 32, 8, 5
PRESENT = {"all modalities": (True, True, True), "one modality": (True, False, False), "80% of frames": None}
ROUNDS = {50: 60, 375: 30}
OURS, PLAIN, SDPA = "ours", "plain PyTorch", "scaled_dot_product"
Step = Callable[[], list[torch.Tensor]]


def ours(*args: Any) -> torch.Tensor:
    with use_provider("cpp"):
        return cross_attention(*args)


CONTENDERS = {OURS: ours, PLAIN: reference.cross_attention, SDPA: scaled_dot_product}
needs_kernels = pytest.mark.skipif(bool(extension.missing), reason=extension.missing or "-")


class Inputs:
    """Rows of samples; keys and values are packed as the models project them."""

    def __init__(self, layout: Layout, present: tuple[bool, ...] | None) -> None:
        generator = torch.Generator().manual_seed(0)
        width, rows = HEADS * HEAD_WIDTH, layout.rows
        self.layout = layout
        self.query, self.grad = (torch.randn(1, rows, width, generator=generator) for _ in range(2))
        self.packed = [torch.randn(1, rows, 2 * width, generator=generator) for _ in range(3)]
        if present is None:
            self.masks = [torch.rand(1, rows, generator=generator) < 0.8 for _ in range(3)]
        else:
            self.masks = [torch.full((1, rows), one) for one in present]

    def of_rows(self, attention: Callable) -> Step:
        """The output and all gradients of an attention over rows."""
        leaves, masks = self._leaves(lambda x: x)
        return lambda: self._run(attention, leaves, masks, self.grad, self.layout)

    def padded(self, attention: Callable, longest: int) -> Step:
        """The same of one over samples that are padded, `[1, B, longest, d]`."""
        layout = self._as_long_as(longest)
        leaves, masks = self._leaves(lambda x: unpack(x, layout))
        grad = unpack(self.grad, layout)
        return lambda: self._run(attention, leaves, masks, grad)

    def rows_of(self, padded: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """What a step over padded samples gave, as one over rows gives it."""
        return [pack(x, self._as_long_as(x.shape[2])) for x in padded]

    def _as_long_as(self, longest: int) -> Layout:
        return Layout.of(self.layout.lengths, self.layout.rows, longest, is_full=True)

    def _leaves(self, arranged: Callable[[torch.Tensor], torch.Tensor]) -> tuple[list[torch.Tensor], ...]:
        keys, values = zip(*(arranged(x).chunk(2, -1) for x in self.packed), strict=True)
        leaves = [x.detach().requires_grad_() for x in (arranged(self.query), *keys, *values)]
        return leaves, [arranged(mask) for mask in self.masks]

    @staticmethod
    def _run(
        attention: Callable, leaves: list[torch.Tensor], masks: list[torch.Tensor], grad: torch.Tensor, *layout: Layout
    ) -> list[torch.Tensor]:
        out = attention(leaves[0], leaves[1:4], leaves[4:], masks, HEADS, *layout)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]


def inputs_of(frames: int, lengths: str, present: tuple[bool, ...] | None) -> Inputs:
    of = torch.from_numpy(lengths_of(Shape(frames, (), lengths), BATCH)).long()
    return Inputs(Layout.of(of[None], int(of.sum()), frames, is_full=True), present)


def hold(actual: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-5)


@needs_kernels
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("present", PRESENT)
@pytest.mark.parametrize("frames", ROUNDS)
def test_forward_and_backward(benchmark: BenchmarkFixture, frames: int, present: str, contender: str) -> None:
    inputs = inputs_of(frames, FULL, PRESENT[present])
    step = inputs.padded(CONTENDERS[contender], frames)
    hold(step(), inputs.padded(CONTENDERS[PLAIN], frames)())
    benchmark.group = f"cross_attention, {frames} queries x {3 * frames} keys, {present}"
    benchmark.name = contender
    benchmark.extra_info["baselines"] = [PLAIN, SDPA]
    benchmark.pedantic(step, rounds=ROUNDS[frames], warmup_rounds=3)


@needs_kernels
@pytest.mark.parametrize("contender", [OURS, PLAIN, SDPA, f"{SDPA}, cropped"])
@pytest.mark.parametrize("present", PRESENT)
def test_forward_and_backward_at_moseis_lengths(benchmark: BenchmarkFixture, present: str, contender: str) -> None:
    frames = 50
    inputs = inputs_of(frames, "mosei", PRESENT[present])
    if contender == OURS:
        step = inputs.of_rows(ours)
        actual = step()
    else:
        longest = int(inputs.layout.lengths.max()) if contender.endswith("cropped") else frames
        step = inputs.padded(CONTENDERS[contender.split(",")[0]], longest)
        actual = inputs.rows_of(step())
    hold(actual, inputs.of_rows(CONTENDERS[PLAIN])())
    mean = inputs.layout.rows / BATCH
    benchmark.group = f"cross_attention, {mean:.0f} of {frames} queries x {3 * mean:.0f} keys, {present}"
    benchmark.name = contender
    benchmark.extra_info["baselines"] = [PLAIN, SDPA, f"{SDPA}, cropped"]
    benchmark.pedantic(step, rounds=ROUNDS[frames], warmup_rounds=3)
