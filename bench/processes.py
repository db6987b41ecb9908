"""Processes that have little time: asked to stop first, so that they write down what they know, and killed after."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

GRACE = 12.0
"""Seconds from the request to stop to the end."""


def start(command: Sequence[str], folder: Path, environment: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
    """A process in a group of its own, whose output goes to `log`; it can be interrupted, wherever this was started."""
    with log.open("wb") as file, _interrupts():
        return subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@contextmanager
def _interrupts() -> Iterator[None]:
    """Whoever is started here hears SIGINT: what a shell runs in the background ignores it, and hands that on."""
    ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    if ignored:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if ignored:
            signal.signal(signal.SIGINT, signal.SIG_IGN)


def wait(
    process: subprocess.Popen[bytes], seconds: float, meanwhile: Callable[[], object], interval: float = 1.0
) -> bool:
    """Wait for an end, calling `meanwhile` now and then; whether it came in time. Else the process is stopped."""
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            try:
                process.wait(max(0.0, min(interval, end - time.monotonic())))
                return True
            except subprocess.TimeoutExpired:
                meanwhile()
    finally:
        if process.poll() is None:
            stop(process)
    return False


def stop(process: subprocess.Popen[bytes], grace: float = GRACE) -> None:
    """Interrupt a process as Ctrl-C does; after `grace` seconds kill it, and in any case all that it has started."""
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
