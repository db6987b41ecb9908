"""fastmmkd: fast training of multimodal sentiment models that survive missing modalities."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fastmmkd.predictor import Predictor

__version__ = "0.1.0"

_ROOT = Path(__file__).parents[1]
if (_ROOT / "csrc" / "registration.cpp").exists():  # a checkout: fastmmkd.kernels lies beside the package, see setup.py
    __path__.append(str(_ROOT))


def load(run: Path | str, seed: int | None = None, device: str = "cpu") -> Predictor:
    """A trained model, ready to predict: see `fastmmkd.predictor.load`."""
    from fastmmkd.predictor import load

    return load(run, seed, device)
