"""A training step of five UMDF models at once against five steps of one model each (batch 16, 4 MCIM layers).

`pytest bench/bench_together.py --benchmark-enable`. Each model has its own weights, samples and missing patterns;
clipping and Adam are part of the step.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from bench.workload import FULL, Shape, random_dataset
from fastmmkd.config import load_config
from fastmmkd.engine.clipping import clip_models
from fastmmkd.engine.step import untrained_objective

CONFIG = Path(__file__).parents[1] / "configs" / "umdf_mosei.json"
FRAMES, DIMS, SAMPLES, SEEDS = 50, (300, 74, 35), 64, (1, 2, 3, 4, 5)
LENGTHS = {"mosei": "MOSEI's lengths", FULL: f"T={FRAMES}"}
TOGETHER, ONE_AFTER_ANOTHER = "ours", "one after another"


def make_step(seeds: tuple[int, ...], lengths: str) -> Callable[[], torch.Tensor]:
    """A step of the models of some seeds at once, which returns their losses `[S]`."""
    config = load_config(CONFIG)
    dataset = random_dataset(config, Shape(FRAMES, DIMS, lengths), SAMPLES)
    objective = untrained_objective(config, dataset, seeds, torch.device("cpu"), torch.float32)
    module, epoch = objective.module, torch.tensor(0)
    orders = [module.order(torch.arange(SAMPLES), seed, 0)[: config.train.batch_size] for seed in seeds]
    rows, optimizer = torch.stack(orders), torch.optim.Adam(module.parameters(), lr=1e-4, fused=True)

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        batch = objective.draw(rows, epoch)
        loss, parts = objective.loss(batch)
        loss.backward()
        clip_models(module.parameters(), 1.0, len(seeds))
        optimizer.step()
        with torch.no_grad():
            module.after_step(batch)
        return parts["loss"]

    return step


@pytest.mark.parametrize("variant", [ONE_AFTER_ANOTHER, TOGETHER])
@pytest.mark.parametrize("lengths", LENGTHS)
def test_five_seeds(benchmark: BenchmarkFixture, variant: str, lengths: str) -> None:
    benchmark.group = f"five seeds, {LENGTHS[lengths]}"
    benchmark.extra_info["baselines"] = [ONE_AFTER_ANOTHER]
    benchmark.name = variant
    alone = [make_step((seed,), lengths) for seed in SEEDS]
    if variant == ONE_AFTER_ANOTHER:
        benchmark.pedantic(lambda: [step() for step in alone], rounds=30, warmup_rounds=2)
        return
    together = make_step(SEEDS, lengths)
    for _ in range(3):
        torch.testing.assert_close(together(), torch.cat([step() for step in alone]), rtol=1e-4, atol=1e-5)
    benchmark.pedantic(together, rounds=30, warmup_rounds=2)
