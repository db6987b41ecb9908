"""The GPU check, rehearsed on a CPU: what happens to sections that pass, fail, hang and are interrupted."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from bench import gpu_bundle, gpu_check, records
from bench.gpu_check import Check, Outcome, run
from bench.gpu_sections import FOUND, SECONDS, Section, sections
from fastmmkd.errors import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path, monkeypatch) -> None:
    for name in ("LOGS", "ROOT"):
        monkeypatch.setattr(gpu_check, name, tmp_path)
    monkeypatch.setattr(gpu_check, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu_check, "SPEED", tmp_path / "speed")
    monkeypatch.setattr(gpu_check, "REHEARSED_SPEED", tmp_path / "rehearsed")
    monkeypatch.setattr(records, "FOLDER", tmp_path / "speed")
    monkeypatch.setattr(gpu_bundle, "FOLDER", tmp_path / "nothing")


def script(code: str, *arguments: str, name: str = "part", **changes) -> Section:
    return Section(name, ("-c", code, *arguments), changes.pop("seconds", 30), **changes)


def outcome_of(section: Section, remaining: float = 60) -> Outcome:
    outcome = Outcome(section.name, "running")
    run(section, remaining, outcome)
    return outcome


def check_of(monkeypatch, *parts: Section, seconds: float = 60) -> Check:
    monkeypatch.setattr(gpu_check, "sections", lambda call, rehearsed: list(parts))
    monkeypatch.setattr(gpu_check, "device", lambda: {"name": "NVIDIA X 80GB", "compute capability": "9.0"})
    return Check("A", False, seconds, None)


def statuses(check: Check) -> list[str]:
    return [section["status"] for section in json.loads(check.path.read_text())["sections"]]


def test_a_section_that_passes_fails_and_is_not_there() -> None:
    passed = outcome_of(script("print('first'); print('last')"))
    assert (passed.status, passed.summary, passed.output) == ("passed", "last", "")
    failed = outcome_of(script("print('why'); raise SystemExit(3)"))
    assert (failed.status, failed.output) == ("failed", "why")
    assert outcome_of(script("print()"), 6).status == "left out: no time left"


def test_who_runs_out_of_time_is_asked_to_stop_before_it_is_killed(tmp_path) -> None:
    polite = """
import sys, time
try:
    print("began", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("what is known")
"""
    outcome = outcome_of(script(polite, seconds=1.5, least=1))
    assert (outcome.status, outcome.summary) == ("out of time", "what is known")
    assert outcome.seconds < 20


def test_who_runs_in_the_background_can_stop_what_it_started(tmp_path) -> None:
    """A shell has it ignore SIGINT, which the processes that it starts would inherit."""
    code = f"import signal, sys; open({str(tmp_path / 'heard')!r}, 'w').write(str(signal.getsignal(signal.SIGINT)))"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert outcome_of(script(code)).status == "passed"
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
    assert "default_int_handler" in (tmp_path / "heard").read_text()


def test_who_does_not_stop_is_killed_with_all_it_started(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(gpu_check.processes.stop, "__defaults__", (0.5,))
    stubborn = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
print(child.pid, flush=True)
time.sleep(60)
"""
    outcome = outcome_of(script(stubborn, seconds=1.5, least=1))
    assert outcome.status == "out of time"
    for _ in range(100):
        if not _is_running(int(outcome.output)):
            break
        time.sleep(0.05)
    assert not _is_running(int(outcome.output))


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] not in "ZX"
    except OSError:
        return False


def test_what_a_section_found_is_kept_even_where_it_fails(monkeypatch, tmp_path) -> None:
    (tmp_path / "part.json").write_text('{"of": "a former check"}')
    code = "import sys, json; json.dump({'speed': 7}, open(sys.argv[1], 'w')); sys.exit(1)"
    check = check_of(monkeypatch, script("pass", name="silent"), script(code, FOUND))
    assert check.run() == 1
    assert [outcome.found for outcome in check.outcomes] == [None, {"speed": 7}]


def test_a_record_of_a_step_is_taken_over(monkeypatch, tmp_path) -> None:
    code = "import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.parent.mkdir(parents=True); p.write_text(sys.argv[2])"
    path = tmp_path / "speed" / "nvidia_x" / "2026-01-01_train_step_umdf_mosei_1.json"
    check = check_of(monkeypatch, script(code, str(path), '{"kind": "k"}', speed_record="train_step_umdf_mosei"))
    assert check.run() == 0
    assert check.outcomes[0].found == {"kind": "k"}


def test_what_a_rehearsal_times_stays_away_from_the_records() -> None:
    timed = [section.command for section in sections("A", True) + sections("B", True) if section.speed_record]
    assert timed
    for command in timed:
        assert Path(command[command.index("--record") + 1]).parent == ROOT / "build" / "gpu_check"


def test_every_section_is_run_and_kept_whatever_the_others_do(monkeypatch, tmp_path, capsys) -> None:
    check = check_of(monkeypatch, script("raise SystemExit(1)"), script("print('done')", name="later"))
    assert check.run() == 1
    assert statuses(check) == ["failed", "passed"]
    other = check_of(monkeypatch, script("raise SystemExit(1)"), script("print('done')", name="later"))
    assert other.run(["later"]) == 0
    assert [path.name[:14] + path.name[-7:] for path in sorted((tmp_path / "results").iterdir())] == [
        "nvidia_x_80gb__1.json",
        "nvidia_x_80gb__2.json",
    ]
    assert "done" in capsys.readouterr().out


