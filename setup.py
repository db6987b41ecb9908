"""Packaging that pyproject.toml cannot say: `kernels/` is installed as `fastmmkd.kernels`, `csrc/` as `fastmmkd._C`.

The extension is built where torch and a C++ compiler are at hand (`pip install --no-build-isolation`); elsewhere the
package is pure Python and computes with its reference. `FASTMMKD_EXT=cpu` insists on it, `none` leaves it out.
"""

import os
import shutil
import sys
from glob import glob

from setuptools import find_packages, setup

FLAGS = ["-O3", "-g0", "-fopenmp", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden"]
MODES = ("auto", "cpu", "none")


def extension() -> dict:
    """`ext_modules` and `cmdclass` for setup(), or nothing."""
    mode = os.environ.get("FASTMMKD_EXT", "auto")
    if mode not in MODES:
        sys.exit(f"FASTMMKD_EXT={mode}: expected one of {', '.join(MODES)}")
    if mode == "none":
        return {}

    def without(reason: str) -> dict:
        if mode == "cpu":
            sys.exit(f"FASTMMKD_EXT=cpu: {reason}")
        print(f"fastmmkd: no compiled extension ({reason}); operations run their PyTorch reference", file=sys.stderr)
        return {}

    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
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

    module = CppExtension(
        "fastmmkd._C",
        sorted(glob("csrc/*.cpp") + glob("csrc/common/*.cpp") + glob("csrc/cpu/*.cpp")),
        depends=sorted(glob("csrc/**/*.h", recursive=True)),
        include_dirs=[os.path.abspath("csrc")],
        define_macros=[("FASTMMKD_FLAGS", '"{}"'.format(" ".join(FLAGS)))],
        extra_compile_args=FLAGS,
        extra_link_args=["-fopenmp"],
        optional=mode == "auto",
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


setup(
    packages=[*find_packages(include=["fastmmkd", "fastmmkd.*"]), "fastmmkd.kernels"],
    package_dir={"fastmmkd.kernels": "kernels"},
    **extension(),
)
