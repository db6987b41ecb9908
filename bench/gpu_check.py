"""Everything that needs a GPU, in one command of under nine minutes: `make gpu-check` or `python -m bench.gpu_check`.

Builds the extension in place, holds every kernel to the parity wall in every precision, looks for races and bad
accesses, compares replayed steps with eager ones, then takes the benchmarks; what it found goes to
`bench/results/gpu/<gpu>_<date>_<n>.json`. It installs nothing and runs with the Python it is given. A section that
fails or runs out of time does not keep the others from running.

`--dry-run` rehearses the sections on a CPU, kernels interpreted, and writes nothing under `bench/`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch

from bench import entry
from fastmmkd.errors import UserError
from fastmmkd.files import make_directory, write_json

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "build" / "gpu_check"
RESULTS = ROOT / "bench" / "results" / "gpu"
TAIL = 4000
"""Characters of a failed section's output that the record keeps."""

LAST_LINE = "last line"
"""The record of a section that prints the file's name in the end."""

REPLAYED = ("-m", "pytest", "tests/engine/test_replayed_training.py", "-p", "no:cacheprovider", "--tb=short")
PARITY = ("-m", "pytest", "tests/parity", "-p", "no:cacheprovider", "--tb=short")
SANITIZED = ("tests/parity", "-p", "no:cacheprovider", "-k", "views_of_other_tensors or rows_without_keys")


@dataclass(frozen=True)
class Section:
    """One part of the check, a process of its own."""

    name: str
    command: tuple[str, ...]
    """Arguments of the Python interpreter; a first word that ends in "compute-sanitizer" replaces it."""
    seconds: int
    """It is stopped after this long."""
    environment: dict[str, str] = field(default_factory=dict)
    record: str = ""
    """A JSON file that it writes, relative to the log folder, or LAST_LINE, which names it; taken into the record."""


@dataclass
class Outcome:
    """What became of a section."""

    section: str
    status: str
    """"passed", "failed", "out of time", or "left out: <why>"."""
    seconds: float = 0.0
    summary: str = ""
    """The last line of its output."""
    output: str = ""
    """The end of its output, where it failed."""
    found: Any = None
    """What it recorded."""


def sections(dry: bool) -> list[Section]:
    """The parts, in their order; those of a rehearsal are smaller."""
    if dry:
        interpreted = {"TRITON_INTERPRET": "1", "FASTMMKD_PARITY": "triton"}
        few = (*PARITY, "-k", "residual_layer_norm")
        return [
            Section("build", ("setup.py", "--name"), 60, {"FASTMMKD_EXT": "cpu"}),
            Section("parity triton", few, 120, interpreted),
            Section("parity cuda", few, 120, {"FASTMMKD_PARITY": "cuda"}),
            Section("graphs", (*REPLAYED, "-m", "not gpu"), 120),
            Section(
                "kernels", ("-m", "bench.gpu_kernels", "--dry-run", "--out", "kernels.json"), 120, {}, "kernels.json"
            ),
        ]
    found = [
        Section("build", ("setup.py", "build_ext", "--inplace"), 150, {"FASTMMKD_EXT": "cuda"}),
        Section("parity triton", PARITY, 120, {"FASTMMKD_PARITY": "triton"}),
        Section("parity cuda", PARITY, 90, {"FASTMMKD_PARITY": "cuda"}),
        Section("graphs", (*REPLAYED, "-m", "gpu"), 60),
        Section("kernels", ("-m", "bench.gpu_kernels", "--out", "kernels.json"), 120, {}, "kernels.json"),
    ]
    for method in ("umdf", "corrkd", "hrlf"):
        command = ("-m", "bench.train_step", "--config", f"configs/{method}_mosei.json", "--no-engine", "--record")
        found.append(Section(f"step {method}", command, 75, {}, LAST_LINE))
    for tool in ("memcheck", "racecheck"):
        command = (
            "compute-sanitizer",
            "--tool",
            tool,
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "pytest",
            *SANITIZED,
        )
        found.append(Section(tool, command, 60, {"FASTMMKD_PARITY": "cuda"}))
    return found


def run(section: Section, remaining: float) -> Outcome:
    """Run a section for at most its time or what remains of the whole."""
    limit = min(section.seconds, remaining)
    if limit < 5:
        return Outcome(section.name, "left out: no time left")
    command = list(section.command)
    if command[0] == "compute-sanitizer":
        tool = shutil.which(command[0])
        if tool is None:
            return Outcome(section.name, "left out: there is no compute-sanitizer")
        command[0] = tool
    else:
        command = [sys.executable, *command]
    record = LOGS / section.record if section.record not in ("", LAST_LINE) else None
    command = [str(record) if record and part == section.record else part for part in command]
    if record:
        record.unlink(missing_ok=True)
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "PYTHONPATH": _path()} | section.environment
    log = LOGS / f"{section.name.replace(' ', '_')}.log"
    started = time.monotonic()
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    text = log.read_text(errors="replace").strip().replace(f"{ROOT}{os.sep}", "")
    status = "out of time" if code is None else "passed" if code == 0 else "failed"
    summary = text.splitlines()[-1] if text else ""
    if section.record == LAST_LINE and status == "passed":
        record = ROOT / summary
    found = json.loads(record.read_text()) if record and record.exists() else None
    output = "" if status == "passed" else text[-TAIL:]
    return Outcome(section.name, status, time.monotonic() - started, summary, output, found)


def _path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def device() -> dict[str, Any]:
    """What the check ran on."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }


def new_record(name: str) -> Path:
    """`<gpu>_<date>_<n>.json`, the first n that is free: records are added, never replaced."""
    stem = f"{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}_{date.today()}"
    taken = (RESULTS / f"{stem}_{n}.json" for n in range(1, 1000))
    return next(path for path in taken if not path.exists())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections; the exit code is 1 where one failed, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description="Check everything that needs a GPU.")
    parser.add_argument("--dry-run", action="store_true", help="rehearse it on a CPU")
    parser.add_argument("--seconds", type=float, default=530.0, help="how long all of it may take (default 530)")
    parser.add_argument("--only", action="append", metavar="SECTION", help="this section, and others named so")
    args = parser.parse_args(argv)
    if not args.dry_run and not torch.cuda.is_available():
        raise UserError("gpu-check: torch sees no CUDA device; --dry-run rehearses the check on a CPU")
    parts = sections(args.dry_run)
    names = [section.name for section in parts]
    for name in args.only or []:
        if name not in names:
            raise UserError(f"--only {name}: no such section; expected one of {', '.join(names)}")
    make_directory(LOGS)
    end = time.monotonic() + args.seconds
    outcomes = []
    record = None if args.dry_run else new_record(torch.cuda.get_device_name())
    for section in parts:
        if args.only and section.name not in args.only:
            continue
        outcome = run(section, end - time.monotonic())
        print(f"{outcome.section:16} {outcome.status:12} {outcome.seconds:6.0f} s  {outcome.summary}", flush=True)
        outcomes.append(outcome)
        if record:  # after every section: whatever happens later, what is known is kept
            make_directory(RESULTS)
            write_json(record, {"fastmmkd": 1, "device": device(), "sections": [asdict(o) for o in outcomes]})
    print(f"logs: {LOGS.relative_to(ROOT)}" + (f"; record: {record.relative_to(ROOT)}" if record else ""))
    return int(any(outcome.status in ("failed", "out of time") for outcome in outcomes))


if __name__ == "__main__":
    entry.run(main)