def test_without_what_is_essential_nothing_is_run(monkeypatch) -> None:
    check = check_of(monkeypatch, script("raise SystemExit(1)", essential=True), script("pass", name="later"))
    assert check.run() == 1
    assert statuses(check) == ["failed"]


def test_the_record_is_written_while_a_section_runs(monkeypatch, tmp_path) -> None:
    seen = []
    code = "import sys, time; open(sys.argv[1], 'w').write('[1]'); time.sleep(2.5)"
    check = check_of(monkeypatch, script(code, FOUND))
    written = check.write
    monkeypatch.setattr(check, "write", lambda: (written(), seen.append(json.loads(check.path.read_text()))))
    check.run()
    assert ("running", [1]) in [(record["sections"][0]["status"], record["sections"][0]["found"]) for record in seen]


def test_who_is_interrupted_keeps_what_is_known(tmp_path) -> None:
    """As a time limit of the machine would do it: SIGTERM, in the middle of a section."""
    code = f"""
import pathlib, sys, torch
from bench import gpu_bundle, gpu_check
from bench.gpu_sections import FOUND, Section
folder = pathlib.Path({str(tmp_path)!r})
gpu_check.LOGS = gpu_bundle.FOLDER = folder
wait = "import sys, time; open(sys.argv[1], 'w').write('[1]'); print('waits', flush=True); time.sleep(60)"
gpu_check.sections = lambda call, rehearsed: [Section("part", ("-c", wait, FOUND), 60), Section("later", ("-c", ""), 9)]
sys.exit(gpu_check.main(["A", "--rehearse"]))
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)})
    for _ in range(600):
        if (tmp_path / "part.json").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    (path,) = tmp_path.glob("rehearsal*.json")
    (section,) = json.loads(path.read_text())["sections"]
    assert (section["status"], section["found"]) == ("out of time", [1])


def test_a_sanitizer_that_is_not_there_is_left_out(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    section = Section("memcheck", ("compute-sanitizer", "--tool", "memcheck", "-m", "pytest"), 30)
    assert outcome_of(section).status == "left out: there is no compute-sanitizer"


def test_what_cannot_be_checked() -> None:
    with pytest.raises(UserError, match="no such section; expected one of graphs, parity cuda"):
        gpu_check.main(["A", "--rehearse", "--only", "speed"])
    with pytest.raises(UserError, match="D: no such call; expected some of A, B, C"):
        gpu_check.main(["D"])
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="torch sees no CUDA device"):
            gpu_check.main([])


@pytest.mark.parametrize("call", SECONDS)
def test_a_call_fits_into_its_time(call) -> None:
    parts = sections(call, rehearsed=False)
    assert sum(section.seconds for section in parts) <= SECONDS[call]
    assert [s.name for s in parts] == [s.name for s in sections(call, rehearsed=True)]
    for section in parts:  # a program that stops by itself does so before it is stopped
        words = section.command
        limits = [int(after) for word, after in pairwise(words) if word == "--seconds"]
        assert all(limit < section.seconds for limit in limits)


def test_a_record_from_elsewhere_is_taken_over(tmp_path) -> None:
    step = {"schema": records.SCHEMA, "kind": "train_step_umdf_mosei", "date": "2026-01-01", "device": {"name": "X"}}
    record = {"fastmmkd": 1, "device": {"name": "NVIDIA X", "compute capability": "9.0"}}
    sections_ = [{"section": "step umdf", "found": step}, {"section": "smoke", "found": {"right": 1}}]
    path = tmp_path / "from_there.json"
    path.write_text(json.dumps(record | {"sections": sections_}))
    check, speed = gpu_check.take(path)
    assert json.loads(check.read_text())["device"]["name"] == "NVIDIA X"
    assert json.loads(speed.read_text()) == step
    path.write_text("{}")
    with pytest.raises(UserError, match="not a record of bench"):
        gpu_check.take(path)
    path.write_text(json.dumps({"fastmmkd": 1, "device": {"name": "rehearsal"}, "sections": []}))
    with pytest.raises(UserError, match="a rehearsal; expected the record of a GPU"):
        gpu_check.take(path)


def test_what_was_brought_along_is_used_where_it_fits(tmp_path, monkeypatch, capsys) -> None:
    bundle = tmp_path / "bundle"
    (bundle / gpu_bundle.LIBRARY).mkdir(parents=True)
    (bundle / gpu_bundle.LIBRARY / "_C.test.so").write_bytes(b"library")
    (tmp_path / "fastmmkd").mkdir()
    monkeypatch.setattr(gpu_bundle, "FOLDER", bundle)
    monkeypatch.setattr(gpu_bundle.misfit, "__defaults__", (bundle,))
    monkeypatch.setattr(gpu_bundle.library, "__defaults__", (bundle,))
    (bundle / gpu_bundle.MANIFEST).write_text(json.dumps(gpu_bundle.made_for() | {"torch": "1.0"}))
    gpu_check.bring_along()
    assert f"it was made for torch 1.0, here is {torch.__version__}" in capsys.readouterr().out
    assert not list((tmp_path / "fastmmkd").iterdir())
    (bundle / gpu_bundle.MANIFEST).write_text(json.dumps(gpu_bundle.made_for()))
    gpu_check.bring_along()
    assert (tmp_path / "fastmmkd" / "_C.test.so").read_bytes() == b"library"
    assert str(bundle / gpu_bundle.SITE) in gpu_check.python_path().split(os.pathsep)
