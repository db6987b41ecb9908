"""Everything that needs a GPU, for machines that are had for minutes: `make gpu-check`.

Call A (seven minutes) says whether all that is built runs, is right, and how fast a step is; call B (five) trains as
users do and explains A; call C (three) trains a paper's config to its end. Each prints a line a section as it goes, and
keeps what it has when it is cut: `<out>/<gpu>_<date>_<n>.json` is never more than seconds old. A section that fails or
runs out of time does not keep the others from running; one that must stop is asked to first.

It installs nothing. What a machine without a network lacks, `bench.gpu_bundle` prepares beforehand; see docs/gpu.md.
`--rehearse` runs the same sections, smaller, on a CPU. `--take FILE` puts a record from elsewhere where the tables are
made from.
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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bench import entry, gpu_bundle, gpu_precompile, processes
from bench.gpu_sections import (
    BUILD_SECONDS,
    FOUND,
    REHEARSAL_FACTOR,
    REHEARSED_SPEED,
    SECONDS,
    SPEED,
    Section,
    sections,
)
from fastmmkd.errors import UserError
from fastmmkd.files import make_directory, read_json, write_json

ROOT = Path(__file__).parents[1]
LOGS = ROOT / "build" / "gpu_check"
RESULTS = ROOT / "bench" / "results" / "gpu"
TAIL = 4000
"""Characters of a failed section's output that the record keeps."""


