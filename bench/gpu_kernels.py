"""Every operation on a CUDA device, forward and backward, against what PyTorch offers: `python -m bench.gpu_kernels`.

Contenders are checked against the reference before they are timed. Two times are taken of each, medians of at least 30:
"eager", a call as a program makes it, launches included, and "replayed", the same call in a CUDA graph, which is what
the device itself needs and what a captured training step costs. `--dry-run` rehearses it on a CPU.

Every operation has a process of its own, because a bad access spoils everything that follows in a process; after one,
the operation goes on in a new process with its next case. The most important operations, precisions and sizes come
first, and `--out` holds what was found after every case. Exit code 1: one of ours failed; 130: it was told to stop.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from bench import choices, entry
from bench.kernel_cases import cases
from bench.kernel_times import OURS, SHORT, measure
from fastmmkd.errors import UserError
from fastmmkd.evaluation import markdown
from fastmmkd.files import write_json
from fastmmkd.ops import operation
from fastmmkd.ops.providers import obstacle

ROOT = Path(__file__).parents[1]
TAIL = 4000
"""Characters of a dead process's output that its record keeps."""
PROCESS = "process"
"""Stands for a contender in the record of a part that was left out or died."""
SPOILED = 3
"""Exit code of a process whose device can no longer be used."""

Record = dict[str, Any]


class Part(NamedTuple):
    """What one process measures."""

    op: str
    large: bool
    dtypes: list[str]
    dry: bool
    compiled: bool
    first: int = 0
    """The case to begin with."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit code."""
    parser = entry.Parser(prog="python -m bench.gpu_kernels", description="Time every operation on a GPU.")
    choices.add_arguments(parser)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes, on a CPU")
    parser.add_argument("--no-compile", action="store_true", help="leave out what torch.compile makes")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the records here, as JSON")
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        with os.fdopen(int(args.part[1]), "w", buffering=1) as pipe:
            return measure_part(Part(**json.loads(args.part[0])), lambda record: print(json.dumps(record), file=pipe))
    ops, dtypes, end = choices.operations(args), choices.precisions(args), choices.end(args)
    if not args.dry_run and not torch.cuda.is_available():
        raise UserError("bench.gpu_kernels: torch sees no CUDA device; --dry-run rehearses it on a CPU")
    names = [SHORT[dtype] for dtype in dtypes]
    sizes = (False,) if args.main else (False, True)
    parts = [Part(op, large, names, args.dry_run, not args.no_compile) for large in sizes for op in ops]
    records: list[Record] = []
    code = 0
    with entry.stopping():
        try:
            for record in of_parts(parts, end):
                records.append(record)
                if args.out:
                    write_json(args.out, records)
                if "failed" in record or "skipped" in record:
                    print(describe(record), flush=True)
        except KeyboardInterrupt:
            code = 130
    print(render(records))
    ours = [r for r in records if r["contender"] in OURS]
    failed = [r for r in records if "failed" in r and r["contender"] in (*OURS, PROCESS)]
    measured = sum("failed" not in r for r in ours)
    print(f"{measured} of {len(ours)} of ours measured" + "".join(f"; {describe(r)}" for r in failed))
    return code or int(bool(failed))


def describe(record: Record) -> str:
    """One line on what did not go well."""
    what = " ".join(record[key] for key in ("op", "size", "dtype", "contender") if key in record)
    return f"{what}: " + (f"failed, {record['failed']}" if "failed" in record else f"skipped, {record['skipped']}")


def of_parts(parts: Sequence[Part], end: float) -> Iterator[Record]:
    """The records of all parts, as they come; until `end`, by `time.monotonic`."""
    for part in parts:
        then: int | None = part.first
        while then is not None:
            then = yield from of_part(part._replace(first=then), end)


