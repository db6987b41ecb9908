"""Whether a machine has what the GPU check needs, said in the first seconds: `python -m bench.gpu_preflight FILE`.

The device, every package by importing it, one product on the device, the extension, and `fastmmkd env`.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
from collections.abc import Sequence
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench import entry
from fastmmkd.files import write_json

PACKAGES = {
    "torch": "torch",
    "triton": "triton",
    "numpy": "numpy",
    "h5py": "h5py",
    "pydantic": "pydantic",
    "scikit-learn": "sklearn",
    "scipy": "scipy",
    "matplotlib": "matplotlib",
    "tensorboard": "tensorboard",
    "safetensors": "safetensors",
    "rich": "rich",
    "nvidia-ml-py": "pynvml",
    "pytest": "pytest",
    "pytest-xdist": "xdist",
    "hypothesis": "hypothesis",
    "deepspeed": "deepspeed",
}
"""Distribution -> what is imported; the slowest comes last."""


def main(argv: Sequence[str] | None = None) -> int:
    """Look, print, write; the exit code is 1 where something is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_preflight", description="Say whether the GPU check can run here."
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="write what was found to this JSON file")
    parser.add_argument("--rehearse", action="store_true", help="no GPU is needed")
    args = parser.parse_args(argv)
    print(said_by("nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_mode", "--format=csv,noheader"))
    packages, missing = {}, []
    for name, module in PACKAGES.items():
        packages[name], problem = imported(name, module)
        if problem:
            missing.append(f"{name}: {problem}")
        print(f"{name:16} {packages[name]}{'  MISSING: ' + problem if problem else ''}", flush=True)
    facts: dict[str, Any] = {"packages": packages, "missing": missing}
    if not missing:
        facts |= device(args.rehearse)
    write_json(args.file, facts)
    if missing:
        print(f"missing: {'; '.join(missing)} (python -m bench.gpu_bundle makes what can be brought along)")
    elif not facts["device works"]:
        print("the device does not compute")
    else:
        print(f"extension: {facts['extension'] or 'loaded'}; the GPU check can run")
    return int(bool(missing) or not facts["device works"])


def imported(name: str, module: str) -> tuple[str, str]:
    """The version of a package, and what kept it from being imported, or nothing."""
    try:
        import_module(module)
    except Exception as error:
        return "-", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else module}"
    try:
        return version(name), ""
    except PackageNotFoundError:  # brought along without its metadata
        return getattr(import_module(module), "__version__", "?"), ""


def device(rehearsed: bool) -> dict[str, Any]:
    """Whether the device computes; what the extension lacks; and what `fastmmkd env` prints."""
    import torch

    from fastmmkd.environment import print_environment
    from fastmmkd.ops import extension

    print_environment()
    lacking = extension.missing
    if not lacking and not rehearsed and not extension.has_cuda:
        lacking = "the extension was built without CUDA"
    on = "cpu" if rehearsed else "cuda"
    x = torch.full((64, 64), 0.5, device=on if rehearsed or torch.cuda.is_available() else "cpu")
    works = bool((x @ x == 16).all()) and (rehearsed or x.is_cuda)
    return {"device works": works, "extension": lacking}


def said_by(*command: str) -> str:
    """What a command prints, or why there is nothing."""
    if not shutil.which(command[0]):
        return f"there is no {command[0]}"
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
    except subprocess.TimeoutExpired:
        return f"{command[0]} does not answer"


if __name__ == "__main__":
    entry.run(main)
