"""Arrays and text out of HDF5 files that anyone may have made: of the file itself, and no larger than it can hold."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np

from fastmmkd.errors import UserError

DEFLATE_RATIO = 1032
"""What gzip shrinks at most: an array of more bytes for each one that is stored is not there."""
STRINGS = 64
"""Strings of any length that are read at a time: each may be as long as the file."""


@contextmanager
def in_one_line(path: Path) -> Iterator[None]:
    """Turn every way in which an HDF5 file can be wrong into one line that names it.

    Raises:
        UserError: whatever was raised; the path is put before the message of a UserError that does not begin with it.
    """
    try:
        yield
    except UserError as error:
        if str(error).startswith(str(path)):
            raise
        raise UserError(f"{path}: {error}") from error
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{path}: {error.strerror}") from error
        raise _in_one_line(path, error) from error
    except MemoryError as error:
        raise UserError(f"{path}: does not fit into memory") from error
    except Exception as error:  # a damaged file can raise nearly anything
        raise _in_one_line(path, error) from error


def _in_one_line(path: Path, error: Exception) -> UserError:
    said = " ".join(str(error).split())
    if "unable to lock" in said:
        return UserError(f"{path}: another program is writing to it; wait for its end")
    reason = "truncated" if "truncated" in said else f"damaged or no HDF5 ({type(error).__name__}: {said})"
    return UserError(f"{path}: {reason}; copy or make it again")


def member(file: h5py.Group, key: str) -> h5py.Group | h5py.Dataset:
    """What lies under a key of several parts below a file or group, each linked in this file.

    Raises:
        UserError: there is no such thing, or a link leads elsewhere.
    """
    node = file
    for part in key.split("/"):
        link = node.get(part, getlink=True) if isinstance(node, h5py.Group) else None
        if link is None:
            raise UserError(f"there is no {key}")
        if not isinstance(link, h5py.HardLink):
            raise UserError(f"{key} is a link to another place, expected the array itself")
        node = node[part]
    return node


def array(file: h5py.File, key: str, dtypes: tuple[str, ...], shape: tuple[int | str, ...]) -> h5py.Dataset:
    """The data set under a key, not read yet.

    Args:
        dtypes: names of the dtypes that it may have; `"str"` for strings.
        shape: what it must have; a letter stands for any length.

    Raises:
        UserError: what `member` raises; another dtype or shape; its values lie outside the file, or are not all there.
    """
    dataset = member(file, key)
    if not isinstance(dataset, h5py.Dataset):
        raise UserError(f"{key} is a group, expected an array")
    dtype = "str" if h5py.check_string_dtype(dataset.dtype) else str(dataset.dtype)
    has = dataset.shape
    fits = has is not None and len(has) == len(shape)
    if dtype not in dtypes or not fits or any(isinstance(n, int) and n != m for n, m in zip(shape, has, strict=True)):
        wanted = ", ".join(map(str, shape))
        raise UserError(f"{key} is {dtype} {list(has or ())}, expected {' or '.join(dtypes)} [{wanted}]")
    refuse_elsewhere(file, key, dataset)
    return dataset


def refuse_elsewhere(file: h5py.Group, key: str, dataset: h5py.Dataset) -> None:
    """Raises UserError where the values of a data set lie outside its file, or are not all there."""
    if dataset.external or dataset.is_virtual:
        raise UserError(f"{key} lies in another file, expected its values in this one")
    if not dataset.nbytes:
        return
    stored, needed = dataset.id.get_storage_size(), dataset.nbytes
    if dataset.chunks is not None:
        chunks = math.prod(-(-n // c) for n, c in zip(dataset.shape, dataset.chunks, strict=True))
        needed = chunks * math.prod(dataset.chunks) * dataset.dtype.itemsize
        if dataset.id.get_num_chunks() != chunks:
            raise UserError(f"{key} is {list(dataset.shape)}, but only parts of it are stored")
    if stored > file.file.id.get_filesize() or needed > DEFLATE_RATIO * stored:
        raise UserError(f"{key} is {list(dataset.shape)}, {needed} bytes, but {stored} are stored")


def strings(file: h5py.File, key: str) -> list[str]:
    """A vector of strings.

    Raises:
        UserError: what `array` raises; or they are longer, taken together, than the file that holds them as they are.
    """
    dataset = array(file, key, ("str",), ("N",))
    if h5py.check_string_dtype(dataset.dtype).length is not None:
        return dataset.asstr()[()].tolist()
    return [text for block in _blocks_of_strings(file, key, dataset) for text in block.tolist()]


def _blocks_of_strings(file: h5py.Group, key: str, dataset: h5py.Dataset) -> Iterator[np.ndarray]:
    """Strings of any length, some rows at a time.

    Raises:
        UserError: they are longer, taken together, than the file that holds them as they are.
    """
    size = file.file.id.get_filesize()
    for start in range(0, len(dataset), STRINGS):
        block = dataset.asstr()[start : start + STRINGS]
        size -= sum(map(len, block.reshape(-1).tolist()))
        if size < 0:
            raise UserError(f"{key} are longer than the file, one text stands for many")
        yield block


def values(group: h5py.Group, key: str) -> np.ndarray:
    """All of an array of one axis or more, of numbers or text.

    Raises:
        UserError: what `array` raises, but for any dtype and shape; or it holds neither numbers nor text.
    """
    dataset = member(group, key)
    if not isinstance(dataset, h5py.Dataset) or not dataset.shape:
        raise UserError(f"{key} is no array, expected one with an axis of rows")
    refuse_elsewhere(group, key, dataset)
    if dataset.dtype.kind in "iuf" or dataset.dtype.kind == "S":
        return dataset[()]
    if h5py.check_string_dtype(dataset.dtype) is None:
        raise UserError(f"{key} is {dataset.dtype} {list(dataset.shape)}, expected numbers or text")
    return np.concatenate([np.zeros((0, *dataset.shape[1:]), object), *_blocks_of_strings(group, key, dataset)])


def fixed(texts: Sequence[str]) -> np.ndarray:
    """Strings as HDF5 holds them beside each other: those of any length lie in a heap, which has no checksums, and in
    which a damaged byte can send HDF5 round in circles."""
    encoded = [text.encode() for text in texts]
    return np.array(encoded, h5py.string_dtype("utf-8", max(1, *map(len, encoded))))


def set_text(group: h5py.Group, key: str, value: str) -> None:
    """Make an attribute that `text` reads."""
    group.attrs.create(key, fixed([value])[0], dtype=fixed([value]).dtype)


def text(group: h5py.Group, key: str) -> str:
    """An attribute.

    Raises:
        UserError: it is missing, or no text.
    """
    value = group.attrs.get(key)
    if isinstance(value, np.bytes_):
        return value.decode()
    if not isinstance(value, str):
        kind = "missing" if value is None else f"{np.asarray(value).dtype} {list(np.shape(value))}"
        raise UserError(f"attribute {key} of {group.name} is {kind}, expected text")
    value.encode()  # raises where bytes that are no UTF-8 were smuggled in
    return value
