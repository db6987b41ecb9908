"""What DeepSpeed's engine adds to a step, against a bare loop with the same clipping and Adam."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench.contenders import Contender
from bench.rounds import WHOLE, Clock, quantiles, time_all
from fastmmkd.blocks import Config
from fastmmkd.data.dataset import Dataset
from fastmmkd.engine.device import place, start_deepspeed, wrap
from fastmmkd.engine.step import EagerSteps, Objective, untrained_objective

BARE = "bare loop"
AS_CONFIGURED = "as configured"
REDUCED = "ZeRO 0, reduced"
"""With the all-reduce that `fastmmkd.engine.device.wrap` spares one process."""

Block = dict[str, Any]


class Engine(Contender):
    """The step as the trainer takes it, operation by operation."""

    def __init__(self, config: Config, objective: Objective, block: Block, deepspeed: Any, log_file: Path) -> None:
        super().__init__(config, objective)
        self.engine = wrap(deepspeed, objective.module, block, log_file)
        self.take = EagerSteps(self.engine, objective, None)

    def __call__(self, i: int, clock: Clock) -> None:
        """One step, stage by stage."""
        keys = self.keys(i)
        self.take.stage = self.objective.stage = clock.stage
        self.take(keys.rows, keys.epoch, [])


def blocks(block: Block) -> dict[str, Block]:
    """The `deepspeed` block, and with one thing changed each: name -> block."""

    def changed(change: Callable[[Block], Any]) -> Block:
        other = copy.deepcopy(block)
        change(other)
        return other

    half = any(block.get(key, {}).get("enabled") for key in ("fp16", "bf16"))
    stages = (1, 2) if half else (0, 1, 2)
    named = {AS_CONFIGURED: block}
    named |= {f"ZeRO {n}": copy.deepcopy(block) | {"zero_optimization": {"stage": n}} for n in stages}
    if not half:
        named[REDUCED] = named["ZeRO 0"]
    named["no clipping"] = changed(lambda b: b.update(gradient_clipping=0.0))
    named["no scheduler"] = changed(lambda b: b.pop("scheduler", None))
    return named


def overhead(config: Config, dataset: Dataset, runs: int, device: torch.device) -> dict[str, Any]:
    """Engines with each configuration item, in turns with the bare loops that do the same; precision as configured."""
    placement = place(config)

    def fresh() -> Objective:
        return untrained_objective(config, dataset, [1], device, placement.dtype)

    with tempfile.TemporaryDirectory() as folder:
        log_file = Path(folder) / "deepspeed.log"
        deepspeed = start_deepspeed(placement, log_file)
        bare, unclipped = Contender(config, fresh()), Contender(config, fresh())
        unclipped.clip = 0.0
        engines = {
            name: Engine(config, fresh(), copy.deepcopy(block), deepspeed, log_file)
            for name, block in blocks(placement.deepspeed).items()
        }
        if REDUCED in engines:
            engines[REDUCED].engine.enable_backward_allreduce = True
        seconds = time_all({BARE: bare, "bare loop, no clipping": unclipped, **engines}, runs, device)
        for engine in engines.values():
            engine.engine.destroy()
    return {"runs": runs, "engines": _compared(seconds, list(engines))}


def _compared(seconds: dict[str, dict[str, np.ndarray]], engines: list[str]) -> list[dict[str, Any]]:
    """Against the bare loop of the same clipping; the difference is the median of those within a round."""
    listed = [{"name": BARE, "step ms": quantiles(seconds[BARE][WHOLE]), "overhead ms": 0.0, "overhead %": 0.0}]
    for name in engines:
        bare = seconds["bare loop, no clipping" if name == "no clipping" else BARE][WHOLE]
        difference = float(np.median(seconds[name][WHOLE] - bare))
        listed.append(
            {
                "name": name,
                "step ms": quantiles(seconds[name][WHOLE]),
                "overhead ms": 1e3 * difference,
                "overhead %": 100 * difference / float(np.median(bare)),
            }
        )
    return listed
