"""What processes send each other: counted, and what rings make of it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from bench.volume import CountingCollectives, on_the_wire, table


def test_collectives_are_counted() -> None:
    own = not dist.is_initialized()
    if own:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        with CountingCollectives() as counted:
            for _ in range(2):
                dist.all_reduce(torch.ones(10))
            dist.all_gather([torch.empty(3)], torch.ones(3))
            dist.broadcast(torch.ones(5, dtype=torch.bfloat16), 0)
            torch.ones(100).sum()
        dist.all_reduce(torch.ones(10))
    finally:
        if own:
            dist.destroy_process_group()
    assert counted.volume == {
        "allreduce": {"calls": 2, "bytes": 80},
        "allgather": {"calls": 1, "bytes": 12},
        "broadcast": {"calls": 1, "bytes": 10},
    }


@pytest.mark.parametrize(
    ("name", "processes", "share"),
    [
        ("allreduce", 1, 0.0),
        ("allreduce", 2, 1.0),
        ("allreduce", 4, 1.5),
        ("reduce_scatter", 4, 0.75),
        ("allgather", 4, 3.0),
        ("broadcast", 4, 1.0),
    ],
)
def test_rings(name: str, processes: int, share: float) -> None:
    assert on_the_wire({name: {"calls": 1, "bytes": 1000}}, processes) == 1000 * share


def test_a_row_says_how_much_is_sent() -> None:
    volume = {"allreduce": {"calls": 2, "bytes": 4_000_000}, "allgather": {"calls": 1, "bytes": 500_000}}
    row = {"config": "a", "stage": 2, "processes": 2, "batch": 16, "parameters": 1_000_000, "volume": volume}
    assert table([row]).splitlines()[2].replace(" ", "") == "|a|2|2|16|1,000,000|3|4.50|4.50|"
