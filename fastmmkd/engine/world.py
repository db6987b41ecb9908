"""Which processes train together: found in what a launcher has set.

`deepspeed` and `torchrun` say it in RANK, WORLD_SIZE and MASTER_ADDR. `mpirun` and `srun` say it in variables of their
own, by which a world is made here; several tasks that nothing makes a world of are refused, because each of them would
train by itself into the same folder. How they meet is in `fastmmkd.engine.meeting`.
"""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from typing import NamedTuple

from fastmmkd.errors import UserError


class Variables(NamedTuple):
    """What a launcher says about a process."""

    launcher: str
    rank: str
    local_rank: str
    size: str
    local_size: str
    job: str
    """Tells one job from another on the same host."""


LAUNCHERS = (
    Variables(
        "Open MPI",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
        "PMIX_NAMESPACE",
    ),
    Variables(
        "Slurm", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE", "SLURM_JOB_ID"
    ),
    Variables("PMI", "PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE", "MPI_LOCALNRANKS", "PMI_ID"),
)
FIRST_PORT, PORTS = 20_000, 10_000


def find_world(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT of this process.

    Returns:
        What is to be set; nothing where they are, or where no launcher started several processes.

    Raises:
        UserError: a launcher did, on several hosts, and says nothing of which is the first.
    """
    if "RANK" in environment:
        return {}
    for of in LAUNCHERS:
        size = environment.get(of.size, "")
        if not size.isdigit() or int(size) < 2 or of.rank not in environment:
            continue
        local = environment.get(of.local_size, "")
        on_one_host = local == size
        nodes = environment.get("SLURM_STEP_NODELIST", "") if of.launcher == "Slurm" else ""
        address = environment.get("MASTER_ADDR") or ("127.0.0.1" if on_one_host else first_host(nodes))
        if not address:
            raise UserError(
                f"{of.launcher} started {size} processes ({of.size}), and nothing says where the first of them is; "
                "expected MASTER_ADDR and MASTER_PORT"
            )
        job = environment.get(of.job) or str(os.getppid())
        port = environment.get("MASTER_PORT") or str(FIRST_PORT + _number(job) % PORTS)
        return {
            "RANK": environment[of.rank],
            "LOCAL_RANK": environment.get(of.local_rank, "0"),
            "WORLD_SIZE": size,
            "LOCAL_WORLD_SIZE": of_this_host(local),
            "MASTER_ADDR": address,
            "MASTER_PORT": port,
        }
    return {}


def of_this_host(local: str) -> str:
    """How many processes a host has, of a launcher's word or Slurm's list: "4" and "4(x2)" -> "4"; "1" of none."""
    match = re.match(r"\d+", local)
    return match[0] if match else "1"


def first_host(nodes: str) -> str:
    """The first of a Slurm node list: "gpu[07-09,12],cpu1" -> "gpu07"; nothing where there is none."""
    match = re.match(r"([^,\[]+)(?:\[(\w+)[^\]]*\])?", nodes)
    return match[1] + (match[2] or "") if match else ""


def _number(job: str) -> int:
    return int(job) if job.isdigit() else sum(ord(letter) * 31**i for i, letter in enumerate(job[-16:]))


def set_world() -> None:
    """Put what `find_world` finds into the environment; a world of one process where nobody started several.

    Raises:
        UserError: what `find_world` refuses; a world that is said in part.
    """
    os.environ.update(find_world())
    lacking = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if "RANK" in os.environ and lacking:
        raise UserError(f"RANK is set, {', '.join(lacking)} not; expected all that a launcher sets, or none of them")
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        world = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({key: str(value) for key, value in world.items()})


def number_of_processes() -> int:
    """How many train together; 1 where nobody has said."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdigit() else 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def own_name() -> str:
    """What a process is called in a line among those of others: `"gpu07, rank 3"`."""
    return f"{socket.gethostname()}, rank {os.environ.get('RANK', '0')}"
