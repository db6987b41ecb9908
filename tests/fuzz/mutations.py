"""Files that are nearly right: JSON, pickles and HDF5 with a wrong part somewhere, and anything with wrong bytes."""

from __future__ import annotations

import copy
import io
import json
import pickle
import random
from collections.abc import Callable
from typing import Any

import h5py
import numpy as np

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, -(2**63), 10**40, 1e30, -0.0, float("nan"), float("inf"), 1e-320),
    *("", "x", "\0", "ü\ud800", "a" * 5000, "../../x", [], [[]], [None], {}, {"x": {}}, [1] * 1000),
)
"""What stands in place of something else."""
ODD_ARRAYS: tuple[Callable[[], np.ndarray], ...] = (
    lambda: np.zeros(0, np.float32),
    lambda: np.zeros((0, 5, 3), np.float32),
    lambda: np.zeros((3, 0, 3), np.float32),
    lambda: np.full((2, 3), np.nan),
    lambda: np.full((2, 3, 4), np.inf, np.float32),
    lambda: np.array(7),
    lambda: np.zeros((2, 2), np.int8),
    lambda: np.zeros(3, bool),
    lambda: np.zeros(3, np.complex64),
    lambda: np.array([b"text", b""]),
    lambda: np.full((12, 3), 2**62),
    lambda: -np.ones((12, 3), np.int32),
)


def mutated(name: str, content: bytes, drawn: random.Random) -> bytes:
    """The content of a file of that name with something wrong in it, most of the time."""
    kinds = {".json": json_part, ".pkl": pickled_part, ".h5": stored_part, ".csd": stored_part, ".jsonl": json_line}
    kind = kinds.get("." + name.rpartition(".")[2])
    return kind(content, drawn) if kind and drawn.random() < 0.7 else wrong_bytes(content, drawn)


def wrong_bytes(content: bytes, drawn: random.Random) -> bytes:
    """Flipped, cut, doubled, zeroed."""
    data = bytearray(content)
    for _ in range(drawn.choice((1, 1, 2, 8))):
        at, length = drawn.randrange(len(data) + 1), drawn.choice((1, 4, 64, 4096))
        match drawn.randrange(6):
            case 0 if at < len(data):
                data[at] ^= 1 << drawn.randrange(8)
            case 1:
                del data[at:]
            case 2:
                del data[at : at + length]
            case 3:
                data[at:at] = data[at : at + length]
            case 4:
                data[at : at + length] = bytes(len(data[at : at + length]))
            case _:
                data[at : at + length] = drawn.randbytes(len(data[at : at + length]))
    return bytes(data)


def json_part(content: bytes, drawn: random.Random) -> bytes:
    value = json.loads(content)
    if drawn.random() < 0.05:
        return b"[" * 100_000 + b"]" * 100_000
    return json.dumps(with_odd_part(value, drawn)).encode("utf-8", "surrogatepass")


def json_line(content: bytes, drawn: random.Random) -> bytes:
    lines = content.splitlines()
    if lines:
        at = drawn.randrange(len(lines))
        lines[at] = json_part(lines[at], drawn)
    return b"\n".join(lines) + b"\n"


def pickled_part(content: bytes, drawn: random.Random) -> bytes:
    return pickle.dumps(with_odd_part(pickle.loads(content), drawn, with_arrays=True), protocol=drawn.choice((2, 4, 5)))


def with_odd_part(value: Any, drawn: random.Random, with_arrays: bool = False) -> Any:
    """A copy in which one part, however deep, is another one, gone, doubled or renamed."""
    value = copy.deepcopy(value)
    places = list(_places(value))
    if not places:
        return drawn.choice(ODD)
    container, key = drawn.choice(places)
    match drawn.randrange(5):
        case 0 if isinstance(container, dict):
            container[drawn.choice(("x", "", "train", 7))] = container.pop(key)
        case 1:
            del container[key]
        case 2 if isinstance(container, list):
            container.insert(key, container[key])
        case 3 if isinstance(container[key], np.ndarray):
            container[key] = _odd_array(container[key], drawn)
        case _:
            arrays = with_arrays and drawn.random() < 0.2
            container[key] = drawn.choice(ODD_ARRAYS)() if arrays else copy.deepcopy(drawn.choice(ODD))
    return value


def _places(value: Any) -> Any:
    """(container, key) of every part."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in list(keys):
        yield value, key
        yield from _places(value[key])


def _odd_array(array: np.ndarray, drawn: random.Random) -> np.ndarray:
    array = array.copy()
    match drawn.randrange(6):
        case 0 if array.size and array.dtype.kind == "f":
            array.flat[drawn.randrange(array.size)] = drawn.choice((np.nan, np.inf, -np.inf, 1e38, 100.0))
        case 1:
            array = array[: len(array) // 2] if array.ndim else array
        case 2 if array.dtype.kind in "fiub":
            array = array.astype(drawn.choice((np.float16, np.int32, np.complex64)), copy=False)
        case 3:
            array = array[..., None]
        case 4 if array.ndim:
            array = np.concatenate([array, array])
        case _:
            return drawn.choice(ODD_ARRAYS)()
    return array


def stored_part(content: bytes, drawn: random.Random) -> bytes:
    """HDF5 with a data set or an attribute that is another one, gone, or declared to be huge; or with a link."""
    file_of = io.BytesIO(content)
    with h5py.File(file_of, "r+") as file:
        names: list[str] = []
        file.visit(names.append)
        if not names:
            return wrong_bytes(content, drawn)
        name = drawn.choice(names)
        part = file[name]
        match drawn.randrange(7):
            case 0 if part.attrs or file.attrs:
                attributes = part.attrs if part.attrs else file.attrs
                attributes[drawn.choice(list(attributes))] = drawn.choice((0, -1, "x", np.zeros(3), b"\xff", np.nan))
            case 1:
                del file[name]
            case 2 if isinstance(part, h5py.Dataset) and part.dtype.kind in "fiub":
                array = _odd_array(part[()] if part.shape else np.array(part[()]), drawn)
                del file[name]
                file[name] = array
            case 3:
                del file[name]
                file[name] = drawn.choice(
                    (h5py.SoftLink("/"), h5py.SoftLink(name), h5py.ExternalLink("/etc/passwd", "/"))
                )
            case 4:
                del file[name]
                file.create_dataset(name, (2**40, 3), "f4", chunks=(1024, 3))
            case 5:
                del file[name]
                file.create_group(name)
            case _:
                del file[name]
                file[name] = drawn.choice(ODD_ARRAYS)()
    return file_of.getvalue()
