"""Benchmark tables from what pytest-benchmark writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import records, table
from fastmmkd.errors import UserError


def measured(group: str, name: str, median: float) -> dict:
    return {
        "group": group,
        "name": name,
        "extra_info": {"baselines": ["plain", "other"]},
        "stats": {"median": median, "q1": 0.9 * median, "q3": 1.1 * median, "rounds": 30},
    }


@pytest.fixture
def file(tmp_path: Path) -> Path:
    report = {
        "datetime": "2026-01-02T03:04:05",
        "machine_info": {"node": "secret-name", "cpu": {"brand_raw": "A CPU"}},
        "benchmarks": [
            measured("op", "plain", 0.030),
            measured("op", "ours", 0.010),
            measured("step", "other", 0.5),
            measured("step", "ours", 0.2),
        ],
    }
    path = tmp_path / "bench.json"
    path.write_text(json.dumps(report))
    return path


def test_ratios_are_to_ours(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(records, "FOLDER", tmp_path / "speed")
    assert table.main([str(file), "--record"]) == 0
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines() if line]
    assert rows[2:-1] == [
        ["op", "plain", "30", "27 to 33", "30", "3.00"],
        ["op", "ours", "10", "9 to 11", "30", "–"],
        ["step", "other", "500", "450 to 550", "30", "2.50"],
        ["step", "ours", "200", "180 to 220", "30", "–"],
    ]
    ((_, kept),) = records.newest().items()
    assert (kept["kind"], kept["date"]) == ("kernels", "2026-01-02")
    assert "secret-name" not in json.dumps(kept)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.ratios(kept).splitlines()]
    assert lines[0] == ["times as long as ours", "plain", "other"]
    assert lines[2:] == [["op", "3.0", "–"], ["step", "–", "2.5"]]


def test_a_record_prints_again(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(records, "FOLDER", tmp_path / "speed")
    table.main([str(file), "--record"])
    *first, path = capsys.readouterr().out.splitlines()
    assert table.main([path]) == 0
    assert capsys.readouterr().out.splitlines() == first


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match="not a pytest-benchmark JSON file"):
        table.main([str(tmp_path / "x.json")])
