"""Packaging that pyproject.toml cannot say: `kernels/` is installed as `fastmmkd.kernels`, `csrc/` as `fastmmkd._C`,
and of `docs/` the papers' tables, as `fastmmkd._docs`.

The extension is compiled where torch and a C++ compiler are at hand (`pip install --no-build-isolation`), with its CUDA
kernels where torch is a CUDA build and the toolkit is there. The sources are installed too, as `fastmmkd._csrc`: where
they could not be compiled at installation, that is done on first use (`fastmmkd.ops.first_use`).
"""

import importlib.util
import sys
from pathlib import Path

from setuptools import find_packages, setup

spec = importlib.util.spec_from_file_location("building", Path(__file__).parent / "fastmmkd" / "building.py")
building = importlib.util.module_from_spec(spec)
spec.loader.exec_module(building)

PACKAGES = {
    "packages": [
        *find_packages(include=["fastmmkd", "fastmmkd.*"]),
        "fastmmkd.kernels",
        "fastmmkd._csrc",
        "fastmmkd._docs",
    ],
    "package_dir": {"fastmmkd.kernels": "kernels", "fastmmkd._csrc": "csrc", "fastmmkd._docs": "docs"},
    "package_data": {
        "fastmmkd.kernels": ["launch_parameters.json"],
        "fastmmkd._docs": ["paper_results.json"],
        "fastmmkd._csrc": [f"**/*{suffix}" for suffix in building.SOURCES],
    },
}


def without(reason: object) -> None:
    """Go on as pure Python, unless `FASTMMKD_EXT` insists on the extension."""
    if building.mode() != "auto":
        sys.exit(f"FASTMMKD_EXT={building.mode()}: {reason}")
    print(f"fastmmkd: the kernels are not compiled now ({reason}); they will be on first use", file=sys.stderr)
    setup(**PACKAGES)


try:
    setup(**PACKAGES, **building.extension(Path("csrc")))
except building.CannotBuild as reason:
    without(reason)
