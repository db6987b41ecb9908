"""What something was made with: versions of packages, commit, Python, devices."""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PACKAGES = ("fastmmkd", "torch", "deepspeed", "numpy", "h5py", "triton")
"""Those that decide what a run computes."""
UNKNOWN = "unknown"


def package_version(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def python_version() -> str:
    return platform.python_version()


def commit() -> str | None:
    """The commit of the checkout this code runs from, `+changes` where it has some.

    "unknown" where there is no git to ask, or it does not answer; None outside a checkout.
    """
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return UNKNOWN


def code_hash() -> str:
    """Of the package's Python files, the Triton kernels among them: a commit does not say what was changed since."""
    package = Path(__file__).parent
    beside = () if (package / "kernels").exists() else (package.parent / "kernels").rglob("*.py")  # in a checkout
    files = {path.relative_to(package).as_posix(): path for path in package.rglob("*.py")}
    files |= {path.relative_to(package.parent).as_posix(): path for path in beside}
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0".encode() + files[name].read_bytes())
    return digest.hexdigest()[:12]


def device_name(device: torch.device) -> str:
    """What a run says it was trained on: a GPU's name, or `"x86_64 CPU"`."""
    if device.type != "cuda":
        return f"{platform.machine()} CPU"
    import torch

    return torch.cuda.get_device_name(device)


def cpu_brand() -> str:
    """As the processor names itself: "AMD EPYC 9654 96-Core Processor"."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        match = None
    return match[1].strip() if match else platform.processor() or platform.machine()
