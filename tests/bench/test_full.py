"""Runs of the papers' configs to their end: what is taken over of them, and the table."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench import full
from fastmmkd.errors import UserError


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(full, "RECORDS", tmp_path / "records")
    return tmp_path / "records" / full.FULL


def test_a_run_becomes_a_row_for_each_phase(records: Path, trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "umdf_mosi"
    shutil.copytree(trained, run)
    seed = next(run.glob("seed_*"))
    shutil.copytree(seed, seed / "teacher", ignore=shutil.ignore_patterns("checkpoints"))
    full.take_full(tmp_path / "runs")
    assert {path.name for path in (records / "umdf_mosi").iterdir()} == {"results.json", "run.json", "phases.json"}
    journal = [json.loads(line) for line in (seed / "metrics.jsonl").read_text().splitlines()]
    teacher, last = json.loads((records / "umdf_mosi" / "phases.json").read_text())
    assert (teacher["phase"], last["phase"]) == ("teacher", full.LAST)
    assert last["epochs"] == len(journal)
    assert last["training seconds"] == pytest.approx(sum(record["engine"]["seconds"] for record in journal))
    assert last["peak memory MB"] > 100
    assert last["validation seconds"] > 0
    *_, first, second = full.parts()["full"].splitlines()
    assert first.startswith("| `umdf_mosi` | teacher | ")
    assert second.split("|")[2].strip() == "last"
    assert float(second.split("|")[-2]) > 0


def test_nothing_to_take(records: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no finished run, expected what `make full` leaves"):
        full.take_full(tmp_path)
    assert set(full.parts().values()) == {"Not yet run.\n"}
