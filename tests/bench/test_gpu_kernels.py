"""The benchmark of single operations: what fails does not stop the rest, whatever ends it leaves what it found."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu_kernels, kernel_times
from bench.choices import BY_IMPORTANCE
from bench.gpu_kernels import PROCESS, SPOILED, Part
from bench.kernel_cases import KernelCase, cases
from fastmmkd.errors import UserError
from fastmmkd.ops import reference

CPU = torch.device("cpu")
NEVER = float("inf")


def case_of(op: str, dtype: torch.dtype = torch.float32) -> KernelCase:
    return next(cases(op, [dtype], CPU, large=False, dry=True))


def part(op: str = "js_divergence", **changes: Any) -> Part:
    return Part(op, False, ["fp32"], dry=True, compiled=False)._replace(**changes)


def test_it_is_rehearsed_in_processes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "kernels.json"
    given = ["--dry-run", "--op", "js_divergence", "missing_draw", "--dtype", "fp32,bf16", "--out", str(out)]
    assert gpu_kernels.main(given) == 0
    records = json.loads(out.read_text())
    assert list(dict.fromkeys((r["op"], r["size"], r["dtype"]) for r in records)) == [
        *(
            ("missing_draw", size, dtype)
            for dtype in ("bf16", "fp32")
            for size in ("2 x 2 x 5", "2 x 2 x 5, MOSEI's lengths")
        ),
        *(("js_divergence", "N=16", dtype) for dtype in ("bf16", "fp32")),
        *(("js_divergence", size, dtype) for dtype in ("bf16", "fp32") for size in ("N=128", "N=32")),
    ]
    assert records[-1]["contender"] == "reference"
    assert all(r["eager_ms"] > 0 and r["error"] < 1e-2 for r in records)
    assert "| js_divergence" in capsys.readouterr().out


@pytest.mark.parametrize("op", BY_IMPORTANCE)
@pytest.mark.parametrize("large", [False, True])
def test_every_operation_is_measured(op: str, large: bool) -> None:
    sent: list[dict[str, Any]] = []
    assert gpu_kernels.measure_part(part(op, large=large, dtypes=["bf16", "fp32"]), sent.append) == 0
    records = [r for r in sent if "begun" not in r]
    assert {r["dtype"] for r in records} == {"bf16", "fp32"}
    assert not [r for r in records if "failed" in r]
    assert len(sent) - len(records) == sum(r["contender"] == "reference" for r in records)
    last = len(sent) - len(records) - 1
    rest: list[dict[str, Any]] = []
    gpu_kernels.measure_part(part(op, large=large, dtypes=["bf16", "fp32"], first=last), rest.append)
    assert rest[0] == {"begun": last}
    assert {r["size"] for r in rest[1:]} == {records[-1]["size"]}


def test_a_contender_that_is_wrong_or_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> torch.Tensor:
        raise RuntimeError("no kernel\nfor this")

    contenders = {
        "cpp": (None, lambda x, y: (x - y).sum((1, 2))),
        "triton": (None, lambda x, y: reference.gaussian_mmd(x, y) * torch.nan),
        "cuda": (None, broken),
        "reference": (None, reference.gaussian_mmd),
    }
    monkeypatch.setattr(kernel_times, "contenders", lambda case, device, compiled: contenders)
    records = list(kernel_times.measure(case_of("gaussian_mmd"), CPU, dry=True, compiled=False))
    wrong, infinite, failing, fine = records
    assert wrong["failed"].startswith("ValueError: differs from the reference by")
    assert infinite["failed"] == "ValueError: differs from the reference by inf"
    assert failing["failed"] == "RuntimeError: no kernel"
    assert "in broken" in failing["traceback"]
    assert "failed" not in fine
    json.dumps(records, allow_nan=False)


class TestProcesses:
    """A script stands in for the process that measures."""

    @pytest.fixture
    def script(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        def stand_in(code: str) -> None:
            head = "import os, sys, json, time; first = int(sys.argv[2]); pipe = os.fdopen(int(sys.argv[1]), 'w')\n"
            head += "def say(**line): print(json.dumps(line), file=pipe, flush=True)\n"
            monkeypatch.setattr(
                gpu_kernels,
                "command_of",
                lambda part, pipe: [sys.executable, "-c", head + code, str(pipe), str(part.first)],
            )

        return stand_in

    def test_one_that_dies_is_named_and_the_next_case_gets_another(self, script: Any) -> None:
        script(
            "for i in range(first, 4):\n"
            "    say(begun=i)\n"
            "    if i == 1: print('an illegal access', flush=True); os.abort()\n"
            "    if i == 2: sys.exit(3)\n"
            "    say(op='x', contender='cpp', n=i)\n"
            "pipe.write('{half a li'); pipe.flush(); sys.exit(0)\n"
        )
        first, died, last = gpu_kernels.of_parts([part()], NEVER)
        assert (first["n"], last["n"]) == (0, 3)
        assert (died["contender"], died["failed"]) == (PROCESS, "ended by SIGABRT")
        assert "an illegal access" in died["traceback"]
        assert SPOILED == 3

    def test_one_that_cannot_begin_is_given_up(self, script: Any) -> None:
        script("raise SystemExit('no such device')")
        (died,) = gpu_kernels.of_parts([part()], NEVER)
        assert died["failed"] == "ended with exit code 1"
        assert died["traceback"].strip() == "no such device"

    def test_what_there_is_no_time_for_is_skipped(self, script: Any) -> None:
        script("say(begun=0); say(op='x', contender='cpp'); time.sleep(60)")
        started = time.monotonic()
        first, *skipped = gpu_kernels.of_parts([part(), part(large=True)], started + 2)
        assert time.monotonic() - started < 30
        assert first == {"op": "x", "contender": "cpp"}
        assert [r["skipped"] for r in skipped] == ["no time left", "no time left for large sizes"]

    def test_failures_are_lines_and_exit_code_one(
        self, script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        script(
            "say(begun=0); say(op='x', size='N=1', dtype='bf16', contender='cpp', failed='E: why', traceback='...')\n"
            "say(op='x', size='N=1', dtype='bf16', contender='reference', failed='E: not ours')"
        )
        out = tmp_path / "out.json"
        assert gpu_kernels.main(["--dry-run", "--main", "--op", "js_divergence", "--out", str(out)]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert lines[:2] == ["x N=1 bf16 cpp: failed, E: why", "x N=1 bf16 reference: failed, E: not ours"]
        assert lines[-1] == "0 of 1 of ours measured; x N=1 bf16 cpp: failed, E: why"
        assert [r.get("traceback") for r in json.loads(out.read_text())] == ["...", None]

    def test_it_can_be_stopped(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        def stopped(*args: Any) -> Any:
            yield {"op": "x", "size": "N=1", "dtype": "bf16", "contender": "cpp", "eager_ms": 1.0}
            raise KeyboardInterrupt

        monkeypatch.setattr(gpu_kernels, "of_parts", stopped)
        assert gpu_kernels.main(["--dry-run"]) == 130
        assert capsys.readouterr().out.splitlines()[-1] == "1 of 1 of ours measured"


def test_bad_arguments_are_refused() -> None:
    for given, message in (
        (["--op", "softmax"], "--op softmax: no such operation; expected some of cross_attention"),
        (["--dtype", "bf16,int8"], "--dtype int8: no such precision; expected some of bf16, fp32, fp16"),
        (["--seconds", "-1"], "--seconds -1: expected more than 0"),
    ):
        with pytest.raises(UserError, match=message):
            gpu_kernels.main(["--dry-run", *given])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees no CUDA device"):
            gpu_kernels.main([])
