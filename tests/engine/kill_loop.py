"""Kill a training at random moments, resume it, and compare what it comes to with one that was left alone.

    OMP_NUM_THREADS=1 python -m tests.engine.kill_loop --config CONFIG --kills 100 [--processes 2] [--seed N]

Whatever it was doing - starting, training, writing a checkpoint, evaluating, drawing - the resumed run must be the same
to the last bit. `test_kills.py` does a few; the config should train for seconds.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tests.engine.run_records import assert_same_run

ROOT = Path(__file__).parents[2]


def start(config: Path, run: Path, processes: int = 0) -> subprocess.Popen[bytes]:
    """`train.py --resume` in a process group of its own; `processes` = 0 is plain Python, else DeepSpeed's launcher."""
    launcher = [sys.executable]
    if processes:
        launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(processes)]
    environment = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    kept = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    with (run.parent / f"{run.name}.log").open("ab") as log:
        return subprocess.Popen(
            [*launcher, str(ROOT / "train.py"), "--config", str(config), "--out", str(run), "--resume"],
            env=kept | environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def kills(config: Path, folder: Path, count: int, seed: int, processes: int = 0) -> Iterator[tuple[Path, Path, int]]:
    """Kill `count` times in all, beginning anew whenever a training gets to its end.

    Yields:
        The run that was left alone, one that was killed, both finished; and how often it was killed.
    """
    drawn = random.Random(seed)
    alone, started = folder / "alone", time.monotonic()
    assert start(config, alone, processes).wait() == 0, (folder / "alone.log").read_text()
    whole = time.monotonic() - started
    number = left = 0
    while left < count:
        run, here = folder / f"killed_{number}", 0
        while True:
            process = start(config, run, processes)
            try:
                # A last start is left alone, so that the run ends.
                code = process.wait(drawn.uniform(0, 1.1 * whole) if left < count else None)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                left, here = left + 1, here + 1
                continue
            assert code == 0, (folder / f"{run.name}.log").read_text()
            break
        yield alone, run, here
        shutil.rmtree(run)
        number += 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill trainings at random moments, resume, compare.")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "kills")
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    args.folder.mkdir(parents=True)
    total = 0
    for alone, run, here in kills(args.config, args.folder, args.kills, args.seed, args.processes):
        assert_same_run(alone, run)
        total += here
        print(f"killed {here} times, {total} in all: the same to the last bit", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
