"""The GPU check, rehearsed on a CPU."""

import json

import pytest
import torch

from bench import gpu_check, gpu_kernels
from bench.gpu_check import Section, run
from fastmmkd.errors import UserError


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu_check, "LOGS", tmp_path)
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")


def script(code: str, **changes) -> Section:
    return Section("part", ("-c", code), changes.pop("seconds", 30), **changes)


def test_a_section_that_passes_fails_and_hangs() -> None:
    passed = run(script("print('first'); print('last')"), 60)
    assert (passed.status, passed.summary, passed.output) == ("passed", "last", "")
    failed = run(script("print('why'); raise SystemExit(3)"), 60)
    assert (failed.status, failed.output) == ("failed", "why")
    hangs = run(script("import time; print('began', flush=True); time.sleep(60)"), 5.5)
    assert (hangs.status, hangs.output) == ("out of time", "began")
    assert hangs.seconds < 20
    assert run(script("print()"), 1.0).status == "left out: no time left"


def test_what_a_section_records_is_taken_over_even_where_it_fails(tmp_path) -> None:
    (tmp_path / "found.json").write_text('{"of": "a former check"}')
    assert run(script("pass", record="found.json"), 60).found is None
    code = "import sys, json; json.dump({'speed': 7}, open(sys.argv[1], 'w')); sys.exit(1)"
    section = Section("part", ("-c", code, "found.json"), 30, record="found.json")
    assert run(section, 60).found == {"speed": 7}
    assert run(script("print('found.json')", record=gpu_check.LAST_LINE), 60).found == {"speed": 7}


def test_a_sanitizer_that_is_not_there_is_left_out(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    section = Section("memcheck", ("compute-sanitizer", "--tool", "memcheck"), 30)
    assert run(section, 60).status == "left out: there is no compute-sanitizer"


def test_every_section_is_run_and_kept_whatever_the_others_do(monkeypatch, tmp_path, capsys) -> None:
    parts = [script("raise SystemExit(1)"), Section("later", ("-c", "print('done')"), 30)]
    monkeypatch.setattr(gpu_check, "sections", lambda dry: parts)
    monkeypatch.setattr(gpu_check, "device", lambda: {"name": "NVIDIA X"})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA X 80GB")
    assert gpu_check.main([]) == 1
    assert gpu_check.main(["--only", "later"]) == 0
    first, second = sorted((tmp_path / "results").iterdir())
    assert first.name.startswith("nvidia_x_80gb_")
    assert first.name.endswith("_1.json")
    assert [part["status"] for part in json.loads(first.read_text())["sections"]] == ["failed", "passed"]
    assert len(json.loads(second.read_text())["sections"]) == 1
    assert "done" in capsys.readouterr().out


def test_what_cannot_be_checked() -> None:
    with pytest.raises(UserError, match="no such section; expected one of build, parity triton"):
        gpu_check.main(["--dry-run", "--only", "speed"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees no CUDA device"):
            gpu_check.main([])


def test_the_time_of_all_sections_together() -> None:
    assert sum(section.seconds for section in gpu_check.sections(dry=False)) < 1000
    assert {section.name for section in gpu_check.sections(dry=True)} <= {s.name for s in gpu_check.sections(dry=False)}


def test_kernel_benchmarks_are_rehearsed(tmp_path, capsys) -> None:
    out = tmp_path / "kernels.json"
    assert gpu_kernels.main(["--dry-run", "--op", "js_divergence", "--out", str(out)]) == 0
    records = json.loads(out.read_text())
    assert {r["op"] for r in records} == {"js_divergence"}
    assert records[-1]["contender"] == "reference"
    assert all(r["eager_ms"] > 0 and r["error"] < 1e-5 for r in records)
    assert "| js_divergence" in capsys.readouterr().out


def test_a_contender_that_is_wrong_or_fails_is_named(monkeypatch) -> None:
    case = next(c for c in gpu_kernels.cases(torch.device("cpu"), dry=True) if c.op == "gaussian_mmd")

    def broken(*args):
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(
        gpu_kernels,
        "contenders",
        lambda case, device: {
            "cpp": (None, lambda x, y: (x - y).sum((1, 2))),
            "cuda": (None, broken),
            "reference": (None, gpu_kernels.reference.gaussian_mmd),
        },
    )
    wrong, failing, fine = gpu_kernels.measure(case, torch.device("cpu"), dry=True)
    assert wrong["failed"].startswith("ValueError: differs from the reference by")
    assert failing["failed"] == "RuntimeError: no kernel"
    assert "failed" not in fine
