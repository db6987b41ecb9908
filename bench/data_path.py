"""Times and memory of the data path on a set of MOSEI's size: `python -m bench.data_path [--fraction F] [--record]`.

Synthesis, writing, reading with its hash checked, standardising onto the device, and one epoch of missing draws alone.
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from bench import entry, records
from bench.workload import keys_of
from fastmmkd.config import load_config
from fastmmkd.data import store
from fastmmkd.data.batches import ResidentSplit, View
from fastmmkd.data.synthetic import synthesize
from fastmmkd.evaluation import tables

KIND = "data_path"
CONFIGS = Path(__file__).parents[1] / "configs"
BATCH, VIEWS = 16, (View.MISSING, View.MISSING_2)
Result = TypeVar("Result")


class Measurements:
    """Runs functions one after the other, and notes seconds and the process's peak memory after each."""

    def __init__(self) -> None:
        self.listed: list[dict[str, Any]] = []

    def __call__(self, name: str, run: Callable[[], Result]) -> Result:
        started = time.perf_counter()
        result = run()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        self.listed.append({"stage": name, "seconds": time.perf_counter() - started, "peak bytes so far": peak})
        return result


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, record; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.data_path", description="Time the data path.")
    parser.add_argument("--like", default="mosei", choices=["mosi", "mosei", "iemocap"])
    parser.add_argument("--fraction", type=float, default=1.0, metavar="F", help="of the real set's size (default 1)")
    parser.add_argument("--record", action="store_true", help="append a record under bench/results/speed")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        body = measure(args.like, args.fraction, Path(folder) / "data.h5", device)
    print(render(body))
    if args.record:
        print(records.append(KIND, body, device))
    return 0


def measure(like: str, fraction: float, path: Path, device: torch.device) -> dict[str, Any]:
    """Every part of the path once."""
    measured = Measurements()
    made = measured("synthesise", lambda: synthesize(like, fraction, seed=1))
    measured("write", lambda: store.write(made, path))
    read = measured("read, hash checked", lambda: store.read(path))
    config = load_config(next(CONFIGS.glob(f"*_{like}.json")))
    resident = measured(
        "standardise onto the device",
        lambda: ResidentSplit(
            read.splits["train"], read.normalisation, config=config, device=device, dtype=torch.float32
        ),
    )
    measured(f"one epoch of draws, {len(VIEWS)} versions, batch {BATCH}", lambda: draw_epoch(resident, device))
    train = read.splits["train"]
    return {
        "like": like,
        "samples": sum(len(split) for split in read.splits.values()),
        "training samples": len(train),
        "frames": max(read.longest),
        "dims": list(read.feature_dims),
        "file bytes": path.stat().st_size,
        "stages": measured.listed,
    }


def draw_epoch(resident: ResidentSplit, device: torch.device) -> None:
    """What a training draws in an epoch, nothing else."""
    for step in range(resident.size // BATCH):
        keys = keys_of(step, 1, BATCH, resident.size, device)
        resident.training_batch(*keys, VIEWS)
    if device.type == "cuda":
        torch.cuda.synchronize()


def render(body: dict[str, Any]) -> str:
    """Markdown: a line on the data, and a row per part of the path."""
    dims = " + ".join(map(str, body["dims"]))
    text = f"Like {body['like']}: {body['samples']:,} samples of {body['frames']} frames of {dims} features"
    rows = [[s["stage"], f"{s['seconds']:.2f}", f"{s['peak bytes so far'] / 1e9:.2f}"] for s in body["stages"]]
    table = tables.markdown_table(["stage", "seconds", "peak memory so far, GB"], rows)
    return f"{text}, a file of {body['file bytes'] / 1e6:,.0f} MB.\n\n{table}"


if __name__ == "__main__":
    entry.run(main)
