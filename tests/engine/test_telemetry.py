"""What a person sees of a run, and what is kept of it."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from operator import mul
from pathlib import Path

import pytest
from rich.console import Console

from fastmmkd.engine import telemetry
from fastmmkd.engine.telemetry import Journal, Telemetry

ROOT = Path(__file__).parents[2]
PARTS = {"loss": 4.5921, "task": 4.0019, "fea": 0.543, "logits": 0.047}
RECORD = {"step": 5, "train": PARTS, "valid": {"f1_non0": 38.5, "corr": float("nan")}, "engine": {"lr": 0.003}}


class Clock:
    """`time` that passes only when told."""

    now = 0.0

    @classmethod
    def monotonic(cls) -> float:
        return cls.now


def console(terminal: bool, columns: int = 80) -> tuple[Console, io.StringIO]:
    screen = io.StringIO()
    return Console(file=screen, force_terminal=terminal, width=columns, color_system=None), screen


def journal(directory: Path) -> tuple[Journal, io.StringIO]:
    shown, screen = console(terminal=False)
    return Journal(directory, "umdf seed 1", 0, shown, silent=False), screen


@pytest.mark.parametrize("columns", [80, 160])
def test_the_bar_shows_losses_rate_and_time_left(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    monkeypatch.setattr(telemetry, "time", Clock)
    monkeypatch.setattr(Clock, "now", 100.0)
    terminal, screen = console(terminal=True, columns=columns)
    shown = Telemetry("umdf seed 1", 3000, 1000, lambda steps, seconds: steps * seconds + 60, terminal, silent=False)
    shown._progress.get_time = lambda: Clock.now
    with shown:
        for step in (1100, 1200):
            Clock.now += 10.0
            shown.step(step, 32, PARTS)
        shown._progress.refresh()
    lines = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue()).splitlines()]
    bar = next(line for line in reversed(lines) if "1200/3000" in line)
    assert bar.startswith("umdf seed 1 ")
    assert bar.endswith("320 samples/s")  # 200 steps of 32 in 20 seconds
    assert "0:04:00 left" in bar  # 1800 steps at 10 a second, and a minute for the rest of the run
    assert "  loss 4.592  task 4.002  fea 0.543  logits 0.047" in lines
    assert max(map(len, lines)) <= columns


def test_a_log_file_gets_one_whole_line_an_epoch_and_no_bar(tmp_path: Path) -> None:
    kept, screen = journal(tmp_path)
    line = "epoch 1/3  " + "x" * 100
    with kept, Telemetry("umdf seed 1", 3000, 0, mul, kept.console, silent=False) as shown:
        shown.step(5, 8, PARTS)
        kept.epoch({"epoch": 1} | RECORD, line)
    assert screen.getvalue() == f"umdf seed 1 {line}\n"


def test_records_are_json_with_null_for_what_has_no_value(tmp_path: Path) -> None:
    kept, _ = journal(tmp_path)
    with kept:
        kept.epoch({"epoch": 1} | RECORD, "")
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"epoch": 1} | RECORD | {
        "valid": {"f1_non0": 38.5, "corr": None}
    }


def test_rewinding_forgets_later_epochs_and_a_line_that_was_cut_off(tmp_path: Path) -> None:
    kept, _ = journal(tmp_path)
    with kept:
        for epoch in (1, 2, 3):
            kept.epoch({"epoch": epoch} | RECORD, "")
        path = tmp_path / "metrics.jsonl"
        with path.open("a") as file:
            file.write('{"epoch": 4, "st')
        kept.rewind(2)
        assert [json.loads(line)["epoch"] for line in path.read_text().splitlines()] == [1, 2]
        kept.rewind(0)
        assert path.read_text() == ""


def test_a_silent_one_writes_nothing(tmp_path: Path) -> None:
    terminal, screen = console(terminal=True)
    with (
        Telemetry("", 10, 0, mul, terminal, silent=True) as shown,
        Journal(tmp_path, "", 0, terminal, silent=True) as kept,
    ):
        kept.rewind(0)
        shown.step(1, 8, PARTS)
        kept.epoch({"epoch": 1} | RECORD, "x")
    assert screen.getvalue() == ""
    assert list(tmp_path.iterdir()) == []


def test_training_goes_on_without_whoever_was_told() -> None:
    """A terminal that is closed, or an ssh that is gone, ends nothing."""
    code = (
        "import sys\nfrom fastmmkd.engine.telemetry import Terminal\nterminal = Terminal()\n"
        "for _ in range(1000):\n    terminal.print('x' * 1000)\nprint('it went on', file=sys.stderr)"
    )
    command = [sys.executable, "-c", f"{code}\nprint('and on')"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT, text=True) as process:
        assert process.stdout
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr
        assert process.stderr.read() == "it went on\n"
    assert process.returncode == 0


def test_a_line_in_a_log(tmp_path: Path) -> None:
    telemetry.note_in(tmp_path / "a.log", "saved")
    telemetry.note_in(tmp_path / "nothing" / "a.log", "saved")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ saved\n", (tmp_path / "a.log").read_text())
