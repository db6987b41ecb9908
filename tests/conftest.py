"""Shared by all tests: one thread, and small data sets on disk."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from pathlib import Path

import numpy as np
import pytest
import torch

from fastmmkd.data import store
from fastmmkd.data.dataset import Dataset, Split

torch.set_num_threads(1)


def make_split(samples: int, steps: tuple[int, int, int], dims: tuple[int, int, int], seed: int, name: str) -> Split:
    """A split with planted signal: every modality's first feature carries the score."""
    rng = np.random.default_rng(seed)
    labels = np.round(rng.uniform(-3, 3, samples) * 5) / 5
    lengths = rng.integers(2, min(steps) + 1, samples)
    features = {}
    for modality, t, d in zip(("language", "audio", "visual"), steps, dims, strict=True):
        x = rng.normal(size=(samples, t, d)).astype(np.float32)
        x[..., 0] += labels[:, None]
        x[np.arange(t)[None, :] < t - lengths[:, None]] = 0
        features[modality] = x
    return Split(
        features=features,
        lengths=np.repeat(lengths[:, None], 3, axis=1).astype(np.int32),
        present=np.ones((samples, 3), dtype=bool),
        labels=labels.astype(np.float32),
        ids=[f"{name}/{i}" for i in range(samples)],
    )


def make_dataset(steps: tuple[int, int, int] = (6, 6, 6), dims: tuple[int, int, int] = (5, 4, 3)) -> Dataset:
    sizes = {"train": 40, "valid": 12, "test": 14}
    splits = {name: make_split(n, steps, dims, seed, name) for seed, (name, n) in enumerate(sizes.items())}
    return Dataset(splits=splits, label_kind="score", source="tiny test data", importer="synthetic")


@pytest.fixture(scope="session")
def tiny_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An aligned data set of 40/12/14 samples, 6 frames, 5/4/3 features."""
    path = tmp_path_factory.mktemp("data") / "tiny.h5"
    store.write(make_dataset(), path)
    return path


@pytest.fixture
def tiny_config(tiny_store: Path) -> dict:
    """A config that trains in a second."""
    return {
        "method": "umdf",
        "data": {"path": str(tiny_store)},
        "model": {"width": 8, "heads": 2, "mcim_layers": 1, "encoder_layers": 1},
        "train": {"task": "regression", "batch_size": 8, "epochs": 3, "seeds": [1], "log_every": 1},
        "eval": {"sweep": [0.0, 0.5, 1.0]},
        "deepspeed": {
            "optimizer": {
                "type": "Adam",
                "params": {"lr": 0.003, "torch_adam": True, "adam_w_mode": False, "weight_decay": 0.0},
            },
            "gradient_clipping": 1.0,
        },
    }
