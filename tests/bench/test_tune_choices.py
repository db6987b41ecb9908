"""Tuning in a hurry: the most important kernels first, and nothing half measured in the table."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import tune
from bench.choices import BY_IMPORTANCE
from fastmmkd.errors import UserError
from fastmmkd.kernels.parameters import Asked
from fastmmkd.ops.providers import HAS_TRITON
from fastmmkd.testing.specimens import Specimen

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """One is pretended; the table's path."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tune.providers, "INTERPRETED", False)
    monkeypatch.setattr(tune.providers, "obstacle", lambda *args: "")
    monkeypatch.setattr(tune, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune, "TABLE", tmp_path / "table.json")
    return tmp_path / "table.json"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[Specimen], list[torch.dtype]]]:
    """What was measured, operation by operation; nothing is."""
    measured: list[tuple[list[Specimen], list[torch.dtype]]] = []
    monkeypatch.setattr(
        tune, "measure", lambda calls, dtypes, *args: measured.append((list(calls), dtypes)) or iter(())
    )
    return measured


@pytest.mark.usefixtures("on_a_gpu")
def test_what_matters_most_comes_first(calls: list[tuple[list[Specimen], list[torch.dtype]]]) -> None:
    assert tune.main([]) == 0
    assert [{x.op for x in specimens} for specimens, _ in calls] == [{op} for op in BY_IMPORTANCE]
    for specimens, dtypes in calls:
        assert dtypes == [torch.bfloat16, torch.float32, torch.float16]
        assert [x.main for x in specimens] == sorted((x.main for x in specimens), reverse=True)
    everything = sum(len(specimens) for specimens, _ in calls)
    calls.clear()
    assert tune.main(["--main", "--dtype", "fp32,bf16", "--op", "missing_draw", "cross_attention"]) == 0
    assert [{x.op for x in specimens} for specimens, _ in calls] == [{"cross_attention"}, {"missing_draw"}]
    assert all(x.main for specimens, _ in calls for x in specimens)
    assert [dtypes for _, dtypes in calls] == [[torch.bfloat16, torch.float32]] * 2
    assert sum(len(specimens) for specimens, _ in calls) < everything / 4


def test_it_stops_in_time_and_keeps_what_it_has(
    on_a_gpu: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0

    def timer(call: Callable[[], Any], milliseconds: float) -> float:
        nonlocal now
        now += 1.0
        return 1.0

    monkeypatch.setattr(tune.time, "monotonic", lambda: now)
    monkeypatch.setattr(tune, "seconds", timer)
    monkeypatch.setattr(Specimen, "call", lambda self, make: lambda: None)
    asked = [Asked("a_kernel", "n=16", {"BR": 16})]
    monkeypatch.setattr(tune, "trying", lambda candidate: Trying(asked))
    candidates = len(tune.specimens()[0].module.CANDIDATES)
    op = ["--main", "--op", "cross_attention", "missing_draw", "--dtype", "bf16,fp32"]
    assert tune.main([*op, "--seconds", str(candidates // 2)]) == 0
    assert not on_a_gpu.exists()  # not one call was measured to its end
    now = 0.0
    assert tune.main([*op, "--seconds", str(candidates + 3)]) == 0
    assert json.loads(on_a_gpu.read_text()) == {"sm_90": {"a_kernel": {"n=16": {"BR": 16}}}}
    assert now == candidates + 4
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "missing_draw: skipped, no time left",
        "a_kernel n=16: BR=16",
        "missing_draw: skipped, no time left",
    ]


class Trying:
    """Stands in for `trying`."""

    def __init__(self, asked: list[Any]) -> None:
        self.asked = asked

    def __enter__(self) -> list[Any]:
        return self.asked

    def __exit__(self, *error: object) -> None: ...


def test_bad_arguments_are_refused() -> None:
    for given, message in (
        (["--op", "softmax"], "no such operation"),
        (["--dtype", "int8"], "no such precision"),
        (["--seconds", "nan"], "expected more than 0"),
        (["--quick"], "unrecognized arguments: --quick; --help lists the arguments"),
    ):
        with pytest.raises(UserError, match=message):
            tune.main(given)
