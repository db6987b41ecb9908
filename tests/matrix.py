"""Try the lowest and the highest versions that pyproject.toml claims, in throw-away environments: `make matrix`.

Each: an environment under build/matrix, the dependencies, the kernels compiled on first use, the tests of operations,
methods and training, and a training of a small config. Downloads gigabytes; minutes on two cores.

    python tests/matrix.py [lowest] [highest]
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PYTHONS = {"lowest": "python3.10", "highest": "python3.12"}
TORCH = {"lowest": "2.6.0", "highest": "2.13.0"}
TESTS = ("tests/ops", "tests/parity", "tests/methods", "tests/test_predict_and_load.py", "tests/engine/test_trainer.py")


def requirements(which: str) -> list[str]:
    """Of a set: at its floor, or whatever is newest."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    named = re.findall(r'^  "([\w-]+)>=([\d.]+)[^"]*"', text.partition("[project.optional")[0], re.MULTILINE)
    pinned = [f"{name}=={floor}" if which == "lowest" else name for name, floor in named if name != "torch"]
    return [
        f"torch=={TORCH[which]}",
        *pinned,
        "pytest",
        "pytest-benchmark",
        "pytest-xdist",
        "hypothesis",
        "setuptools<82",
        "ninja",
    ]


def run(*command: object, **options: object) -> None:
    print("+", *command, flush=True)
    subprocess.run(list(map(str, command)), cwd=ROOT, check=True, **options)  # type: ignore[call-overload]


def main(sets: list[str]) -> int:
    for which in sets or list(PYTHONS):
        folder = ROOT / "build" / "matrix" / which
        python = folder / "bin" / "python"
        if not python.exists():
            found = shutil.which(PYTHONS[which])
            if not found:
                print(f"{which}: there is no {PYTHONS[which]}; left out")
                continue
            run(found, "-m", "venv", folder)
        run(python, "-m", "pip", "install", "-q", *requirements(which))
        run(python, "-m", "fastmmkd.cli", "build")
        one_thread = {"env": os.environ | {"OMP_NUM_THREADS": "1"}}
        run(python, "-m", "pytest", "-n", "2", "-q", "-m", "not slow and not gpu", *TESTS, **one_thread)
        data, out = folder / "demo.h5", folder / "run"
        shutil.rmtree(out, ignore_errors=True)
        run(
            python,
            "-m",
            "fastmmkd.cli",
            "data",
            "synth",
            "--like",
            "mosi",
            "--fraction",
            "0.1",
            "--seed",
            "1",
            "--out",
            data,
        )
        settings = ("--set", "train.epochs=2", "--seeds", "1")
        run(python, "train.py", "--config", "configs/demo.json", "--data", data, "--out", out, *settings)
        run(python, "-m", "pip", "freeze")
        print(f"{which}: works", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
