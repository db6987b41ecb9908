"""A training step of five UMDF models at once against five steps of one model each (batch 16, 4 MCIM layers).

`pytest bench/bench_together.py --benchmark-enable`. Each model has its own weights, samples and missing patterns;
clipping and Adam are part of the step.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from fastmmkd.engine.clipping import clip_models
from fastmmkd.methods.umdf import UMDF, UmdfLoss, UmdfModel
from fastmmkd.nn.models import stack_models
from fastmmkd.ops import missing_draw
from fastmmkd.tasks import Task

DIMS, BATCH, SAMPLES, SEEDS = (300, 74, 35), 16, 64, (1, 2, 3, 4, 5)
MODEL = UmdfModel(width=40, heads=8, mcim_layers=4, encoder_layers=2)
TOGETHER, ONE_AFTER_ANOTHER = "ours", "one after another"


def make_step(seeds: tuple[int, ...], steps: int) -> Callable[[], torch.Tensor]:
    """A step of the models of some seeds at once, which returns their losses `[S]`."""
    data, models, orders = torch.Generator().manual_seed(0), [], []
    features = [torch.randn(SAMPLES, steps, d, generator=data) for d in DIMS]
    masks, present = [torch.ones(SAMPLES, steps, dtype=torch.bool)] * 3, torch.ones(SAMPLES, 3, dtype=torch.bool)
    targets = torch.randn(SAMPLES, generator=data)
    for seed in seeds:
        torch.manual_seed(seed)
        models.append(UMDF(MODEL, UmdfLoss(), Task("regression"), DIMS))
        orders.append(torch.randperm(SAMPLES)[:BATCH])
    model, rows, seed = stack_models(models), torch.stack(orders), torch.tensor(seeds)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

    def step() -> torch.Tensor:
        drawn = missing_draw(features, masks, present, rows, seed, torch.tensor(0), 2, 0.7)
        optimizer.zero_grad()
        loss, parts = model(*drawn, targets[rows])
        loss.backward()
        clip_models(model.parameters(), limit=1.0)
        optimizer.step()
        return parts["loss"]

    return step


@pytest.mark.parametrize("variant", [ONE_AFTER_ANOTHER, TOGETHER])
@pytest.mark.parametrize("steps", [50, 8])
def test_five_seeds(benchmark, variant: str, steps: int) -> None:
    benchmark.group = f"five seeds, T={steps}"
    benchmark.extra_info["baselines"] = [ONE_AFTER_ANOTHER]
    benchmark.name = variant
    alone = [make_step((seed,), steps) for seed in SEEDS]
    if variant == ONE_AFTER_ANOTHER:
        benchmark.pedantic(lambda: [step() for step in alone], rounds=30, warmup_rounds=2)
        return
    together = make_step(SEEDS, steps)
    for _ in range(3):
        torch.testing.assert_close(together(), torch.cat([step() for step in alone]), rtol=1e-4, atol=1e-5)
    benchmark.pedantic(together, rounds=30, warmup_rounds=2)
