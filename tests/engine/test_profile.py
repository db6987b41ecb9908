"""`fastmmkd profile` on tiny trainings: a trace, and times that add up."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastmmkd.cli import main
from fastmmkd.config import parse_config
from fastmmkd.engine import profile
from fastmmkd.engine.floor import Floor, saved_bytes

pytestmark = pytest.mark.usefixtures("process_state")


@pytest.fixture
def profiled(tiny_store: Path, distilled_config_of: Callable[[str, Path], dict], tmp_path: Path) -> profile.Profile:
    return profile.profile_steps(parse_config(distilled_config_of("hrlf", tiny_store)), 2, tmp_path)


def test_a_student_with_its_teacher(profiled: profile.Profile, tmp_path: Path) -> None:
    assert list(profiled.stages) == list(profile.STAGES)
    assert 0.5 * profiled.seconds < sum(profiled.stages.values()) <= profiled.seconds
    modules = {"embedding", "encoders", "frf", "stack", "head", "statistics", "discriminators"}
    assert set(profiled.modules) == modules
    assert sum(profiled.modules.values()) < profiled.stages["teach"] + profiled.stages["loss"]
    assert profiled.launches is None
    assert profiled.calls == int(profiled.calls) > 500
    assert len(profiled.operators) == profile.TOP
    seconds = [operator_seconds for _, operator_seconds, _ in profiled.operators]
    assert seconds == sorted(seconds, reverse=True)
    assert 0 < profiled.outside < profiled.seconds
    names = {event.get("name") for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]}
    assert {"stage backward", "module encoders"} <= names


def test_the_command_prints_the_tables(tiny_config: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(tiny_config))
    assert main(["profile", "--config", str(path), "--steps", "1", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "host work outside of operators" in text
    assert "mcim" in text
    assert (tmp_path / "out" / "trace.json").exists()
    assert main(["profile", "--config", str(path), "--steps", "0"]) == 2


def test_the_floor_is_the_slower_of_moving_and_computing() -> None:
    least = Floor(parameter_bytes=100, saved_bytes=500, operations=10, bytes_per_second=1e3, operations_per_second=1.0)
    assert least.bytes == 10 * 100 + 2 * 500
    assert least.seconds == 10.0
    assert Floor(100, 500, 10, 1e3, 1e3).seconds == 2.0


def test_what_autograd_keeps_is_counted_once() -> None:
    layer = torch.nn.Linear(4, 3, bias=False)
    x = torch.randn(5, 4, requires_grad=True)
    assert saved_bytes(lambda: (layer(x) * x.sum()).exp().sum(), layer) == 4 * (5 * 4 + 5 * 3 + 1 + 5 * 3)
