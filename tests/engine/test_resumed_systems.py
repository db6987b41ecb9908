"""Systems that the papers compare with, interrupted and resumed: phases, centroids, inner steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_records import assert_same_phase, engine_state, parameters

import fastmmkd
from fastmmkd.engine import step, trainer
from fastmmkd.errors import Interrupted
from tests.engine.fake_capture import FakeCapture
from tests.handmade import small_config_of

BATCHES = 5
"""Of an epoch."""


def raw_of(method: str, path: Path) -> dict[str, Any]:
    """Its MOSI config, small, for two epochs of each phase."""
    raw = small_config_of(method, path, batch=8)
    raw["train"] |= {"epochs": 2, "seeds": [1], "log_every": 1}
    raw["eval"]["sweep"] = []
    if "teacher" in raw:
        raw["teacher"] |= {"epochs": 2, "accept_floor": True}
    return raw


@pytest.mark.parametrize(
    ("method", "stops", "phases"),
    [("transm", [7], [""]), ("gcnet", [7], [""]), ("smil", [3, 2 * BATCHES + 7], ["pretrain", ""])],
)
def test_an_interrupted_run_ends_as_one_left_alone(
    method: str, stops: list[int], phases: list[str], train_tiny: Callable[..., Path], tiny_store: Path, tmp_path: Path
) -> None:
    raw = raw_of(method, tiny_store)
    expected = train_tiny(raw, tmp_path / "expected")
    for stop_after in stops:
        run = tmp_path / f"run_{stop_after}"
        with pytest.raises(Interrupted):
            train_tiny(raw, run, stop_after=stop_after)
        train_tiny(raw, run, resume=True)
        for phase in phases:
            assert_same_phase(run, expected, 1, phase)


@pytest.mark.parametrize("mode", ["fwdbwd", "step"])
def test_inner_steps_are_replayed(
    mode: str, train_tiny: Callable[..., Path], tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = raw_of("smil", tiny_store)
    raw["loss"] |= {"inner_lr": 0.1, "inner_decay": 3}
    expected = train_tiny(raw, tmp_path / "eager")
    monkeypatch.setattr(step._Replayed, "capture", FakeCapture)
    monkeypatch.setattr(trainer, "graph_mode", lambda *_: (mode, None))
    replayed = train_tiny(raw, tmp_path / "replayed")
    torch.testing.assert_close(parameters(replayed), parameters(expected), rtol=1e-4, atol=1e-5)
    states = [next(s["module"] for s in engine_state(run).values() if "module" in s) for run in (replayed, expected)]
    assert torch.equal(states[0]["steps.values"], states[1]["steps.values"])


def test_centroids_are_exported_and_steps_are_not(
    train_tiny: Callable[..., Path], tiny_store: Path, tmp_path: Path
) -> None:
    raw = raw_of("smil", tiny_store)
    run = train_tiny(raw, tmp_path / "run")
    (state,) = [s["module"] for s in engine_state(run).values() if "module" in s]
    assert state["steps.values"].tolist() == [[2 * BATCHES]]
    exported = parameters(run)
    assert "steps.values" not in exported
    assert not any("picks" in name for name in state)
    centroids = exported["imputation.centroids"]
    assert centroids.shape == (1, 3, raw["model"]["centroids"], raw["model"]["width"])
    assert len(centroids[0].flatten(0, 1).unique(dim=0)) > 3
    torch.testing.assert_close(fastmmkd.load(run).module.imputation.centroids, centroids)
    reused = train_tiny(raw, tmp_path / "reused", teacher=run)
    assert not (reused / "seed_1" / "pretrain" / "metrics.jsonl").exists()
    assert_same_phase(reused, run)
