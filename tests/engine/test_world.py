"""Processes that train together: how they are found, and what happens where they differ."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from fastmmkd.engine.world import find_world, first_host, set_world
from fastmmkd.errors import UserError
from tests.engine.run_records import parameters

ROOT = Path(__file__).parents[2]
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
SLURM = {
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456",
}


def test_open_mpi_on_one_host() -> None:
    world = find_world(OPEN_MPI)
    assert world["RANK"] == world["LOCAL_RANK"] == "1"
    assert (world["WORLD_SIZE"], world["LOCAL_WORLD_SIZE"], world["MASTER_ADDR"]) == ("2", "2", "127.0.0.1")
    assert world["MASTER_PORT"] == find_world(OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "0"})["MASTER_PORT"]


def test_slurm_on_two_hosts() -> None:
    world = find_world(SLURM)
    assert (world["RANK"], world["LOCAL_RANK"], world["WORLD_SIZE"]) == ("3", "1", "4")
    assert (world["MASTER_ADDR"], world["MASTER_PORT"]) == ("gpu07", "23456")
    assert world["LOCAL_WORLD_SIZE"] == "2"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("gpu[07-09,12],cpu1", "gpu07"), ("a1,a2", "a1"), ("a", "a"), ("rack2n[3,5]", "rack2n3"), ("", "")],
)
def test_first_of_a_node_list(nodes, first) -> None:
    assert first_host(nodes) == first


@pytest.mark.parametrize(
    "environment",
    [
        {},
        OPEN_MPI | {"RANK": "0"},  # another launcher has said it
        OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "1"},
        {"SLURM_PROCID": "0", "SLURM_NTASKS": "4"},  # of a batch script, outside a step
    ],
)
def test_nothing_to_be_set(environment) -> None:
    assert find_world(environment) == {}


def test_a_world_that_is_said_in_part_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match=r"^RANK is set, WORLD_SIZE, MASTER_ADDR, MASTER_PORT not; expected all "):
        set_world()


def test_hosts_without_a_first_one_are_refused() -> None:
    with pytest.raises(UserError, match=r"^Open MPI started 4 processes .*; expected MASTER_ADDR and MASTER_PORT$"):
        find_world(OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4"})
    told = OPEN_MPI | {"OMPI_COMM_WORLD_SIZE": "4", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"}
    assert {name: find_world(told)[name] for name in ("MASTER_ADDR", "MASTER_PORT")} == {
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "1234",
    }


def train_in_two(folder: Path, config: Path, of_ranks: list[Mapping[str, str]]) -> list[tuple[int, str]]:
    """`train.py` as Open MPI starts it, twice: exit codes, and what they say on stderr."""
    variables = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")}
    processes = [
        subprocess.Popen(
            [sys.executable, ROOT / "train.py", "--config", config, "--out", folder / "run"],
            env=variables
            | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            | OPEN_MPI
            | {"OMPI_COMM_WORLD_RANK": str(rank), "OMPI_COMM_WORLD_LOCAL_RANK": str(rank)}
            | of_rank,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, of_rank in enumerate(of_ranks)
    ]
    said = [process.communicate(timeout=120)[1] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.fixture
def config(tiny_config: dict, tmp_path: Path) -> Path:
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps(tiny_config))
    return path


def test_two_processes_of_mpirun_are_one_training(config, tmp_path: Path) -> None:
    ends = train_in_two(tmp_path, config, [{}, {}])
    assert [code for code, _ in ends] == [0, 0], ends
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert about["world_size"] == len(about["hosts"]) == 2
    assert parameters(tmp_path / "run")
