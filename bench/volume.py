"""What processes send each other in a training step: `python -m bench.volume --config FILE ... [--record]`.

Counted, not timed: the collective operations of one step and the bytes that each process puts into them, which are the
same on every machine. ZeRO 0, 1 and 2, in two processes that share the config's batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench import entry
from fastmmkd.blocks import Config
from fastmmkd.config import load_config
from fastmmkd.evaluation import tables
from fastmmkd.files import make_directory, read_json, write_json
from fastmmkd.provenance import package_version

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "bench" / "results" / "hosts" / "volume.json"
STAGES, PROCESSES = (0, 1, 2), 2

Volume = dict[str, dict[str, int]]
"""Collective operation -> `calls`, and `bytes` that a process puts into them, in one step."""


class CountingCollectives(TorchDispatchMode):
    """Counts the collective operations of torch.distributed that are called inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.volume: Volume = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.rpartition("::")[2].strip("_").replace("_base", "")
            # What is gathered into comes first, what a process has of it second.
            given = args[1] if name in ("allgather", "reduce_scatter") else args[0] if args else ()
            count = self.volume.setdefault(name, {"calls": 0, "bytes": 0})
            count["calls"] += 1
            count["bytes"] += sum(x.nbytes for x in tree_leaves(given) if isinstance(x, torch.Tensor))
        return func(*args, **(kwargs or {}))


def on_the_wire(volume: Volume, processes: int) -> float:
    """Bytes that each process sends in a step by rings, as gloo and NCCL do with what is large.

    An all-reduce of b bytes takes 2 (n - 1) / n b of each of n processes, a reduce-scatter half of that, a gather of b
    bytes (n - 1) b. Broadcasts and reductions to one process are counted as b.
    """
    share = (processes - 1) / processes
    of_operation = {"allreduce": 2 * share, "reduce_scatter": share, "allgather": processes - 1.0}
    return sum(of_operation.get(name, 1.0) * count["bytes"] for name, count in volume.items()) if processes > 1 else 0.0


def at_stage(config: Config, stage: int) -> Config:
    """A config in fp32 under a ZeRO stage."""
    block = copy.deepcopy(config.deepspeed) | {"zero_optimization": {"stage": stage}}
    for half in ("fp16", "bf16"):
        block.pop(half, None)
    return config.model_copy(update={"deepspeed": block})


def measure(paths: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """A row per config and stage."""
    from bench import ranks
    from bench.workload import shape_of

    for path in paths:
        config = load_config(path)
        for stage in STAGES:
            said = ranks.volume(at_stage(config, stage), shape_of(config), PROCESSES)
            row = {"config": path.stem, "stage": stage, "processes": PROCESSES, "batch": config.train.batch_size}
            yield row | said


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print, write down; returns the exit code."""
    parser = entry.Parser(prog="python -m bench.volume", description="Count what processes send each other.")
    parser.add_argument("--config", type=Path, required=True, nargs="+", help="configs; their data need not be there")
    parser.add_argument("--record", action="store_true", help="write it down, for docs/hosts.md")
    args = parser.parse_args(argv)
    rows = list(measure(args.config))
    print(table(rows))
    if args.record:
        versions = {name: package_version(name) for name in ("torch", "deepspeed")}
        make_directory(RECORD.parent)
        write_json(RECORD, {"schema": 1, "versions": versions, "rows": rows})
        print(RECORD)
    return 0


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown: what a step of several processes sends."""
    header = ["config", "ZeRO", "processes", "batch", "parameters", "operations", "MB into them", "MB sent by each"]
    body = []
    for row in rows:
        volume = row["volume"]
        body.append(
            [
                row["config"],
                str(row["stage"]),
                str(row["processes"]),
                str(row["batch"]),
                f"{row['parameters']:,}",
                str(sum(count["calls"] for count in volume.values())),
                f"{sum(count['bytes'] for count in volume.values()) / 1e6:.2f}",
                f"{on_the_wire(volume, row['processes']) / 1e6:.2f}",
            ]
        )
    return tables.markdown_table(header, body)


def parts() -> dict[str, str]:
    """For `bench.report`: the table of docs/hosts.md."""
    return {"volume": table(read_json(RECORD, "a record of bench.volume")["rows"])}


if __name__ == "__main__":
    entry.run(main)
