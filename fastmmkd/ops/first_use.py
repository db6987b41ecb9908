"""Compiling the extension where installation did not: once for each torch, Python and state of the sources.

`pip install` builds a package where torch cannot be seen, so what it installs is Python and the sources. The first
training, evaluation or prediction compiles them, which takes about a minute, and keeps the result in a folder of the
user's: `FASTMMKD_CACHE`, or `fastmmkd` in `XDG_CACHE_HOME` or `~/.cache`. Of several processes one compiles, the others
wait. Where it fails it is said once, and tried again by `fastmmkd build` only.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import torch

from fastmmkd import building
from fastmmkd.errors import UserError
from fastmmkd.files import make_directory, write_text

FAILED = "failed.txt"


def sources() -> Path | None:
    """The folder of the C++ sources: installed with the package, or beside it in a checkout; None where it has none."""
    package = Path(building.__file__).parent
    return next((x for x in (package / "_csrc", package.parent / "csrc") if (x / "registration.cpp").exists()), None)


def cache() -> Path:
    """Where extensions are kept."""
    own = os.environ.get("FASTMMKD_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastmmkd"


def place() -> Path | None:
    """The folder of the extension that fits here, which need not exist; None where there are no sources."""
    csrc = sources()
    if csrc is None:
        return None
    digest = hashlib.sha256(Path(building.__file__).read_bytes())
    for path in sorted(csrc.rglob("*")):
        if path.suffix in building.SOURCES:
            digest.update(path.relative_to(csrc).as_posix().encode() + path.read_bytes())
    python = f"python{sys.version_info.major}.{sys.version_info.minor}"
    return cache() / f"torch{torch.__version__}-{python}-{platform.machine()}-{digest.hexdigest()[:12]}"


def kept() -> Path | None:
    """The extension that was compiled before."""
    folder = place()
    path = folder / library() if folder else None
    return path if path and path.exists() else None


def library() -> str:
    """The name of the extension's file."""
    return f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def compile_once(again: bool = False) -> Path:
    """The extension, compiled now or before; a line on stderr before it is compiled, and one after.

    Args:
        again: also where it failed before.

    Raises:
        UserError: it cannot be compiled; why.
    """
    csrc, folder = sources(), place()
    if csrc is None or folder is None:
        raise UserError("the kernels cannot be compiled: their sources are not installed")
    make_directory(folder)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        target, failed = folder / library(), folder / FAILED
        if target.exists():
            return target
        if failed.exists() and not again:
            raise UserError(failed.read_text(encoding="utf-8").strip())
        started = time.monotonic()
        print("fastmmkd: compiling the kernels for this machine, once; about a minute ...", file=sys.stderr, flush=True)
        try:
            _compile(csrc, target)
        except UserError as error:
            write_text(failed, f"{error}\n")
            raise
        failed.unlink(missing_ok=True)
        took = time.monotonic() - started
        print(f"fastmmkd: compiled in {took:.0f} s, kept in {folder}", file=sys.stderr, flush=True)
    return target


def _compile(csrc: Path, target: Path) -> None:
    volta = torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0)  # Triton's kernels serve others
    mode = os.environ.get("FASTMMKD_EXT") or ("auto" if volta else "cpu")
    with tempfile.TemporaryDirectory(dir=target.parent) as out:
        command = [sys.executable, building.__file__, str(csrc), out]
        done = subprocess.run(
            command, cwd=out, env={**os.environ, "FASTMMKD_EXT": mode}, capture_output=True, text=True
        )
        built = next(Path(out).glob("fastmmkd/_C*"), None)
        if done.returncode or built is None:
            said = [line for line in done.stderr.splitlines() if line.strip()]
            raise UserError(f"the kernels cannot be compiled: {said[-1] if said else 'without a word'}")
        built.rename(target)
