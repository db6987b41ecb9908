"""How the extension `fastmmkd._C` is compiled: by setup.py at installation, and where that could not, on first use.

This file imports nothing of the package, and torch only where it is needed: setup.py runs it before either is there.
`FASTMMKD_EXT=cpu` insists on the extension and leaves CUDA out, `cuda` insists on both, `none` on neither; `auto`, the
default, takes what can be had.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

FLAGS = ("-O3", "-g0", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden")
MODES = ("auto", "cpu", "cuda", "none")
ARCHITECTURES = ("7.0", "7.5", "8.0", "8.6", "9.0")
"""What is compiled for where no GPU is visible and TORCH_CUDA_ARCH_LIST says nothing; the last also as PTX."""
SOURCES = (".cpp", ".h", ".cu", ".cuh")


class CannotBuild(Exception):
    """Why there will be no extension, in words."""


def mode() -> str:
    """`FASTMMKD_EXT`.

    Raises:
        SystemExit: it has no such value.
    """
    name = os.environ.get("FASTMMKD_EXT", "auto")
    if name not in MODES:
        sys.exit(f"FASTMMKD_EXT={name}: expected one of {', '.join(MODES)}")
    return name


def toolkit() -> Path | None:
    """The CUDA toolkit's folder; an `nvcc` on PATH may be a wrapper from elsewhere, which misleads torch."""
    on_path = shutil.which("nvcc")
    beside = str(Path(on_path).resolve().parents[1]) if on_path else None
    named = os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), beside, "/usr/local/cuda"
    for folder in (Path(name) for name in named if name):
        if (folder / "bin/nvcc").exists() and (folder / "include/cuda_runtime_api.h").exists():
            return folder
    return None


def nvcc(folder: Path, *arguments: str) -> str:
    """What the compiler of a toolkit prints."""
    return subprocess.run([folder / "bin/nvcc", *arguments], capture_output=True, text=True, check=True).stdout


def nvcc_version(folder: Path) -> str:
    """ "13.0"."""
    found = re.search(r"release ([\d.]+)", nvcc(folder, "--version"))
    return found[1] if found else "unknown"


def cuda_obstacle() -> str:
    """Why the CUDA kernels cannot be compiled, or nothing."""
    import torch

    if not torch.version.cuda:
        return "torch is a build without CUDA"
    folder = toolkit()
    if not folder:
        return "no CUDA toolkit; CUDA_HOME may name its folder"
    version = nvcc_version(folder)
    if version.split(".")[0] != torch.version.cuda.split(".")[0]:
        return f"nvcc is {version}, torch is built for CUDA {torch.version.cuda}"
    return ""


def architectures(folder: Path) -> str:
    """TORCH_CUDA_ARCH_LIST: as it is, else the GPUs that are visible, else all that this nvcc knows."""
    import torch

    if os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return os.environ["TORCH_CUDA_ARCH_LIST"]
    if torch.cuda.is_available():
        visible = (torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count()))
        return ";".join(sorted({f"{major}.{minor}" for major, minor in visible}))
    known = nvcc(folder, "--list-gpu-arch").split()
    return ";".join(arch for arch in ARCHITECTURES if f"compute_{arch.replace('.', '')}" in known) + "+PTX"


def extension(csrc: Path) -> dict[str, Any]:
    """`ext_modules` and `cmdclass` for setup(), or nothing where `FASTMMKD_EXT` is "none".

    Args:
        csrc: the folder of the sources, relative to where setup() runs.

    Raises:
        CannotBuild: it cannot be compiled here; raised by what is returned, too, while setup() compiles.
    """
    if mode() == "none":
        return {}
    if toolkit():
        os.environ["CUDA_HOME"] = str(toolkit())  # torch looks when it is imported
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        raise CannotBuild("torch, or setuptools, is not visible to this build") from None
    if not shutil.which((os.environ.get("CXX") or "c++").split()[0]):
        raise CannotBuild("no C++ compiler")

    class Build(BuildExtension):
        def build_extension(self, ext: Any) -> None:
            try:
                super().build_extension(ext)
            except Exception as error:
                raise CannotBuild(f"it does not compile: {str(error).splitlines()[0]}") from error

    folders = ["", "common", "cpu"]
    macros = [("FASTMMKD_FLAGS", '"{}"'.format(" ".join(FLAGS)))]
    kind = CppExtension
    obstacle = "" if mode() == "cpu" else cuda_obstacle()
    if obstacle and mode() == "cuda":
        raise CannotBuild(obstacle)
    if obstacle:
        print(f"fastmmkd: no CUDA kernels ({obstacle})", file=sys.stderr)
    elif mode() != "cpu":
        folder = toolkit()
        assert folder
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(folder)
        folders.append("cuda")
        macros.append(("FASTMMKD_CUDA", f'"{nvcc_version(folder)} for {os.environ["TORCH_CUDA_ARCH_LIST"]}"'))
        kind = CUDAExtension
    sources = [path for folder in folders for path in (csrc / folder).glob("*.c*") if path.suffix in (".cpp", ".cu")]
    module = kind(
        "fastmmkd._C",
        sorted(map(str, sources)),
        depends=sorted(str(path) for path in csrc.rglob("*") if path.suffix in (".h", ".cuh")),
        include_dirs=[str(csrc.absolute())],
        define_macros=macros,
        extra_compile_args={"cxx": list(FLAGS), "nvcc": ["-O3"]},
        extra_link_args=["-fopenmp"],
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


def build(csrc: Path, out: Path) -> None:
    """Compile the extension into `out/fastmmkd`.

    Raises:
        CannotBuild: see `extension`.
    """
    from setuptools import setup

    arguments = ["-q", "build_ext", "--build-lib", str(out), "--build-temp", str(out / "objects")]
    setup(name="fastmmkd", packages=[], py_modules=[], script_args=arguments, **extension(csrc))


if __name__ == "__main__":
    try:
        build(Path(sys.argv[1]), Path(sys.argv[2]))
    except CannotBuild as reason:
        sys.exit(str(reason))
