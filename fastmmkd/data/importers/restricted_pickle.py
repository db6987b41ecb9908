"""Pickles from the internet: NumPy arrays in plain containers, and nothing that could run.

NumPy's own functions are not handed to a pickle: called with arguments of its choice they write to memory that is not
theirs. What a pickle says about an array is taken as data, checked, and the array made from it here. Large arrays stay
in the file: `np.asarray` and slices read them, so that a set of which most is padding need not fit into memory.
"""

from __future__ import annotations

import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np

from fastmmkd.data.importers.array_in_file import ArrayInFile, BytesInFile
from fastmmkd.data.importers.containers import Unfolding, refuse_unfolding
from fastmmkd.errors import UserError

LARGE = 1 << 20
"""Bytes from which on what an array holds is left in the file."""
_DTYPE = re.compile(r"[<>=|]?([biufcSU]\d+|\?|O8?)")


class _Refused(Exception):
    """A pickle asked for something outside the list; the argument is its dotted name."""


def _encode(text: str, encoding: str) -> bytes:
    """How Python 2 and protocol 2 spell bytes; only the one codec that they use."""
    if encoding.lower().replace("-", "") != "latin1":
        raise pickle.UnpicklingError(f"refuses _codecs.encode with {encoding!r}")
    return text.encode("latin1")


def _key(value: Any) -> Any:
    """What a dict or set may have as a key: nothing that takes long to be hashed."""
    flat = value if isinstance(value, tuple) else (value,)
    if not all(entry is None or isinstance(entry, (str, bytes, int, float, complex, np.generic)) for entry in flat):
        raise _Refused(f"a key that is a {type(value).__name__} of containers")
    return value


def _set(entries: Any = ()) -> set[Any]:
    return {_key(entry) for entry in entries}


def _frozenset(entries: Any = ()) -> frozenset[Any]:
    return frozenset(_set(entries))


def _ordered_dict(pairs: Any = ()) -> OrderedDict[Any, Any]:
    return OrderedDict((_key(key), value) for key, value in pairs)


def _bytes(content: bytes | str = b"", encoding: str = "latin1") -> bytes:
    return _encode(content, encoding) if isinstance(content, str) else b"".join([content])


def _bytearray(content: bytes | str = b"", encoding: str = "latin1") -> bytearray:
    return bytearray(_bytes(content, encoding))


def _complex(real: float, imaginary: float) -> complex:
    return complex(float(real), float(imaginary))


class _Dtype:
    """`numpy.dtype(name)` and, as its state, the byte order: of numbers, text and objects."""

    def __init__(self, name: str, align: bool = False, copy: bool = False) -> None:
        if not isinstance(name, str) or not _DTYPE.fullmatch(name):
            raise _Refused(f"an array of {name!r}")
        self.numpy = np.dtype(name)

    def build(self, state: tuple[Any, ...]) -> None:
        self.numpy = self.numpy.newbyteorder(state[1])


class _Array:
    """What `_reconstruct` begins and the state that follows completes."""

    def __init__(self, cls: object, shape: tuple[int, ...], typecode: bytes) -> None:
        self.memo_keys: list[int] = []

    def build(self, state: tuple[Any, ...]) -> np.ndarray | ArrayInFile:
        *_, shape, dtype, fortran, content = state
        return _made(content, dtype, shape, "F" if fortran else "C")


