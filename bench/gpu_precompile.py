"""Compile Triton's kernels beforehand for a GPU that is not here: `python -m bench.gpu_precompile FOLDER --arch 90`.

What `fastmmkd.testing.specimens` launch, in bf16 and fp32, and what the steps of the MOSEI configs do, goes through
Triton's own compilation into a cache as it will be looked for over there: same Python, same Triton, same sources. A
cache remembers absolute paths; `settle` moves one to where it is wanted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench import entry
from fastmmkd.config import load_config
from fastmmkd.files import make_directory

CONFIGS = Path(__file__).parents[1] / "configs"
INTERMEDIATE = (".ttir", ".ttgir", ".llir", ".ptx", ".source")
"""Of a compilation, what nothing reads but people."""


class _Absent:
    """Stands for the driver of a GPU that is not here."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


def main(argv: Sequence[str] | None = None) -> int:
    """Fill the folder; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_precompile", description="Fill a cache of Triton's.")
    parser.add_argument("folder", type=Path, metavar="FOLDER")
    parser.add_argument("--arch", type=int, default=90)
    args = parser.parse_args(argv)
    precompile(args.folder, args.arch)
    return 0


def precompile(folder: Path, arch: int, ops: Sequence[str] = ()) -> int:
    """Compile into `folder`, for `sm_<arch>`; how many kernels.

    Args:
        folder: of the cache, which is made.
        arch: compute capability times 10.
        ops: only the specimens of these operations, and no steps.
    """
    from fastmmkd.testing.specimens import Make, specimens

    make_directory(folder)
    with compiling(folder, arch):
        for dtype in (torch.bfloat16, torch.float32):
            for specimen in specimens():
                if not ops or specimen.op in ops:
                    specimen.call(Make(dtype, "meta", "mosei"))()
        if not ops:
            _steps()
    for path in folder.rglob("*"):
        if path.suffix in INTERMEDIATE:
            path.write_bytes(b"")
    return len(list(folder.iterdir()))


@contextmanager
def compiling(folder: Path, arch: int) -> Iterator[None]:
    """Inside the block launches compile, into `folder`, and run nothing."""
    from triton.runtime import driver

    from fastmmkd.kernels import launch as launching

    before = os.environ.get("TRITON_CACHE_DIR"), driver._active
    os.environ["TRITON_CACHE_DIR"] = str(folder.absolute())
    driver.set_active(_Absent(arch))
    try:
        with launching.watched(_compile, divmod(arch, 10)):
            yield
    finally:
        driver._active = before[1]
        if before[0] is None:
            del os.environ["TRITON_CACHE_DIR"]
        else:
            os.environ["TRITON_CACHE_DIR"] = before[0]


def _compile(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], options: dict[str, Any]) -> None:
    kernel.run(*args, grid=grid, warmup=True, **options)


def _steps() -> None:
    """What the steps of the papers' configs launch."""
    from bench.step_counts import count
    from bench.workload import shape_of

    for path in sorted(CONFIGS.glob("*_mosei.json")):
        config = load_config(path)
        count(config, shape_of(config, None, None, "mosei"))


def settle(folder: Path, place: Path) -> int:
    """Put a cache where it will be used: a copy whose paths are those of `place`; how many kernels it has."""
    shutil.copytree(folder, place, dirs_exist_ok=True)
    for group in place.rglob("__grp__*.json"):
        content = json.loads(group.read_text())
        paths = content.get("child_paths", {})
        content["child_paths"] = {name: str(group.parent.absolute() / Path(path).name) for name, path in paths.items()}
        group.write_text(json.dumps(content))
    return len(list(place.iterdir()))


if __name__ == "__main__":
    entry.run(main)
