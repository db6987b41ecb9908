"""Packaging that pyproject.toml cannot say: `kernels/` is installed as `fastmmkd.kernels`, `csrc/` as `fastmmkd._C`.

The extension is built where torch and a C++ compiler are at hand (`pip install --no-build-isolation`), with its CUDA
kernels where torch is a CUDA build and the toolkit is there; elsewhere the package is pure Python and computes with its
reference. `FASTMMKD_EXT=cpu` insists on the extension and leaves CUDA out, `cuda` insists on both, `none` on neither.
"""

import os
import re
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import find_packages, setup

FLAGS = ["-O3", "-g0", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
MODES = ("auto", "cpu", "cuda", "none")
ARCHITECTURES = ("7.0", "7.5", "8.0", "8.6", "9.0")
"""What is compiled for where no GPU is visible and TORCH_CUDA_ARCH_LIST says nothing; the last also as PTX."""


def toolkit() -> Path | None:
    """The CUDA toolkit's folder; an `nvcc` on PATH may be a wrapper from elsewhere, which misleads torch."""
    on_path = shutil.which("nvcc")
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), on_path and Path(on_path).resolve().parents[1]]
    for folder in map(Path, (*filter(None, named), "/usr/local/cuda")):
        if (folder / "bin/nvcc").exists() and (folder / "include/cuda_runtime_api.h").exists():
            return folder
    return None


def nvcc(folder: Path, *arguments: str) -> str:
    return subprocess.run([folder / "bin/nvcc", *arguments], capture_output=True, text=True, check=True).stdout


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


def nvcc_version(folder: Path) -> str:
    return re.search(r"release ([\d.]+)", nvcc(folder, "--version"))[1]


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


def extension() -> dict:
    """`ext_modules` and `cmdclass` for setup(), or nothing."""
    mode = os.environ.get("FASTMMKD_EXT", "auto")
    if mode not in MODES:
        sys.exit(f"FASTMMKD_EXT={mode}: expected one of {', '.join(MODES)}")
    if mode == "none":
        return {}

    def without(reason: str) -> dict:
        if mode != "auto":
            sys.exit(f"FASTMMKD_EXT={mode}: {reason}")
        print(f"fastmmkd: no compiled extension ({reason}); operations run their PyTorch reference", file=sys.stderr)
        return {}

    if toolkit():
        os.environ["CUDA_HOME"] = str(toolkit())  # torch looks when it is imported
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        return without("torch is not visible to this build; pip needs --no-build-isolation")
    if not shutil.which((os.environ.get("CXX") or "c++").split()[0]):
        return without("no C++ compiler")

    class Build(BuildExtension):
        def build_extension(self, ext) -> None:
            try:
                super().build_extension(ext)
            except Exception as error:
                without(f"it does not compile: {str(error).splitlines()[0]}")

    sources = glob("csrc/*.cpp") + glob("csrc/common/*.cpp") + glob("csrc/cpu/*.cpp")
    macros = [("FASTMMKD_FLAGS", '"{}"'.format(" ".join(FLAGS)))]
    kind = CppExtension
    obstacle = "" if mode == "cpu" else cuda_obstacle()
    if obstacle and mode == "cuda":
        return without(obstacle)
    if obstacle:
        print(f"fastmmkd: no CUDA kernels ({obstacle})", file=sys.stderr)
    elif mode != "cpu":
        folder = toolkit()
        os.environ["TORCH_CUDA_ARCH_LIST"] = architectures(folder)
        sources += glob("csrc/cuda/*.cpp") + glob("csrc/cuda/*.cu")
        macros.append(("FASTMMKD_CUDA", f'"{nvcc_version(folder)} for {os.environ["TORCH_CUDA_ARCH_LIST"]}"'))
        kind = CUDAExtension

    module = kind(
        "fastmmkd._C",
        sorted(sources),
        depends=sorted(glob("csrc/**/*.h", recursive=True) + glob("csrc/**/*.cuh", recursive=True)),
        include_dirs=[os.path.abspath("csrc")],
        define_macros=macros,
        extra_compile_args={"cxx": FLAGS, "nvcc": ["-O3"]},
        extra_link_args=["-fopenmp"],
        optional=mode == "auto",
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


setup(
    packages=[*find_packages(include=["fastmmkd", "fastmmkd.*"]), "fastmmkd.kernels"],
    package_dir={"fastmmkd.kernels": "kernels"},
    package_data={"fastmmkd.kernels": ["launch_parameters.json"]},
    **extension(),
)
