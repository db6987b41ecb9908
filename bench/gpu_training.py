"""Training on a GPU as users do it, with replayed steps and without: `python -m bench.gpu_training FILE`.

The deepest of the shipped MOSEI configs on synthetic data, by `train.py` under DeepSpeed in the precision that the
device has: once eagerly, once as `train.graph = auto` has it, once more through the `deepspeed` launcher. Losses epoch
by epoch must be the same. `--whole` trains it at full size to its end instead.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import entry, processes
from bench.gpu_sections import on_mosei
from fastmmkd.errors import UserError
from fastmmkd.files import make_directory, write_json

ROOT = Path(__file__).parents[1]
CONFIG = f"configs/{on_mosei()[0]}.json"
EPOCHS = 2
ALLOWED = 1e-2
"""Largest difference of an epoch's mean training loss, relative: kernels are the same, their rounding in bf16 is not
where a library chooses another algorithm inside a graph."""
TRAIN = {
    "eager": (sys.executable, "train.py", "--set", "train.graph=off"),
    "replayed": (sys.executable, "train.py"),
    "deepspeed launcher": (sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "1", "train.py"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Train, compare, print; the exit code is 1 where a run failed or losses differ."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_training", description="Train on a GPU with and without CUDA graphs."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="write what was found to this JSON file")
    parser.add_argument("--whole", action="store_true", help=f"{CONFIG} at full size, to its end")
    parser.add_argument("--rehearse", action="store_true", help="smaller, on a CPU")
    args = parser.parse_args(argv)
    folder = make_directory(args.file.with_suffix(""))
    fraction = "0.02" if args.rehearse else "1.0" if args.whole else "0.1"
    data, seconds = synthetic(folder, fraction)
    record: dict[str, Any] = {"config": CONFIG, "fraction": float(fraction), "synthesis seconds": seconds, "runs": {}}
    for name in ("replayed",) if args.whole else TRAIN:
        record["runs"][name] = run = train(name, data, folder, args.whole, args.rehearse)
        print(described(name, run), flush=True)
        write_json(args.file, record)
    failed = [name for name, run in record["runs"].items() if "failed" in run]
    record["largest difference"] = largest = difference([run for run in record["runs"].values() if "losses" in run])
    write_json(args.file, record)
    print(
        f"{len(record['runs']) - len(failed)} of {len(record['runs'])} runs trained; "
        f"losses differ by {largest:.1e}, allowed {ALLOWED:.0e}"
    )
    return int(bool(failed) or not largest <= ALLOWED)


def synthetic(folder: Path, fraction: str) -> tuple[Path, float]:
    """A data set like MOSEI, and how long it took."""
    path, started = folder / "mosei.h5", time.monotonic()
    command = ("-m", "fastmmkd.cli", "data", "synth", "--like", "mosei", "--fraction", fraction, "--seed", "1")
    code, output = run((sys.executable, *command, "--out", str(path)), folder / "synth.log")
    if code:
        raise UserError(f"fastmmkd data synth: {output.splitlines()[-1] if output else 'failed'}")
    return path, time.monotonic() - started


def train(name: str, data: Path, folder: Path, whole: bool, rehearsed: bool) -> dict[str, Any]:
    """One run of one seed: its losses and seconds by epoch, and what it ran on."""
    output = folder / name.replace(" ", "_")
    shutil.rmtree(output, ignore_errors=True)  # of an earlier call
    settings = [] if whole else [f"train.epochs={EPOCHS}", "eval.sweep=[0.0]"]
    if rehearsed:
        settings += ["model.mcim_layers=1", "model.encoder_layers=1"]
    sets = [part for setting in settings for part in ("--set", setting)]
    arguments = ("--config", CONFIG, "--data", str(data), "--seeds", "1", "--out", str(output), *sets)
    started = time.monotonic()
    program = TRAIN[name]
    at = program.index("train.py") + 1
    command = [*program[:at], *arguments, *program[at:]]
    code, said = run(command, folder / f"{output.name}.log")
    seconds = time.monotonic() - started
    if code:
        return {"seconds": seconds, "failed": f"exit code {code}", "output": said[-3000:]}
    about = json.loads((output / "run.json").read_text())
    epochs = [json.loads(line) for line in (output / "seed_1" / "metrics.jsonl").read_text().splitlines()]
    return {
        "seconds": seconds,
        "precision": about["precision"],
        "operations": sorted(set(about["operations"].values())),
        "device": about["device"],
        "losses": [epoch["train"]["loss"] for epoch in epochs],
        "epoch seconds": [epoch["engine"]["seconds"] for epoch in epochs],
        "samples per second": [epoch["engine"]["samples_per_second"] for epoch in epochs],
        "skipped steps": [epoch["engine"].get("skipped_steps", 0) for epoch in epochs],
        "said": [line for line in said.splitlines() if "train.graph" in line],
    }


def run(command: Sequence[str], log: Path) -> tuple[int, str]:
    """Exit code and output of a command."""
    process = processes.start(command, ROOT, {"PYTHONPATH": python_path()}, log)
    processes.wait(process, 600, lambda: None)
    return process.returncode, log.read_text(errors="replace")


def python_path() -> str:
    """Ours first, then what was brought along."""
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def difference(runs: Sequence[dict[str, Any]]) -> float:
    """The largest of the epochs' losses from those of the first run, relative to it."""
    if not runs:
        return float("nan")
    pairs = [(x, y) for run in runs for x, y in zip(runs[0]["losses"], run["losses"], strict=True)]
    return max(abs(x - y) / abs(x) for x, y in pairs)


def described(name: str, run: dict[str, Any]) -> str:
    """One line about a run."""
    if "failed" in run:
        return f"{name:20} FAILED: {run['failed']}\n{run['output']}"
    last = run["samples per second"][-1]
    return (
        f"{name:20} {run['precision']}, {', '.join(run['operations'])}: {len(run['losses'])} epochs in "
        f"{sum(run['epoch seconds']):.1f} s of {run['seconds']:.0f}, {last:,.0f} samples/s, losses "
        + " ".join(f"{loss:.4f}" for loss in run["losses"])
    )


if __name__ == "__main__":
    entry.run(main)
