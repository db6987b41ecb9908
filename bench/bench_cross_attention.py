"""Crossmodal attention, forward and backward: ours, plain PyTorch, scaled_dot_product_attention.

`OMP_NUM_THREADS=2 python -m pytest bench/bench_cross_attention.py --benchmark-enable`; every contender is held to plain
PyTorch before it is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.attention import scaled_dot_product
from fastmmkd.ops import cross_attention, extension, reference, use_provider

BATCH, HEADS, HEAD_WIDTH = 32, 8, 5
PRESENT = {"all modalities": (True, True, True), "one modality": (True, False, False), "80% of frames": None}
ROUNDS = {50: 60, 375: 30}


def ours(*args: Any) -> torch.Tensor:
    with use_provider("cpp"):
        return cross_attention(*args)


CONTENDERS = {"ours": ours, "plain PyTorch": reference.cross_attention, "scaled_dot_product": scaled_dot_product}


def draw(frames: int, present: tuple[bool, ...] | None) -> Callable[[Callable], list[torch.Tensor]]:
    """`step(attention)`: the output and all gradients; keys and values are packed as the models project them."""
    generator = torch.Generator().manual_seed(0)
    width = HEADS * HEAD_WIDTH
    query, grad = (torch.randn(1, BATCH, frames, width, generator=generator) for _ in range(2))
    packed = [torch.randn(1, BATCH, frames, 2 * width, generator=generator) for _ in range(3)]
    keys, values = zip(*(x.chunk(2, -1) for x in packed), strict=True)
    leaves = [x.requires_grad_() for x in (query, *keys, *values)]
    if present is None:
        masks = [torch.rand(1, BATCH, frames, generator=generator) < 0.8 for _ in range(3)]
    else:
        masks = [torch.full((1, BATCH, frames), one) for one in present]

    def step(attention: Callable) -> list[torch.Tensor]:
        out = attention(leaves[0], leaves[1:4], leaves[4:], masks, HEADS)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad)]

    return step


@pytest.mark.skipif(bool(extension.missing), reason=extension.missing or "-")
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("present", PRESENT)
@pytest.mark.parametrize("frames", ROUNDS)
def test_forward_and_backward(benchmark: BenchmarkFixture, frames: int, present: str, contender: str) -> None:
    step = draw(frames, PRESENT[present])
    for actual, expected in zip(step(CONTENDERS[contender]), step(reference.cross_attention), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    benchmark.group = f"cross_attention, {frames} queries x {3 * frames} keys, {present}"
    benchmark.name = contender
    benchmark.extra_info["baselines"] = ["plain PyTorch", "scaled_dot_product"]
    benchmark.pedantic(step, args=(CONTENDERS[contender],), rounds=ROUNDS[frames], warmup_rounds=3)
