"""Pickles from the internet: NumPy arrays in plain containers, and nothing that could run."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fastmmkd.errors import UserError


def _encode(text: str, encoding: str) -> bytes:
    """How Python 2 and protocol 2 spell bytes; only the one codec that they use."""
    if encoding.lower().replace("-", "") != "latin1":
        raise pickle.UnpicklingError(f"refuses _codecs.encode with {encoding!r}")
    return text.encode("latin1")


# The private functions that pickled arrays and scalars name, taken from what NumPy itself would write.
_reconstruct = np.empty(0).__reduce__()[0]
_scalar = np.float64(0).__reduce__()[0]
_frombuffer = np.empty(0).__reduce_ex__(5)[0]

_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): OrderedDict,
}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _reconstruct
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _scalar
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _frombuffer
for _builtins in ("builtins", "__builtin__"):  # Python 3 and 2
    for _cls in (list, tuple, dict, set, frozenset, bytes, bytearray, str, int, float, bool, complex):
        _ALLOWED[_builtins, _cls.__name__] = _cls


class _Refused(Exception):
    """A pickle asked for something outside the list; the argument is its dotted name."""


class _RestrictedUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) not in _ALLOWED:
            raise _Refused(f"{module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused(f"persistent id {pid!r}")


def load(path: Path) -> Any:
    """Unpickle a file that holds NumPy arrays, scalars and dtypes, and plain containers.

    Strings of Python 2 pickles are decoded as Latin-1.

    Raises:
        UserError: no such file, not a (whole) pickle, or it asks for anything else, which is named and not imported.
    """
    if not path.is_file():
        raise UserError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}, expected a pickle (.pkl)")
    try:
        with path.open("rb") as file:
            return _RestrictedUnpickler(file, encoding="latin1").load()
    except _Refused as refused:
        raise UserError(
            f"{path}: refused, the pickle asks for {refused}; only NumPy arrays and plain containers are allowed"
        ) from None
    except MemoryError:
        raise UserError(f"{path}: does not fit into memory") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(f"{path}: not a whole pickle file ({type(error).__name__}: {error})") from error
