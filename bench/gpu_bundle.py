"""What a GPU machine without a network lacks, in one folder to be carried there: `python -m bench.gpu_bundle`.

The packages that such a machine rarely has, unpacked, and the extension with its CUDA kernels, compiled beforehand. Run
it with the Python and the torch of that machine (a CPU is enough, nvcc is needed); `bench.gpu_check` looks for the
folder and says where it does not fit. `docs/gpu.md` has the commands.

    <folder>/manifest.json   what it was made for and from
    <folder>/site/           packages, for PYTHONPATH
    <folder>/lib/fastmmkd/   the extension
    <folder>/triton/         a cache of Triton's, of the first architecture (`bench.gpu_precompile`)
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench import entry
from fastmmkd.errors import UserError
from fastmmkd.files import make_directory, write_json

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "gpu_bundle"
MANIFEST, SITE, LIBRARY, TRITON = "manifest.json", "site", Path("lib/fastmmkd"), "triton"
PACKAGES = ("pydantic", "pydantic_core", "annotated_types", "typing-inspection", "deepspeed", "hjson")
"""Not part of what a machine for PyTorch usually has; what they need besides is."""
ARCHITECTURES = "9.0"


def main(argv: Sequence[str] | None = None) -> int:
    """Make the folder anew; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_bundle", description="Prepare what a GPU machine without a network lacks."
    )
    parser.add_argument("--out", type=Path, default=FOLDER, metavar="DIR", help="default: build/gpu_bundle")
    parser.add_argument(
        "--architectures",
        default=ARCHITECTURES,
        metavar="LIST",
        help=f'of the CUDA kernels, as TORCH_CUDA_ARCH_LIST has them (default "{ARCHITECTURES}": H100, H200)',
    )
    parser.add_argument("--no-extension", action="store_true", help="packages only; it is compiled over there")
    args = parser.parse_args(argv)
    packages = pinned(PACKAGES)
    with tempfile.TemporaryDirectory() as folder:
        new = Path(folder)
        unpack(packages, new / SITE)
        if not args.no_extension:
            build(new, args.architectures)
        arch = args.architectures.split(";")[0].replace(".", "").partition("+")[0]
        run(
            "-m",
            "bench.gpu_precompile",
            str(new / TRITON),
            "--arch",
            arch,
            PYTHONPATH=f"{ROOT}{os.pathsep}{new / SITE}",
        )
        write_json(new / MANIFEST, made_for() | {"packages": packages, "architectures": args.architectures})
        shutil.rmtree(args.out, ignore_errors=True)
        make_directory(args.out.parent)
        shutil.move(new, args.out)
        os.chmod(args.out, 0o755)
        new.mkdir()  # the context removes it
    size = sum(path.stat().st_size for path in args.out.rglob("*") if path.is_file())
    print(f"{args.out}: {size / 2**20:.0f} MiB for {described(made_for())}")
    return 0


def made_for() -> dict[str, str]:
    """What the folder has to have in common with a machine to be of use there."""
    return {"python": python_version(), "torch": torch_version(), "sources": sources()}


def python_version() -> str:
    return ".".join(platform.python_version_tuple()[:2])


def torch_version() -> str:
    """With the build: "2.11.0+cu130".

    Raises:
        UserError: there is none.
    """
    try:
        import torch
    except ImportError:
        raise UserError(f"{sys.executable} has no torch; expected the Python of the GPU machine") from None
    return torch.__version__


def sources() -> str:
    """A hash of what the extension is compiled from."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "csrc").rglob("*"), ROOT / "setup.py"]):
        if path.suffix in (".cpp", ".h", ".cu", ".cuh", ".py"):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def described(about: dict[str, str]) -> str:
    """`made_for` in words."""
    return f"Python {about['python']}, torch {about['torch']}, sources {about['sources']}"


def misfit(folder: Path = FOLDER) -> str:
    """Why a folder is of no use here, or nothing."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return f"there is none at {folder}"
    here = made_for()
    for key, value in here.items():
        if manifest.get(key) != value:
            return f"it was made for {key} {manifest.get(key)}, here is {value}"
    return ""


def library(folder: Path = FOLDER) -> Path | None:
    """The extension in a folder, if it has one."""
    return next((folder / LIBRARY).glob("_C*.so"), None)


def pinned(names: Sequence[str], constraints: Path = ROOT / "constraints.txt") -> list[str]:
    """Requirements with the versions of `constraints.txt`: "pydantic" -> "pydantic==2.14.3".

    Raises:
        UserError: a package is not in it.
    """
    versions = dict(re.findall(r"^([\w.-]+)==([\w.+]+)", constraints.read_text(), re.MULTILINE))
    normal = {name.lower().replace("_", "-"): version for name, version in versions.items()}
    for name in names:
        if name.lower().replace("_", "-") not in normal:
            raise UserError(f"{constraints.name} pins no {name}; expected a line {name}==VERSION")
    return [f"{name}=={normal[name.lower().replace('_', '-')]}" for name in names]


def unpack(packages: Sequence[str], site: Path) -> None:
    """Fetch packages without what they need, and unpack them into `site`."""
    with tempfile.TemporaryDirectory() as wheels:
        run("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", wheels, *packages, DS_BUILD_OPS="0")
        files = sorted(map(str, Path(wheels).glob("*.whl")))
        run("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--target", str(site), *files)


def build(folder: Path, architectures: str) -> None:
    """Compile the extension into `folder`."""
    if importlib.util.find_spec("setuptools") is None:
        raise UserError(f"{sys.executable} has no setuptools; expected it for compiling the extension")
    with tempfile.TemporaryDirectory() as objects:
        where = ("--build-lib", str(folder / LIBRARY.parent), "--build-temp", objects)
        run("setup.py", "-q", "build_ext", *where, FASTMMKD_EXT="cuda", TORCH_CUDA_ARCH_LIST=architectures)


def run(*arguments: str, **environment: str) -> None:
    """Run this Python on something.

    Raises:
        UserError: it failed; with the end of what it said.
    """
    result = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True
    )
    if result.returncode:
        said = [line for line in (result.stderr or result.stdout).splitlines() if line.strip()]
        raise UserError(f"{' '.join(arguments[:4])} ...: {said[-1] if said else 'failed without a word'}")


if __name__ == "__main__":
    entry.run(main)
