"""Does every kernel run and compute what it should at the configs' sizes? `python -m bench.gpu_smoke FILE`.

A process per operation and provider, because a bad access takes its process with it, all at the same time, because
each compiles its kernels on the CPU: `tests/parity/test_config_sizes.py` in bf16 and fp32. A failure is printed as it
comes; FILE holds the tracebacks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench import entry, processes
from bench.gpu_sections import FOUND, PYTEST, smoke_tests, stand_in
from fastmmkd.files import write_json

ROOT = Path(__file__).parents[1]
TESTS = "tests/parity/test_config_sizes.py"
TAIL = 3000
"""Characters of the output of a process that died."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run all, print a line each; the exit code is 1 where one failed."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_smoke", description="Run every kernel once at the configs' sizes."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="write what was found to this JSON file")
    parser.add_argument("--seconds", type=float, default=55, help="how long all of it may take (default 55)")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU")
    args = parser.parse_args(argv)
    by_process: dict[str, Any] = {}
    for name, outcome in outcomes(args.file.parent, args.seconds, args.rehearse):
        by_process[name] = outcome
        print(f"{name:32} {outcome['verdict']}", flush=True)
        for failure in outcome["failures"].values():
            print(failure, flush=True)
        write_json(args.file, by_process)
    bad = [name for name, outcome in by_process.items() if outcome["verdict"].split()[0] != "right"]
    print(f"{len(by_process) - len(bad)} of {len(by_process)} right" + (f"; not: {', '.join(bad)}" if bad else ""))
    return int(bool(bad))


def outcomes(folder: Path, seconds: float, rehearsed: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and outcome of each process, the first to end first."""
    end = time.monotonic() + seconds
    waiting = [(provider, op) for provider, op in smoke_tests() if not (rehearsed and provider == "cuda")]
    running: dict[str, tuple[Any, Path, Path]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < (os.cpu_count() or 1):
                provider, op = waiting.pop(0)
                name = f"{provider} {op}"
                log, record = (folder / f"smoke_{name.replace(' ', '_')}.{kind}" for kind in ("log", "json"))
                record.unlink(missing_ok=True)
                command = [str(record) if part == FOUND else part for part in PYTEST]
                command = [sys.executable, *command, TESTS, "-k", f"{op} and not fp16"]
                environment = stand_in() if rehearsed else {"FASTMMKD_PARITY": provider}
                running[name] = processes.start(command, ROOT, environment, log), log, record
            for name, (process, log, record) in list(running.items()):
                if process.poll() is not None or time.monotonic() > end:
                    in_time = process.poll() is not None
                    if not in_time:
                        processes.stop(process, grace=3)
                    del running[name]
                    yield name, outcome(process.returncode if in_time else None, log, record)
            time.sleep(0.05)
    finally:
        for process, _, _ in running.values():
            processes.stop(process, grace=1)


def outcome(code: int | None, log: Path, path: Path) -> dict[str, Any]:
    """What a process found, and in words what became of it."""
    result = {"passed": 0, "failed": 0, "failures": {}} | (json.loads(path.read_text()) if path.exists() else {})
    output = log.read_text(errors="replace")[-TAIL:]
    if code == 0 and result["passed"]:
        result["verdict"] = f"right ({result['passed']} cases)"
    elif code is None:
        result["verdict"] = f"out of time after {result['passed']} cases"
    elif result["failed"]:
        result["verdict"] = f"WRONG in {result['failed']} of {result['passed'] + result['failed']} cases"
    else:  # a crash, or nothing to run
        result["verdict"] = f"FAILED with exit code {code}"
        result["failures"] = {"output": output}
    return result


if __name__ == "__main__":
    entry.run(main)
