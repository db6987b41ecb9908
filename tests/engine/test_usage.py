"""Memory and energy of a training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastmmkd.engine import usage
from fastmmkd.engine.usage import Usage, of_packages


def set_counter(powercap: Path, name: str, joules: float) -> None:
    (powercap / name).mkdir(parents=True, exist_ok=True)
    (powercap / name / "energy_uj").write_text(f"{round(joules * 1e6)}\n")
    (powercap / name / "max_energy_range_uj").write_text("1000000000\n")


def test_energy_of_every_package_but_not_of_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "POWERCAP", tmp_path)
    for name, joules in (("intel-rapl:0", 100), ("intel-rapl:1", 990), ("intel-rapl:0:0", 50)):
        set_counter(tmp_path, name, joules)
    taken = Usage(torch.device("cpu"))
    set_counter(tmp_path, "intel-rapl:0", 130)
    set_counter(tmp_path, "intel-rapl:1", 5)  # it began anew at 1000
    set_counter(tmp_path, "intel-rapl:0:0", 60)
    assert taken.take()["joules"] == pytest.approx(30 + 15)
    assert taken.take()["joules"] == 0


def test_without_counters_there_is_no_energy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage, "POWERCAP", tmp_path / "none")
    assert set(Usage(torch.device("cpu")).take()) == {"peak_memory_mb"}
    set_counter(tmp_path / "none", "intel-rapl:0", 1)
    (tmp_path / "none" / "intel-rapl:0" / "max_energy_range_uj").unlink()
    assert of_packages(tmp_path / "none") == {}


def test_memory_is_that_of_the_process() -> None:
    taken = Usage(torch.device("cpu"))
    before = taken.take()["peak_memory_mb"]
    held = torch.ones(before_bytes := int(before * 1e6) // 4 + 20_000_000)  # as much again, and more
    assert taken.take()["peak_memory_mb"] >= before
    assert taken.take()["peak_memory_mb"] > 4 * before_bytes / 1e6
    del held
