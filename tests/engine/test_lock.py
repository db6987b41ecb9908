"""One training at a time in a folder; whoever comes second is told who is there."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastmmkd.cli import main
from fastmmkd.engine.lock import RunLock, refuse_busy
from fastmmkd.errors import UserError

HOLD = """
import sys, time
from pathlib import Path
from fastmmkd.engine.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.take()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def run(train_tiny: Callable[..., Path], tiny_config: dict, tmp_path: Path) -> Path:
    tiny_config["train"]["epochs"] = 1
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_config))
    return train_tiny(tiny_config, tmp_path / "run")


@pytest.fixture
def holder(run: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the run's lock."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(run)], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def snapshot(run: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in run.rglob("*")}


@pytest.mark.usefixtures("process_state")
def test_a_second_training_is_refused_in_one_line(
    run: Path, holder: subprocess.Popen[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before, config = snapshot(run), str(tmp_path / "tiny.json")
    capfd.readouterr()
    assert main(["train", "--config", config, "--output", str(run), "--resume"]) == 2
    out, message = capfd.readouterr()
    assert message.startswith(f"error: {run}: process {holder.pid} on {socket.gethostname()}, since 20")
    assert message.endswith(" trains here; expected it to end, or another folder\n")
    assert (out, message.count("\n")) == ("", 1)
    assert snapshot(run) == before


def test_a_suite_and_a_program_are_refused_too(
    run: Path, holder: subprocess.Popen[str], train_tiny: Callable[..., Path], tiny_config: dict
) -> None:
    """What loads everything by itself finds out when it opens the run."""
    before = snapshot(run)
    tiny_config["train"]["epochs"] = 1
    with pytest.raises(UserError, match=f"process {holder.pid} on .* trains here"):
        train_tiny(tiny_config, run, resume=True)
    assert {path for path, time in snapshot(run).items() if time != before.get(path)} <= {run / "deepspeed.log"}


def test_the_lock_ends_with_its_process(
    run: Path, holder: subprocess.Popen[str], train_tiny: Callable[..., Path], tiny_config: dict
) -> None:
    os.kill(holder.pid, signal.SIGKILL)
    holder.wait()
    tiny_config["train"] |= {"epochs": 1, "seeds": [1, 2]}
    train_tiny(tiny_config, run, resume=True)
    refuse_busy(run)  # and with the run, whose process goes on


def test_the_file_alone_means_nothing(tmp_path: Path) -> None:
    refuse_busy(tmp_path)
    (tmp_path / "run.lock").write_text("anything")
    with RunLock(tmp_path) as lock:
        assert lock.take() is None
        (tmp_path / "run.lock").write_text("anything")
        with pytest.raises(UserError, match=r": another process trains here"):
            refuse_busy(tmp_path)
    refuse_busy(tmp_path)


def test_where_there_are_no_locks_it_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with RunLock(tmp_path) as lock:
        note = lock.take()
    assert note == (
        f"{tmp_path / 'run.lock'}: no lock on this file system (No locks available): start one training alone in this "
        "folder"
    )


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.lock: cannot write this file \(No such file or directory\)"):
        RunLock(tmp_path / "gone").take()