def _made(content: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> np.ndarray | ArrayInFile:
    """The array of these bytes; of a list, where it holds objects.

    Raises:
        ValueError: shape, dtype and content do not fit together.
    """
    count, size = math.prod(shape), dtype.numpy.itemsize
    if min(shape, default=0) < 0:
        raise ValueError(f"an array of shape {shape}")
    if dtype.numpy.kind == "O":
        if not isinstance(content, list) or len(content) != count:
            raise ValueError(f"objects of shape {shape} are not in a list of as many")
        objects = np.empty(count, object)
        objects[:] = content
        return objects.reshape(shape, order="F" if order == "F" else "C")
    if isinstance(content, str):  # bytes of Python 2
        content = content.encode("latin1")
    held = content.size if isinstance(content, BytesInFile) else len(content)
    if held != count * size:
        raise ValueError(f"{held} bytes for {list(shape)} of {dtype.numpy}")
    if not isinstance(content, BytesInFile):
        return np.frombuffer(content, dtype.numpy).reshape(shape, order="F" if order == "F" else "C")
    array = ArrayInFile(content, tuple(shape), dtype.numpy)
    return array if order == "C" else array[:].reshape(shape[::-1]).transpose()


def _frombuffer(
    content: Any, dtype: _Dtype, shape: tuple[int, ...], order: str, axes: tuple[int, ...] | None = None
) -> np.ndarray | ArrayInFile:
    """How protocol 5 writes contiguous arrays; with `axes`, those that became contiguous by a transposition."""
    array = _made(content, dtype, shape, order if axes is None else "C")
    return array if axes is None else np.asarray(array).transpose(axes)


def _scalar(dtype: _Dtype, content: bytes | str) -> Any:
    return np.asarray(_made(content, dtype, (1,), "C"))[0]


_NDARRAY = object()
"""Stands for the class `numpy.ndarray`: an argument of `_reconstruct`, and nothing that can be called."""
_ALLOWED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("collections", "OrderedDict"): _ordered_dict,
}
for _core in ("numpy.core", "numpy._core"):  # NumPy 1 and 2
    _ALLOWED[f"{_core}.multiarray", "_reconstruct"] = _Array
    _ALLOWED[f"{_core}.multiarray", "scalar"] = _scalar
    _ALLOWED[f"{_core}.numeric", "_frombuffer"] = _frombuffer
for _builtins in ("builtins", "__builtin__"):  # Python 3 and 2
    for _make in (_set, _frozenset, _bytes, _bytearray, _complex):  # all that pickles of plain containers call
        _ALLOWED[_builtins, _make.__name__[1:]] = _make


class _Memo(dict[int, Any]):
    """What a pickle may refer to again; an array that is not complete knows its places."""

    def __setitem__(self, key: int, value: Any) -> None:
        if isinstance(value, _Array):
            value.memo_keys.append(key)
        super().__setitem__(key, value)


