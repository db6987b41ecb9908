"""Shared by all tests: one thread, and small data sets on disk."""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmmkd.data import store
from fastmmkd.data.dataset import Dataset, Split

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what runs in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)


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
    return Split.from_padded(
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
    return make_config(tiny_store)


def make_config(path: Path) -> dict:
    return {
        "method": "umdf",
        "data": {"path": str(path)},
        "model": {"width": 8, "heads": 2, "mcim_layers": 1, "encoder_layers": 1},
        "train": {
            "task": "regression",
            "batch_size": 8,
            "epochs": 3,
            "seeds": [1],
            "select": "f1_non0",
            "log_every": 1,
        },
        "eval": {"sweep": [0.0, 0.5, 1.0]},
        "deepspeed": {
            "optimizer": {
                "type": "Adam",
                "params": {"lr": 0.003, "torch_adam": True, "adam_w_mode": False, "weight_decay": 0.0},
            },
            "gradient_clipping": 1.0,
        },
    }


@contextmanager
def contained_process() -> Iterator[None]:
    """Undo what training does to its process: environment variables, torch's global switches."""
    environment, threads = dict(os.environ), torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(environment)
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


@pytest.fixture
def process_state() -> Iterator[None]:
    """For tests that run a training command in this process."""
    with contained_process():
        yield


@pytest.fixture(scope="session")
def train_tiny() -> Callable[..., Path]:
    """`train_tiny(raw_config, output, resume=False, stop_after=None, results=False, teacher=None)`: a run in here.

    stop_after: a signal to stop arrives during this step (counted over the whole call).
    results: also write tables and plots, which takes longer than a tiny training.
    teacher: `--teacher`.
    """
    from fastmmkd.config import parse_config
    from fastmmkd.engine import interruption, run

    class Stopping(interruption.InterruptionWatch):
        step, stop_after = 0, 0

        def agreed(self, device: torch.device, at_agreement: bool) -> bool:
            Stopping.step += 1
            self.requested |= Stopping.step == Stopping.stop_after
            return super().agreed(device, at_agreement)

    def train(
        raw: dict[str, Any],
        output: Path,
        resume: bool = False,
        stop_after: int | None = None,
        results: bool = False,
        teacher: Path | None = None,
    ) -> Path:
        Stopping.step, Stopping.stop_after = 0, stop_after or 0
        with contained_process(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "InterruptionWatch", Stopping)
            if not results:
                patch.setattr(run, "write_run_results", lambda *arguments: None)
            return run.train_run(parse_config(raw), output, resume, teacher)

    return train


@pytest.fixture(scope="session")
def trained(train_tiny: Callable[..., Path], tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run of the tiny config with seeds 1 and 2; shared, so do not change it."""
    raw = make_config(tiny_store)
    raw["train"]["seeds"] = [1, 2]
    return train_tiny(raw, tmp_path_factory.mktemp("runs") / "tiny", results=True)


@pytest.fixture(scope="session")
def tiny_dataset() -> Callable[..., Dataset]:
    """`tiny_dataset(steps=(6, 6, 6), dims=(5, 4, 3))`: what `tiny_store` holds, or the like, in memory."""
    return make_dataset


@pytest.fixture(scope="session")
def tiny_config_of() -> Callable[[Path], dict]:
    """`tiny_config_of(path)`: `tiny_config` on another data file, and in fixtures of a wider scope."""
    return make_config


@pytest.fixture(scope="session")
def distilled_config_of() -> Callable[[str, Path], dict]:
    """`distilled_config_of(method, path)`: the like of `tiny_config` for a method with a teacher; two epochs each."""

    def make(method: str, path: Path) -> dict:
        raw = make_config(path)
        teacher = {"epochs": 2, "accept_floor": True}  # ten steps may not get it off the floor
        raw |= {"method": method, "teacher": teacher, "loss": {"statistics_width": 8}}
        raw["model"] = {"width": 8, "heads": 2, "encoder_layers": 1}
        raw["train"] |= {"epochs": 2, "select": "mae"}
        return raw

    return make
