"""The compiled extension `fastmmkd._C`: whether it is here, and if not, why."""

from __future__ import annotations

import os
import shutil
from typing import Any

import torch

from fastmmkd.errors import UserError

COMPILERS = ("c++", "g++", "clang++")


def _load() -> tuple[Any, str]:
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None, "TRITON_INTERPRET=1 has the Triton kernels run on CPU tensors"
    try:
        from fastmmkd import _C  # type: ignore[attr-defined]
    except ModuleNotFoundError:
        compiler = any(shutil.which(name) for name in COMPILERS)
        return None, f"the extension is not built{'' if compiler else ': no C++ compiler'}"
    except ImportError as error:  # unresolved symbols: it was built against another torch
        return None, f"the extension does not load: {str(error).splitlines()[0]}"
    try:
        built = _C.build_info()["torch"]
    except RuntimeError as error:  # FASTMMKD_ISA names what this CPU has not
        raise UserError(str(error)) from None
    if built != torch.__version__.split("+")[0]:
        return None, f"the extension was built for torch {built}, this is torch {torch.__version__}"
    return _C, ""


module, missing = _load()
"""The extension, or None and the reason in words."""


def build_info() -> dict[str, str]:
    """Compiler, flags, torch version, and the instruction sets compiled and used; empty without the extension."""
    return module.build_info() if module else {}


has_cuda = "cuda" in build_info()
"""Whether the extension was built with the kernels of csrc/cuda."""
