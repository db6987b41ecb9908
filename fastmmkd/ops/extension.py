"""The compiled extension `fastmmkd._C`: whether it is here, and if not, why."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

import torch

from fastmmkd.errors import UserError
from fastmmkd.ops import first_use


def _load() -> tuple[Any, str]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None, "TRITON_INTERPRET=1 has the Triton kernels run on CPU tensors"
    try:
        return _fitting(_installed())
    except ImportError as error:
        reason = error
    kept = first_use.kept()
    if kept:
        try:
            return _fitting(_read(kept))
        except ImportError as error:
            reason = error
    return None, str(reason).splitlines()[0]


def _installed() -> Any:
    try:
        from fastmmkd import _C  # type: ignore[attr-defined]
    except ModuleNotFoundError:
        raise ImportError("the extension is not compiled yet; a training does it, or `fastmmkd build`") from None
    except ImportError as error:  # unresolved symbols: it was built against another torch
        raise ImportError(f"the extension does not load: {str(error).splitlines()[0]}") from None
    return _C


def _read(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("fastmmkd._C", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _fitting(extension: Any) -> tuple[Any, str]:
    """It, and nothing against it.

    Raises:
        ImportError: it was built for another torch.
        UserError: FASTMMKD_ISA names an instruction set that this CPU has not.
    """
    try:
        built = extension.build_info()["torch"]
    except RuntimeError as error:
        raise UserError(str(error)) from None
    if built != torch.__version__.split("+")[0]:
        raise ImportError(f"the extension was built for torch {built}, this is torch {torch.__version__}")
    return extension, ""


module, missing = _load()
"""The extension, or None and the reason in words."""


def build_info() -> dict[str, str]:
    """Compiler, flags, torch version, and the instruction sets compiled and used; empty without the extension."""
    return module.build_info() if module else {}


has_cuda = "cuda" in build_info()
"""Whether the extension was built with the kernels of csrc/cuda."""


def ensure(again: bool = False) -> None:
    """Compile the extension if it is not here; where that fails, `missing` says why, and operations go on without.

    `FASTMMKD_EXT=none` and an interpreted Triton want none.

    Args:
        again: also where it failed before.
    """
    global module, missing, has_cuda
    if module is not None or os.environ.get("FASTMMKD_EXT") == "none" or os.environ.get("TRITON_INTERPRET") == "1":
        return
    try:
        module, missing = _fitting(_read(first_use.compile_once(again)))
    except (UserError, ImportError) as error:
        missing = str(error)
    has_cuda = "cuda" in build_info()
