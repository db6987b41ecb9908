"""Shared by the tests of whole steps: a tiny config of each method, and contenders on it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import lineup
from bench.contenders import Contender
from bench.workload import Shape, random_dataset
from fastmmkd.blocks import Config
from fastmmkd.config import parse_config
from fastmmkd.data.dataset import Dataset

CPU, SHAPE = torch.device("cpu"), Shape(6, (5, 4, 3), "mosei")

Build = Callable[..., dict[str, Contender]]


@pytest.fixture(params=["umdf", "corrkd", "hrlf"])
def config(
    request: pytest.FixtureRequest,
    tiny_config: dict,
    distilled_config_of: Callable[[str, Path], dict],
    tiny_store: Path,
) -> Config:
    return parse_config(tiny_config if request.param == "umdf" else distilled_config_of(request.param, tiny_store))


@pytest.fixture
def dataset(config: Config) -> Dataset:
    return random_dataset(config, SHAPE, 2 * config.train.batch_size)


@pytest.fixture
def build(config: Config, dataset: Dataset) -> Build:
    """`build("ours", dtype=torch.float32)`: contenders by name; two models where there are several."""

    def make(*names: str, dtype: torch.dtype = torch.float32) -> dict[str, Contender]:
        return {name: lineup.build(name, config, dataset, 2, CPU, dtype) for name in names}

    return make