def of_part(part: Part, end: float) -> Generator[Record, None, int | None]:
    """The records of one part, from a process of its own.

    Returns:
        The case to go on with in a new process, where this one did not get to the end; None = it did, or cannot.
    """
    skipped = {"op": part.op, "contender": PROCESS, "skipped": f"no time left{' for large sizes' * part.large}"}
    if time.monotonic() > end:
        yield skipped
        return None
    begun = part.first - 1
    with tempfile.TemporaryFile() as log:
        with process_of(part, log) as (process, lines), killing(process, end):
            for line in lines:
                if not line.endswith("\n"):
                    break  # it died while it wrote
                said = json.loads(line)
                begun = said.get("begun", begun)
                if "begun" not in said:
                    yield said
            code = process.wait()
        if code == 0:
            return None
        if time.monotonic() > end:
            yield skipped
            return None
        if code != SPOILED:
            log.seek(0)
            text = log.read().decode(errors="replace")
            reason = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            yield {"op": part.op, "contender": PROCESS, "failed": reason, "traceback": text[-TAIL:]}
    return begun + 1 if begun >= part.first else None


@contextmanager
def process_of(part: Part, log: IO[bytes]) -> Iterator[tuple[subprocess.Popen[bytes], IO[str]]]:
    """A process that measures a part, and the lines that it sends; it does not outlive the block."""
    reading, writing = os.pipe()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        command_of(part, writing),
        pass_fds=[writing],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"PYTHONPATH": path},
    )
    os.close(writing)
    try:
        with os.fdopen(reading) as lines:
            yield process, lines
    finally:
        process.kill()
        process.wait()


def command_of(part: Part, pipe: int) -> list[str]:
    """Measures a part and sends what it finds to an open file."""
    return [sys.executable, "-m", "bench.gpu_kernels", "--part", json.dumps(part._asdict()), str(pipe)]


@contextmanager
def killing(process: subprocess.Popen[bytes], end: float) -> Iterator[None]:
    """Inside the block the process is killed when it is `end`, by `time.monotonic`."""
    timer = threading.Timer(min(end - time.monotonic(), threading.TIMEOUT_MAX), process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def measure_part(part: Part, say: Callable[[Record], object]) -> int:
    """Measure in this process.

    Args:
        part: what.
        say: told of every case that begins, `{"begun": number}`, and of every record.

    Returns:
        The exit code.
    """
    device = torch.device("cpu" if part.dry else "cuda")
    listed = cases(part.op, usable(part.op, part.dtypes, device), device, part.large, part.dry)
    for i, case in enumerate(listed):
        if i < part.first:
            continue
        say({"begun": i})
        for record in measure(case, device, part.dry, part.compiled):
            say(record)
            if "failed" in record and spoiled(device):
                return SPOILED
    return 0


def usable(op: str, names: Sequence[str], device: torch.device) -> list[torch.dtype]:
    """Precisions that one of our kernels has on the device; where none has, float32 for the others."""
    dtypes = [choices.PRECISIONS[name] for name in names]
    return [x for x in dtypes if not all(obstacle(p, operation(op), device, [x]) for p in OURS)] or [torch.float32]


def spoiled(device: torch.device) -> bool:
    """Whether nothing can be done any more with the device in this process, as after a bad access."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize()
        return bool(torch.ones(1, device=device).item() != 1)
    except RuntimeError:
        return True


def render(records: Sequence[Record]) -> str:
    """A Markdown table; tracebacks are in the record."""

    def cell(value: float | None) -> str:
        return markdown.NONE if value is None else f"{value:.4g}"

    rows = [
        [
            r["op"],
            *(r.get(key, markdown.NONE) for key in ("size", "dtype", "contender")),
            *(cell(r.get(k)) for k in ("eager_ms", "replayed_ms", "error")),
            r.get("failed", r.get("skipped", "")),
        ]
        for r in records
    ]
    return markdown.markdown_table(["op", "size", "dtype", "contender", "eager ms", "replayed ms", "error", ""], rows)


if __name__ == "__main__":
    entry.run(main)
