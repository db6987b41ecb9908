"""docs/methods.md: what each method is trained for and how, read off METHODS and the shipped configs."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch

from bench.workload import random_dataset, shape_of
from fastmmkd.blocks import Config
from fastmmkd.config import parse_config, read_config
from fastmmkd.data.batches import View
from fastmmkd.engine.phases import phases_of, untrained
from fastmmkd.errors import UserError
from fastmmkd.evaluation import tables
from fastmmkd.methods import METHODS
from fastmmkd.nn.models import Bank

CONFIGS = Path(__file__).parents[1] / "configs"
DATA = {"mosi": "MOSI", "mosei": "MOSEI", "iemocap": "IEMOCAP", "ict_mmmo": "ICT-MMMO", "cmu_mosi": "CMU-MOSI"}
"""Data sets as configs name them -> as people do."""
KINDS = {"regression": "scores", "classification-3": "classes", "emotions-binary": "emotions"}
"""A task of each kind."""
SEEN = {
    (View.COMPLETE,): "complete samples",
    (View.MISSING,): "missing versions",
    (View.MISSING, View.MISSING_2): "two missing versions",
    (View.MISSING, View.COMPLETE): "missing versions, and complete ones",
    (View.MISSING, View.MISSING_2, View.COMPLETE): "two missing versions, and complete ones",
}


@cache
def parts() -> dict[str, str]:
    """The generated part: a row for each method, the first published first."""
    header = ["method", "phases", "is trained on", *DATA.values(), "accepts", "seeds at once", "one graph", "keeps"]
    return {"features": tables.markdown_table(header, [_row(name) for name in METHODS])}


def _row(name: str) -> list[str]:
    method = METHODS[name]
    configs = {data: CONFIGS / f"{name}_{data}.json" for data in DATA}
    trained = {
        data: read_config(file, [])["train"]["task"] if file.exists() else tables.NONE for data, file in configs.items()
    }
    raw = read_config(configs["mosi"], [])
    config = parse_config(raw)
    spec, module = untrained(
        config,
        random_dataset(config, shape_of(config), config.train.batch_size),
        (1,),
        torch.device("cpu"),
        torch.float32,
    )
    seen = SEEN[spec.views] if config.missing.enabled or View.COMPLETE in spec.views else SEEN[(View.COMPLETE,)]
    kept = [where.rpartition(".")[2] for where, part in module.named_modules() if isinstance(part, Bank)]
    return [
        f"`{name}`, {method.title}",
        ", ".join(phase.name for phase in phases_of(config)),
        seen,
        *trained.values(),
        ", ".join(kind for task, kind in KINDS.items() if accepts(raw, task)),
        "yes" if method.grouped else "no",
        "whole step" if len(module.parameter_groups()) == 1 else "forward and backward",
        ", ".join(dict.fromkeys(kept)) or tables.NONE,
    ]


def accepts(raw: dict[str, Any], task: str) -> bool:
    """Whether a method's config is one with another task."""
    try:
        return isinstance(parse_config(raw | {"train": raw["train"] | {"task": task}}), Config)
    except UserError:
        return False