class _RestrictedUnpickler(pickle._Unpickler):
    """The one of the standard library that is written in Python, since its opcodes can be replaced."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    append: Callable[[Any], None]
    read: Callable[[int], bytes]
    _unframer: Any

    def __init__(self, path: Path, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")
        self.path, self.file, self.size = path, file, path.stat().st_size
        self.memo = _Memo()

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        if (module, name) not in _ALLOWED:
            raise _Refused(f"{module}.{name}")
        return _ALLOWED[module, name]

    def persistent_load(self, pid: Any) -> Any:
        raise _Refused(f"persistent id {pid!r}")

    def load_build(self) -> None:
        state, unfinished = self.stack.pop(), self.stack[-1]
        if isinstance(unfinished, _Array):
            self.stack[-1] = unfinished.build(state)
            for key in unfinished.memo_keys:
                self.memo[key] = self.stack[-1]
        elif isinstance(unfinished, _Dtype):
            unfinished.build(state)
        else:
            raise _Refused(f"a state of {type(unfinished).__name__}")

    def load_setitem(self) -> None:
        _key(self.stack[-2])
        super().load_setitem()  # type: ignore[misc]

    def load_setitems(self) -> None:
        for key in self.stack[::2]:
            _key(key)
        super().load_setitems()  # type: ignore[misc]

    def load_dict(self) -> None:
        for key in self.stack[::2]:
            _key(key)
        super().load_dict()  # type: ignore[misc]

    def load_additems(self) -> None:
        for entry in self.stack:
            _key(entry)
        super().load_additems()  # type: ignore[misc]

    def load_frozenset(self) -> None:
        for entry in self.stack:
            _key(entry)
        super().load_frozenset()  # type: ignore[misc]

    def _bytes(self, length_bytes: int) -> bytes | BytesInFile:
        size = int.from_bytes(self.read(length_bytes), "little")
        # Frames are read whole, and large bytes lie outside of them.
        if size < LARGE or self._unframer.current_frame is not None:
            return self.read(size)
        offset = self.file.tell()
        if size > self.size - offset:
            raise EOFError(f"{size} bytes at {offset} of {self.size}")
        self.file.seek(offset + size)
        return BytesInFile(self.path, offset, size)

    def load_binbytes(self) -> None:
        self.append(self._bytes(4))

    def load_binbytes8(self) -> None:
        self.append(self._bytes(8))

    def load_bytearray8(self) -> None:
        content = self._bytes(8)
        self.append(bytearray(content) if isinstance(content, bytes) else content)

    def load_binstring(self) -> None:
        content = self._bytes(4)
        self.append(content.decode("latin1") if isinstance(content, bytes) else content)

    for _opcode, _load in {
        pickle.BUILD: load_build,
        pickle.SETITEM: load_setitem,
        pickle.SETITEMS: load_setitems,
        pickle.DICT: load_dict,
        pickle.ADDITEMS: load_additems,
        pickle.FROZENSET: load_frozenset,
        pickle.BINBYTES: load_binbytes,
        pickle.BINBYTES8: load_binbytes8,
        pickle.BYTEARRAY8: load_bytearray8,
        pickle.BINSTRING: load_binstring,
    }.items():
        dispatch[_opcode[0]] = _load


def load(path: Path) -> Any:
    """Unpickle a file that holds NumPy arrays, scalars and dtypes, and plain containers.

    Strings of Python 2 pickles are decoded as Latin-1. Arrays of `LARGE` bytes and more are `ArrayInFile`, where they
    lie in the file as they are (not if Python 3 wrote it with protocol 2 or less), and bytes are `BytesInFile`.

    Raises:
        UserError: no such file, another kind of file, not a (whole) pickle, it asks for anything else, which is named
            and not imported, or its containers hold each other too deep, too often or in circles.
    """
    if not path.is_file():
        raise UserError(f"{path}: {_not_a_file(path)}, expected a pickle (.pkl)")
    with path.open("rb") as file:
        start = file.read(64)
    if not start:
        raise UserError(f"{path}: is empty, expected a pickle (.pkl)")
    if kind := next((kind for magic, kind in _MAGIC.items() if start.startswith(magic)), None):
        raise UserError(f"{path}: {kind}, expected a pickle (.pkl)")
    try:
        with path.open("rb") as file:
            content = _RestrictedUnpickler(path, file).load()
        refuse_unfolding(content, path.stat().st_size)
        return content
    except _Refused as refused:
        if "\r" in str(refused):
            raise UserError(
                f"{path}: its line ends were changed in a transfer as text; fetch it again, in binary"
            ) from None
        raise UserError(
            f"{path}: refused, the pickle asks for {' '.join(str(refused).split())}; only NumPy arrays and plain "
            "containers are allowed"
        ) from None
    except Unfolding as error:
        raise UserError(f"{path}: refused, {error}") from None
    except MemoryError:
        raise UserError(f"{path}: does not fit into memory") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise UserError(
            f"{path}: not a whole pickle file ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from error


_MAGIC = {
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"BZh": "compressed by bzip2; unpack it first",
    b"\xfd7zXZ": "compressed by xz; unpack it first",
    b"PK\x03\x04": "a zip archive, such as NumPy's .npz and torch.save write; what it holds is not read",
    b"\x93NUMPY": "an array of NumPy's (.npy)",
    b"\x89HDF": "an HDF5 file",
    b"version https://git-lfs": "a pointer of Git LFS; fetch the file itself (git lfs pull)",
    b"<": "a page of HTML or XML; was the download refused?",
    b"{": "JSON or text",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.": "written by torch.save; what it holds is not read",
}
"""What other files begin with."""


def _not_a_file(path: Path) -> str:
    return "is a folder" if path.is_dir() else "not a file" if path.exists() else "no such file"
