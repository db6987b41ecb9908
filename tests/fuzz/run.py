"""Mutate users' files for as long as is asked: `make fuzz SECONDS=600`.

Cases run in a process of their own, which may crash, hang or want too much memory: those are findings, as is every
exception but `UserError`. A finding is kept under tests/fuzz/corpus/<target>/, and `test_corpus.py` runs it from then
on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

import psutil

from tests.fuzz.mutations import mutated
from tests.fuzz.targets import TARGETS

ROOT = Path(__file__).parents[2]
CORPUS = Path(__file__).parent / "corpus"
PATIENCE_S = 20.0
"""That a case may take of a processor."""
STILL_S = 240.0
"""That it may take of a clock, on a machine that has other work."""
MEMORY = 12 << 30
"""Address space of the process, of which torch takes several GB."""


def serve(pipe: Connection) -> None:
    """Run cases that are sent, (target, folder): what went wrong, or nothing."""
    from fastmmkd.errors import UserError

    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    while True:
        name, folder = pipe.recv()
        try:
            TARGETS[name].read(Path(folder))
            said = ""
        except UserError as error:
            said = "" if str(error).strip() else "UserError without a word"
        except BaseException:
            said = traceback.format_exc()
        pipe.send(said)


class Reader:
    """Runs cases in another process, which is begun anew when one ends it."""

    def __init__(self) -> None:
        self.process: multiprocessing.process.BaseProcess | None = None

    def finding(self, name: str, folder: Path) -> str:
        """What is wrong with how a target reads a folder, or nothing."""
        if self.process is None:
            context = multiprocessing.get_context("spawn")
            self.pipe, other = context.Pipe()
            self.process = context.Process(target=serve, args=(other,), daemon=True)
            self.process.start()
            other.close()
            patience = PATIENCE_S + 60  # it has to import torch
        else:
            patience = self._processor_s() + PATIENCE_S
        self.pipe.send((name, str(folder)))
        began = time.monotonic()
        try:
            while self._processor_s() < patience and time.monotonic() - began < STILL_S:
                if self.pipe.poll(1.0):
                    return self.pipe.recv()
            reason = f"it takes more than {PATIENCE_S:.0f} s of a processor, or {STILL_S:.0f} s of a clock"
        except (EOFError, ConnectionResetError):
            self.process.join()
            reason = f"the process ended with exit code {self.process.exitcode}"
        self.close()
        return reason

    def _processor_s(self) -> float:
        """What the process has used so far."""
        assert self.process is not None
        try:
            times = psutil.Process(self.process.pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return times.user + times.system

    def close(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
        self.process = None


def trained(folder: Path) -> Path:
    """A small finished run, for the targets that read runs."""
    from fastmmkd.data import store
    from tests.conftest import make_config, make_dataset

    store.write(make_dataset(), folder / "data.h5")
    (folder / "config.json").write_text(json.dumps(make_config(folder / "data.h5")))
    command = [sys.executable, "train.py", "--config", folder / "config.json", "--out", folder / "run"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def main() -> int:
    parser = argparse.ArgumentParser(description="Read files that are nearly right.")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--target", nargs="*", choices=TARGETS, default=list(TARGETS))
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    drawn, reader, tried, found = random.Random(args.seed), Reader(), Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as place:
        os.environ["FASTMMKD_FUZZ_RUN"] = str(trained(Path(place)))
        right = {name: Path(place) / "right" / name for name in args.target}
        for name, folder in right.items():
            folder.mkdir(parents=True)
            TARGETS[name].make(folder)
            said = reader.finding(name, folder)
            assert not said, f"{name}: {said}"
        end = time.monotonic() + args.seconds
        while time.monotonic() < end:
            name = drawn.choice(args.target)
            folder = Path(place) / "case"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(right[name], folder)
            file = drawn.choice(sorted(x for x in folder.rglob(TARGETS[name].mutable) if x.is_file()))
            content = mutated(file.name, file.read_bytes(), drawn)
            file.write_bytes(content)
            tried[name] += 1
            said = reader.finding(name, folder)
            if said:
                found[name] += 1
                keep(name, file.relative_to(folder), content, said)
    reader.close()
    print("; ".join(f"{name}: {count} tried, {found[name]} found" for name, count in sorted(tried.items())))
    return int(bool(found))


def keep(name: str, file: Path, content: bytes, said: str) -> None:
    """Put a finding into the corpus, and say it."""
    place = CORPUS / name / hashlib.sha256(content).hexdigest()[:12] / file
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_bytes(content)
    last = [line for line in said.splitlines() if line.strip()][-1]
    print(f"{name}: {last[:200]}\n    {place.relative_to(ROOT)}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
