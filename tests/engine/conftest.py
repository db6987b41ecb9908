"""Runs of two phases, a teacher and its student, small; data files made for one test."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest

from fastmmkd import run_results
from fastmmkd.data import store
from fastmmkd.data.dataset import Dataset
from fastmmkd.evaluation import plots
from tests.handmade import lacking

only_corrkd = pytest.mark.parametrize("method", ["corrkd"], indirect=True)


@pytest.fixture(scope="module", params=["corrkd", "hrlf"])
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def raw(method: str, tiny_store: Path, distilled_config_of: Callable[[str, Path], dict]) -> dict:
    """A config of 2 x 5 steps of the teacher and as many of the student."""
    return distilled_config_of(method, tiny_store)


@pytest.fixture(scope="session")
def distilled_of(
    train_tiny: Callable[..., Path],
    tiny_store: Path,
    distilled_config_of: Callable[[str, Path], dict],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Path]:
    """`distilled_of(method)`: a finished run with seeds 1 and 2, trained once."""

    @functools.cache
    def train(method: str) -> Path:
        config = distilled_config_of(method, tiny_store)
        config["train"]["seeds"] = [1, 2]
        return train_tiny(config, tmp_path_factory.mktemp("distilled") / method)

    return train


@pytest.fixture
def distilled(method: str, distilled_of: Callable[[str], Path]) -> Path:
    """The folder of a finished run with seeds 1 and 2; shared, so do not change it."""
    return distilled_of(method)


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the trainings."""
    monkeypatch.setattr(plots, "curves", lambda path, runs: path.touch())
    monkeypatch.setattr(plots, "confusion", lambda path, results: path.touch())
    monkeypatch.setattr(run_results, "draw_embedding", lambda *arguments: None)


def stored(dataset: Dataset, path: Path) -> str:
    store.write(dataset, path)
    return str(path)


def without_language(dataset: Dataset, train: int, valid: int) -> Dataset:
    """The first samples of both splits lack language."""
    for name, count in (("train", train), ("valid", valid)):
        dataset.splits[name] = lacking(dataset.splits[name], "language", slice(count))
    return dataset
