"""The parity report and the benchmark of the data path."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import data_path, parity, records
from fastmmkd.errors import UserError
from fastmmkd.ops import OPERATIONS, extension, reference

CPU = torch.device("cpu")
needs_kernels = pytest.mark.skipif(bool(extension.missing), reason=extension.missing or "-")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(parity, "ATTENTION", [(1, 2, 5, (5, 3), 2, 4)])
    monkeypatch.setattr(parity, "ENCODER", [(3, 2, 5, 2, 4)])
    monkeypatch.setattr(parity, "CROSSMODAL", [(1, 2, 5, 2, 4)])
    monkeypatch.setattr(parity, "LINEAR", [(2, 6, 4)])
    monkeypatch.setattr(parity, "CONVOLUTION", [(2, 5, 3, 4)])
    monkeypatch.setattr(parity, "NORM", [(2, 3, 5, 8)])
    monkeypatch.setattr(parity, "LOSSES", [(2, 5, 8)])
    monkeypatch.setattr(records, "FOLDER", tmp_path / "speed")


@needs_kernels
def test_every_operation_but_the_draw_is_in_the_report(tmp_path: Path) -> None:
    out = tmp_path / "parity.md"
    assert parity.main(["--provider", "cpp", "--out", str(out), "--record"]) == 0
    (record,) = records.newest().values()
    compiled = {name for name, op in OPERATIONS.items() if "cpp" in op.kernels}
    assert {row["op"] for row in record["rows"]} == compiled - {"missing_draw"}
    assert {row["dtype"] for row in record["rows"]} == {"float32", "bfloat16"}
    assert max(row["relative"] for row in record["rows"] if row["dtype"] == "float32") < 1e-5
    assert parity.render(record) == out.read_text()


@needs_kernels
def test_an_error_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = reference.js_divergence
    monkeypatch.setattr(reference, "js_divergence", lambda a, b: plain(a, b) * (1 if a.dtype == torch.float64 else 1.5))
    (case,) = parity.cases("js_divergence")
    for row in parity.errors("js_divergence", case, "cpp", CPU, torch.float32):
        assert row["relative"] < 1e-5
        assert row["plain PyTorch, relative"] == pytest.approx(0.5, rel=1e-3)


def test_a_provider_that_cannot_run_is_refused() -> None:
    with pytest.raises(UserError, match="--provider cuda: cross_attention cannot run: "):
        parity.measure("cuda", CPU)


def test_the_data_path(tmp_path: Path) -> None:
    assert data_path.main(["--fraction", "0.002", "--record"]) == 0
    (record,) = records.newest().values()
    assert [stage["stage"].split(",")[0] for stage in record["stages"]] == [
        "synthesise",
        "write",
        "read",
        "standardise onto the device",
        "one epoch of draws",
    ]
    assert record["dims"] == [300, 74, 35]
    assert record["samples"] >= record["training samples"] >= 16
