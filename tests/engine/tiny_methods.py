"""The three methods, small, two models at once, on resident data; and their loss as a function of index vectors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmmkd.config import parse_config
from fastmmkd.data import store
from fastmmkd.engine.step import untrained_objective
from tests.conftest import make_dataset

MODELS = 2
BATCH = 8
LAYERS: dict[str, dict[str, Any]] = {
    "umdf": {"mcim_layers": 1, "encoder_layers": 1},
    "corrkd": {"encoder_layers": 1},
    "hrlf": {"encoder_layers": 1},
}
METHODS = tuple(LAYERS)


def build(
    method: str,
    task: str,
    folder: Path,
    steps: tuple[int, int, int] = (6, 6, 6),
    device: str = "cpu",
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.nn.Module, Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]:
    """A method's module and `loss(rows [S, B], epoch [])`: the scalar to minimise, and the parts `[parts, S]`.

    dtype: of the features and the teacher; the module is fp32.
    """
    path = folder / "data.h5"
    store.write(make_dataset(steps), path)
    raw = {
        "method": method,
        "data": {"path": str(path)},
        "model": {"width": 8, "heads": 2, "dropout": dropout} | LAYERS[method],
        "teacher": None if method == "umdf" else {"epochs": 1},
        "train": {"task": task, "batch_size": BATCH, "epochs": 1},
        "deepspeed": {"optimizer": {"type": "Adam"}},
    }
    config, at = parse_config(raw), torch.device(device)
    objective = untrained_objective(config, store.read(path), range(1, MODELS + 1), at, dtype)
    objective.module.float()
    objective.split.room = [int(np.sort(rows)[-BATCH:].sum()) for rows in objective.split.rows.T]

    def loss(rows: torch.Tensor, epoch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total, parts = objective.loss(objective.draw(rows, epoch))
        return total, torch.stack(list(parts.values()))

    return objective.module, loss