@dataclass
class Outcome:
    """What became of a section."""

    section: str
    status: str
    """"passed", "failed", "out of time", "running", or "left out: <why>"."""
    seconds: float = 0.0
    summary: str = ""
    """The last line of its output."""
    output: str = ""
    """The end of its output, where it failed."""
    found: Any = None
    """What it recorded."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the calls; the exit code is 1 where a section failed, 2 without a GPU, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_check", description="Check everything that needs a GPU.")
    parser.add_argument("calls", nargs="*", metavar="A|B|C", help="which calls (default: A and B)")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, smaller; records stay in build/")
    parser.add_argument("--seconds", type=float, help="how long each call may take (default: 420, 300, 180)")
    parser.add_argument("--only", action="append", metavar="SECTION", help="this section, and others named so")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where records go (default: bench/results/gpu)")
    parser.add_argument(
        "--take", type=Path, metavar="FILE", help="take over a record from another machine, run nothing"
    )
    args = parser.parse_args(argv)
    if args.take:
        for path in take(args.take):
            print(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
        return 0
    calls = args.calls or ["A", "B"]
    for call in calls:
        if call not in SECONDS:
            raise UserError(f"{call}: no such call; expected some of {', '.join(SECONDS)}")
    names = {section.name for call in calls for section in sections(call, args.rehearse)}
    for name in args.only or []:
        if name not in names:
            raise UserError(f"--only {name}: no such section; expected one of {', '.join(sorted(names))}")
    _require_device(args.rehearse)
    make_directory(LOGS)
    bring_along()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a time limit ends us as Ctrl-C does
    codes = []
    for call in calls:
        check = Check(call, args.rehearse, args.seconds or SECONDS[call], args.out)
        codes.append(check.run(args.only))
        if check.stopped:
            break
    return max(codes)


class Check:
    """One call: its sections, one after the other, and its record.

    Args:
        call: "A", "B" or "C".
        rehearsed: on a CPU.
        seconds: how long it may take.
        out: folder of its record.
    """

    def __init__(self, call: str, rehearsed: bool, seconds: float, out: Path | None) -> None:
        self.call, self.rehearsed = call, rehearsed
        self.end = time.monotonic() + seconds * (REHEARSAL_FACTOR if rehearsed else 1)
        self.about = {"name": "rehearsal on a CPU", **_python()} if rehearsed else device()
        self.path = new_record(self.about["name"], out or (LOGS if rehearsed else RESULTS))
        self.outcomes: list[Outcome] = []
        self.stopped = False
        """Whether nothing may be run after it."""

    def run(self, only: Sequence[str] | None = None) -> int:
        """Run the sections; the exit code."""
        print(f"call {self.call} on {self.about['name']}, at most {self.end - time.monotonic():.0f} s", flush=True)
        todo = [section for section in sections(self.call, self.rehearsed) if not only or section.name in only]
        for section in todo:
            outcome = self._run(section)
            print(f"{outcome.section:16} {outcome.status:12} {outcome.seconds:5.0f} s  {outcome.summary}", flush=True)
            if outcome.status != "passed" and outcome.output:
                print("    " + "\n    ".join(outcome.output.splitlines()[-12:]), flush=True)
            if self.stopped:
                break
            if section.name == "preflight" and outcome.found and outcome.found.get("extension"):
                self._compile(outcome.found["extension"])
        print(f"record: {shown(self.path)}; logs: {shown(LOGS)}", flush=True)
        bad = any(outcome.status in ("failed", "out of time", "running") for outcome in self.outcomes)
        return 130 if self.stopped and self.interrupted else int(bad)

    interrupted = False

    def _run(self, section: Section) -> Outcome:
        outcome = Outcome(section.name, "running")
        self.outcomes.append(outcome)

        def keep() -> None:
            outcome.found = found_by(section, since) or outcome.found
            self.write()

        since = time.time()
        try:
            run(section, self.end - time.monotonic(), outcome, keep)
        except KeyboardInterrupt:
            outcome.status, self.stopped, self.interrupted = "out of time", True, True
        keep()
        if section.essential and outcome.status != "passed":
            self.stopped = True
        return outcome

    def _compile(self, why: str) -> None:
        """The extension, where none fits: without it csrc/cuda is not checked."""
        print(f"{'':16} compiling the extension: {why}", flush=True)
        command = ("setup.py", "-q", "build_ext", "--inplace")
        outcome = self._run(
            Section("build", command, BUILD_SECONDS, {"FASTMMKD_EXT": "cpu" if self.rehearsed else "cuda"})
        )
        print(f"{'build':16} {outcome.status:12} {outcome.seconds:5.0f} s  {outcome.summary}", flush=True)

    def write(self) -> None:
        """Keep what is known: whatever happens later."""
        make_directory(self.path.parent)
        record = {
            "fastmmkd": 1,
            "call": self.call,
            "device": self.about,
            "sections": [asdict(o) for o in self.outcomes],
        }
        write_json(self.path, record)


def run(section: Section, remaining: float, outcome: Outcome, keep: Callable[[], object] = lambda: None) -> None:
    """Run a section for at most its time or what remains of the whole; `keep` is called now and then."""
    limit = min(section.seconds, remaining - 2)
    if limit < section.least:
        outcome.status = "left out: no time left"
        return
    command = [str(found_file(section)) if part == FOUND else part for part in section.command]
    if command[0] == "compute-sanitizer":
        tool = shutil.which(command[0])
        if tool is None:
            outcome.status = "left out: there is no compute-sanitizer"
            return
        at = command.index("-m")
        command = [tool, *command[1:at], sys.executable, *command[at:]]
    else:
        command = [sys.executable, *command]
    found_file(section).unlink(missing_ok=True)
    log, started = LOGS / f"{slug(section)}.log", time.monotonic()
    process = processes.start(command, ROOT, {"PYTHONPATH": python_path()} | section.environment, log)
    try:
        in_time = processes.wait(process, limit, keep)
    finally:
        outcome.seconds = time.monotonic() - started
        text = log.read_text(errors="replace").strip()
        for place in (ROOT, sys.prefix, sys.base_prefix):
            text = text.replace(f"{place}{os.sep}", "")
        outcome.summary = text.splitlines()[-1] if text else ""
        outcome.output = text[-TAIL:]
    outcome.status = "out of time" if not in_time else "passed" if process.returncode == 0 else "failed"
    if outcome.status == "passed":
        outcome.output = ""


def slug(section: Section) -> str:
    return section.name.replace(" ", "_")


def found_file(section: Section) -> Path:
    """Where a section writes what it found."""
    return LOGS / f"{slug(section)}.json"


def found_by(section: Section, since: float) -> Any:
    """What a section has written so far; None where there is nothing."""
    path: Path | None = found_file(section)
    if section.speed_record:
        name = f"*/*_{section.speed_record}_*.json"
        paths = (path for folder in (SPEED, REHEARSED_SPEED) for path in folder.glob(name))
        written = [path for path in paths if path.stat().st_mtime >= since - 1]
        path = max(written, key=lambda p: p.stat().st_mtime, default=None)
    try:
        return json.loads(path.read_text()) if path else None
    except (OSError, ValueError):
        return None


def python_path() -> str:
    """This checkout, what was brought along, and what was there."""
    brought = str(gpu_bundle.FOLDER / gpu_bundle.SITE)
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"), brought)))


def bring_along() -> None:
    """Put the extension that `bench.gpu_bundle` compiled where it is looked for, if it fits and none is there."""
    reason = gpu_bundle.misfit()
    if reason:
        print(f"nothing brought along: {reason}", flush=True)
        return
    library, package = gpu_bundle.library(), ROOT / "fastmmkd"
    if library and not (package / library.name).exists():
        shutil.copy(library, package / library.name)
    cache = ROOT / "build" / "triton_cache"
    if (gpu_bundle.FOLDER / gpu_bundle.TRITON).exists() and "TRITON_CACHE_DIR" not in os.environ:
        gpu_precompile.settle(gpu_bundle.FOLDER / gpu_bundle.TRITON, cache)
        os.environ["TRITON_CACHE_DIR"] = str(cache)  # of this process and of the sections'
    print(f"brought along: {gpu_bundle.described(gpu_bundle.made_for())}", flush=True)


def _require_device(rehearsed: bool) -> None:
    try:
        import torch
    except ImportError:
        raise UserError(f"gpu-check: {sys.executable} has no torch; PYTHON=... names another Python") from None
    if not rehearsed and not torch.cuda.is_available():
        raise UserError("gpu-check: torch sees no CUDA device; --rehearse runs the check on a CPU")


def device() -> dict[str, Any]:
    """What the check runs on; asked in another process, so that this one holds nothing of the device."""
    code = "import json; from bench.gpu_check import properties; print(json.dumps(properties()))"
    asked = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(asked.stdout.splitlines()[-1])


def properties() -> dict[str, Any]:
    """Of the first CUDA device."""
    import torch

    gpu = torch.cuda.get_device_properties(0)
    return {
        "name": gpu.name,
        "compute capability": f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu.multi_processor_count,
        "memory": gpu.total_memory,
        **_python(),
    }


def _python() -> dict[str, Any]:
    import torch

    return {"torch": torch.__version__, "cuda": torch.version.cuda, "python": sys.version.split()[0]}


def new_record(name: str, folder: Path) -> Path:
    """`<gpu>_<date>_<n>.json`, the first n that is free: records are added, never replaced."""
    day = datetime.now(timezone.utc).date()
    stem = f"{re.sub(r'[^a-z0-9]+', '_', name.lower()).strip('_')}_{day}"
    taken = (folder / f"{stem}_{n}.json" for n in range(1, 1000))
    return next(path for path in taken if not path.exists())


def take(path: Path) -> list[Path]:
    """Put a record of another machine, and the records of steps that are in it, where `make readme` finds them.

    Raises:
        UserError: it is not a record of this check.
    """
    from bench import records

    record = read_json(path, "a record of bench.gpu_check")
    if not isinstance(record, dict) or record.get("fastmmkd") != 1 or "sections" not in record:
        raise UserError(f"{path}: not a record of bench.gpu_check; expected one that a call wrote")
    if "compute capability" not in record["device"]:
        raise UserError(f"{path}: a rehearsal; expected the record of a GPU")
    written = [new_record(record["device"]["name"], RESULTS)]
    make_directory(RESULTS)
    write_json(written[0], record)
    for section in record["sections"]:
        speed = section["found"]
        if isinstance(speed, dict) and speed.get("schema") == records.SCHEMA and "kind" in speed:
            written.append(records.put(speed))
    return written


def shown(path: Path) -> Path:
    """Relative to the checkout where it lies in it."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


if __name__ == "__main__":
    entry.run(main)
