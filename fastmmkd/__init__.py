"""fastmmkd: fast training of multimodal sentiment models that survive missing modalities."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastmmkd.predictor import Predictor

__version__ = "0.1.0"


class _BesideThePackage:
    """Finds `fastmmkd.kernels` in a checkout, where kernels/ lies beside this package, not in it (see setup.py)."""

    folder = Path(__file__).parents[1] / "kernels"

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != "fastmmkd.kernels":
            return None
        return spec_from_file_location(name, cls.folder / "__init__.py", submodule_search_locations=[str(cls.folder)])


if _BesideThePackage.folder.exists() and not (Path(__file__).parent / "kernels").exists():
    sys.meta_path.insert(0, _BesideThePackage)  # before the finder of an editable install of another checkout


def load(run: Path | str, seed: int | None = None, device: str = "cpu") -> Predictor:
    """A trained model, ready to predict: see `fastmmkd.predictor.load`."""
    from fastmmkd.predictor import load

    return load(run, seed, device)
