"""What a training step calls, and how many kernels it would launch on a GPU: `python -m bench.step_counts`.

Counted on any device, without a GPU; what a step takes is not measured. Constants are made in a step before.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from bench import entry
from bench.observe import OperatorCalls, PredictedLaunches
from bench.workload import Shape, keys_of, random_dataset, shape_of
from fastmmkd.blocks import Config
from fastmmkd.config import load_config
from fastmmkd.engine.step import untrained_objective
from fastmmkd.evaluation import tables
from fastmmkd.methods import METHODS
from fastmmkd.ops import use_provider
from fastmmkd.ops.providers import COMPOSED

CONFIGS = Path(__file__).parents[1] / "configs"
DEFAULT = [CONFIGS / f"{method}_mosei.json" for method in METHODS]
STAGES = ("draw", "teach", "loss", "backward")

Counter = TypeVar("Counter", bound=OperatorCalls)


class Counts(NamedTuple):
    """Of a stage."""

    calls: int
    """Of operators, views among them."""
    launches: int


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.step_counts", description="Count what steps call.")
    parser.add_argument("--config", type=Path, nargs="+", default=DEFAULT, help="config files; data need not be there")
    parser.add_argument("--seeds", type=int, default=1, metavar="S", help="models trained at once")
    args = parser.parse_args(argv)
    header = ["config", *(f"{stage}, calls / launches" for stage in STAGES), "step, calls / launches"]
    rows = []
    for path in args.config:
        config = load_config(path)
        counts = count(config, shape_of(config), args.seeds)
        whole = Counts(*map(sum, zip(*counts.values(), strict=True)))
        rows.append([path.stem, *(f"{c.calls} / {c.launches}" for c in (*counts.values(), whole))])
    print(tables.markdown_table(header, rows))
    return 0


def count(config: Config, shape: Shape, models: int = 1, dtype: torch.dtype = torch.bfloat16) -> dict[str, Counts]:
    """Of one step without the optimiser's, on the CPU, stage by stage."""
    device, batch = torch.device("cpu"), config.train.batch_size
    objective = untrained_objective(config, random_dataset(config, shape, batch), range(1, models + 1), device, dtype)
    keys = keys_of(0, models, batch, batch, device)

    def run(counter: type[Counter]) -> dict[str, Counter]:
        counters = {stage: counter() for stage in STAGES}
        objective.stage = counters.__getitem__
        loss, _ = objective.loss(objective.draw(keys.rows, keys.epoch))
        with counters["backward"]:
            loss.backward()
        objective.module.zero_grad()
        return counters

    run(OperatorCalls)
    calls = run(OperatorCalls)
    with use_provider(COMPOSED):  # whole layers are the CPU's
        run(OperatorCalls)
        launches = run(PredictedLaunches)
    return {stage: Counts(calls[stage].calls.total(), launches[stage].launches) for stage in STAGES}


if __name__ == "__main__":
    entry.run(main)
