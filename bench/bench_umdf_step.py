"""One UMDF training step (batch 16, T = 50, 4 MCIM layers): forward, backward, Adam.

`pytest bench/bench_umdf_step.py --benchmark-enable`; `FASTMMKD_BENCH_COMPILE=1` adds `torch.compile` of the plain
model, which takes minutes to compile.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

from bench.plain import PlainUMDF
from fastmmkd import ops
from fastmmkd.config import UmdfLoss, UmdfModel
from fastmmkd.methods.umdf import UMDF
from fastmmkd.ops import missing_draw
from fastmmkd.tasks import Task

DIMS, BATCH, STEPS = (300, 74, 35), 16, 50
MODEL = UmdfModel(width=40, heads=8, mcim_layers=4, encoder_layers=2)
VARIANTS = ["plain PyTorch", "scaled_dot_product", "our reference", "ours"]
if os.environ.get("FASTMMKD_BENCH_COMPILE"):
    VARIANTS.append("compiled")

Batch = tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]


def make_batch(mix: bool) -> Batch:
    """Two versions of 16 complete samples, or (mix) as training draws them."""
    generator = torch.Generator().manual_seed(0)
    features = [torch.randn(BATCH, STEPS, d, generator=generator) for d in DIMS]
    masks = [torch.ones(BATCH, STEPS, dtype=torch.bool) for _ in DIMS]
    rows, present = torch.arange(BATCH)[None], torch.ones(BATCH, 3, dtype=torch.bool)
    if mix:
        drawn = missing_draw(features, masks, present, rows, torch.tensor([1]), torch.tensor(0), 2, 0.7)
    else:
        drawn = [x.repeat(2, 1, 1)[None] for x in features], [m.repeat(2, 1)[None] for m in masks]
    return *drawn, torch.randn(1, BATCH, generator=generator)


def make_step(variant: str, batch: Batch) -> tuple[Callable[[], None], torch.Tensor]:
    """A training step, and the loss of the first one."""
    torch.manual_seed(0)
    umdf = UMDF(MODEL, UmdfLoss(), Task("regression"), DIMS)
    features, masks, targets = batch
    if not variant.startswith("our"):
        model: torch.nn.Module = PlainUMDF(umdf, "sdpa" if variant == "scaled_dot_product" else "explicit")
        arguments = [x[0] for x in features], [m[0] for m in masks], targets[0]
        forward = torch.compile(model) if variant == "compiled" else model
    else:
        model, arguments = umdf, (features, masks, targets)
        forward = lambda *a: umdf(*a)[0]  # noqa: E731
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=variant == "ours")

    def step() -> None:
        optimizer.zero_grad()
        forward(*arguments).backward()
        optimizer.step()

    with torch.no_grad():
        first = (umdf(*arguments)[0] if model is umdf else model(*arguments)).clone()
    return step, first


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mix", [False, True], ids=["complete", "training mix"])
def test_umdf_step(benchmark, variant: str, mix: bool) -> None:
    benchmark.group = f"UMDF step, {'training mix of missing patterns' if mix else 'nothing missing'}"
    benchmark.extra_info["baselines"] = ["plain PyTorch", "scaled_dot_product", "compiled"]
    benchmark.name = variant
    batch = make_batch(mix)
    _, expected = make_step("plain PyTorch", batch)
    with ops.use_provider("reference") if variant == "our reference" else nullcontext():
        step, loss = make_step(variant, batch)
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
        benchmark.pedantic(step, rounds=30, warmup_rounds=5)
