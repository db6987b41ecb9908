"""Two processes of a run that differ, or see different files: what they say, and that nothing is written before.

They are forked from a server that has torch already, and stand for two hosts: each has its own working folder.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastmmkd.data import store
from tests.conftest import make_dataset

PATIENCE_S = 120
HOST = socket.gethostname()
Ended = tuple[int, list[str]]
"""An exit code, and the lines on stderr."""


def process(rank: int, port: int, folder: Path, arguments: list[str], variables: dict[str, str], device: str) -> None:
    """`train.py` in `folder`, a process of two; `device`: what it says it computes on, where it is not empty."""
    os.chdir(folder)
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in where.items()} | variables)
    with open("stderr", "w") as said, open("stdout", "w") as told:
        os.dup2(said.fileno(), 2)
        os.dup2(told.fileno(), 1)
        sys.stdout, sys.stderr = told, said
        from fastmmkd.cli import train_main
        from fastmmkd.engine import run

        if device:
            run.device_name = lambda placed: device
        code = train_main(arguments)
        said.flush()
        told.flush()
    os._exit(code)


@pytest.fixture(scope="module")
def server() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fastmmkd.cli", "fastmmkd.engine.run", "torch._inductor.config"])
    return context


@pytest.fixture
def train(server: Any, tiny_config: dict, tmp_path: Path) -> Callable[..., list[Ended]]:
    """`train(arguments, variables, devices, meanwhile)`: what comes of two processes, of each its own; `meanwhile` gets
    the second one. Each has its data file, `data.h5`."""

    def run(
        arguments: list[list[str]] | None = None,
        variables: list[dict[str, str]] | None = None,
        devices: tuple[str, str] = ("", ""),
        meanwhile: Callable[[Any], None] | None = None,
    ) -> list[Ended]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        tiny_config["data"]["path"] = "data.h5"
        tiny_config["train"]["timeout_seconds"] = 60
        processes = []
        for rank in range(2):
            folder = tmp_path / str(rank)
            folder.mkdir(exist_ok=True)
            (folder / "tiny.json").write_text(json.dumps(tiny_config))
            if not (folder / "data.h5").exists():
                store.write(make_dataset(), folder / "data.h5")
            words = ["--config", "tiny.json", "--out", str(tmp_path / "run"), *(arguments or [[], []])[rank]]
            mine = (variables or [{}, {}])[rank] | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            processes.append(server.Process(target=process, args=(rank, port, folder, words, mine, devices[rank])))
        for started in processes:
            started.start()
        if meanwhile:
            meanwhile(processes[1])
        processes[0].join(PATIENCE_S)
        if meanwhile:  # it may be stopped
            processes[1].kill()
        processes[1].join(PATIENCE_S)
        said = [(tmp_path / str(rank) / "stderr").read_text().splitlines() for rank in range(2)]
        return [(started.exitcode, lines) for started, lines in zip(processes, said, strict=True)]

    return run


@pytest.fixture
def refused(train: Callable[..., list[Ended]], tmp_path: Path) -> Callable[..., str]:
    """`refused(...)`: the one line of the first process; the other is silent, and nothing was written."""

    def run(*arguments: Any, **named: Any) -> str:
        (code, said), (other, nothing) = train(*arguments, **named)
        assert (code, other) == (2, 2)
        assert nothing == []
        assert len(said) == 1, said
        assert not [path for path in tmp_path.rglob("*") if path.name in ("run.json", "seed_1")]
        return said[0]

    return run


def test_another_data_file_of_the_same_name(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    store.write(make_dataset(dims=(5, 4, 2)), tmp_path / "1" / "data.h5")
    assert refused().startswith(f"error: {HOST}, rank 1: the content of data.h5 is ")


def test_another_config(refused: Callable[..., str]) -> None:
    line = refused([[], ["--set", "train.epochs=9"]])
    assert line.startswith(f"error: {HOST}, rank 1: the config's hash is ")
    assert f", on {HOST}, rank 0, it is " in line


def test_other_variables(refused: Callable[..., str]) -> None:
    line = refused(variables=[{}, {"FASTMMKD_PROVIDER": "reference"}])
    assert line == f"error: {HOST}, rank 1: FASTMMKD_PROVIDER is reference, on {HOST}, rank 0, it is not set"


def test_another_device(refused: Callable[..., str]) -> None:
    line = refused(devices=("NVIDIA A", "NVIDIA B"))
    assert line == f"error: {HOST}, rank 1: device is NVIDIA B, on {HOST}, rank 0, it is NVIDIA A"


def test_a_file_that_one_has_not(refused: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    store.write(make_dataset(), tmp_path / "0" / "there.h5")
    line = refused([["--data", "there.h5"]] * 2)
    assert line.startswith(f"error: {HOST}, rank 1: there.h5: no such data file")


def test_a_folder_that_is_not_shared(refused: Callable[..., str], tmp_path: Path) -> None:
    line = refused([[], ["--out", str(tmp_path / "other")]])
    assert line == (
        f"error: {HOST}, rank 1: {tmp_path / 'other'}: rank 0 on {HOST} has made a file there that is not seen here; "
        "expected one folder that all hosts share: --out on a file system that they all have"
    )
    assert not (tmp_path / "other").exists()
    assert list((tmp_path / "run").iterdir()) == []


def test_a_mistake_of_all_is_said_once(refused: Callable[..., str]) -> None:
    assert refused([["--set", "train.epoch=9"]] * 2).startswith("error: tiny.json: train.epoch: unknown key; ")


def test_a_process_that_is_gone_or_does_not_answer(train: Callable[..., list[Ended]], tmp_path: Path) -> None:
    """The other one says it, with the command that goes on, and a step that waits is told of before."""

    def once_trained(number: int) -> Callable[[Any], None]:
        def signal_second(second: Any) -> None:
            pointer, begun = tmp_path / "run" / "seed_1" / "checkpoints" / "latest.json", time.time()
            while not (pointer.exists() and pointer.stat().st_mtime > begun):
                assert time.time() < begun + PATIENCE_S
                time.sleep(0.02)
            os.kill(second.pid, number)

        return signal_second

    words = ["--set", "train.epochs=2000", "--set", "train.timeout_seconds=12"]
    begun = ["train.py", "--config", "tiny.json", "--out", str(tmp_path / "run"), *words]
    (code, said), _ = train([words] * 2, meanwhile=once_trained(signal.SIGKILL))
    assert code == 1
    assert said[-1] == (
        f"error: {HOST}, rank 0: another process has ended, at 127.0.0.1; what it says tells why; to go on, start all "
        f"processes again: {' '.join(begun)} --resume"
    )
    (code, said), _ = train([[*words, "--resume"]] * 2, meanwhile=once_trained(signal.SIGSTOP))
    assert code == 1
    assert "rank 0: another process has not answered within 12 s (train.timeout_seconds): its host" in said[-1]
    assert said[-1].endswith(f": {' '.join(begun)} --resume")
    assert " s so far" in (tmp_path / "0" / "stdout").read_text()


def test_two_processes_train(train: Callable[..., list[Ended]], tmp_path: Path) -> None:
    assert [code for code, _ in train()] == [0, 0]
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["hosts"] == [HOST, HOST]
    assert (tmp_path / "run" / "deepspeed.log").exists()
    assert (tmp_path / "run" / "deepspeed.1.log").exists()
    assert not list((tmp_path / "run").glob(".shared_*"))
