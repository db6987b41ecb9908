"""From padded sequences `[N, T, d]` to packed ones `[R, d]`: the real frames of all samples, one after the other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

import numpy as np
from numpy.typing import DTypeLike

from fastmmkd.errors import UserError

BLOCK_BYTES = 32 * 1024 * 1024
"""What is held at a time of arrays that are large, or only on disk."""


class Sliceable(Protocol):
    """An array, or what gives one when it is sliced, such as an HDF5 data set."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> np.dtype: ...
    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


def blocks(shape: tuple[int, ...]) -> Iterator[slice]:
    """Slices of the first axis, at least one entry long, that take about `BLOCK_BYTES` as float64."""
    entries = max(1, BLOCK_BYTES // max(1, 8 * math.prod(shape[1:])))
    for first in range(0, shape[0], entries):
        yield slice(first, min(first + entries, shape[0]))


def real_frames(lengths: np.ndarray, steps: int) -> np.ndarray:
    """`[N, steps]` bool, True in the last `lengths[n]` frames: where left-padded sequences are real."""
    return np.arange(steps)[None, :] >= steps - lengths[:, None]


def pack(x: Sliceable, lengths: np.ndarray, key: str, dtype: DTypeLike, right: np.ndarray | None = None) -> np.ndarray:
    """Padded `[N, T, d]` -> `[R, d]` of `dtype`: the last `lengths[n]` frames of each sample.

    Args:
        lengths: `[N]` int.
        key: names `x` in an error message.
        right: `[N]` bool, the samples of which the first frames are taken instead (see `padded_right`).

    Raises:
        UserError: the shapes do not fit, a length is not in [0, T], or a frame before the real ones is not zero.
    """
    _check_padded(x, lengths, key)
    steps = x.shape[1]
    packed = np.empty((int(lengths.sum()), x.shape[2]), dtype)
    stop = 0
    for samples in blocks(x.shape):
        block, real = x[samples], real_frames(lengths[samples], steps)
        if right is not None:
            real = np.where(right[samples, None], real[:, ::-1], real)
        if (stray := block.any(axis=-1) & ~real).any():
            i, t = np.argwhere(stray)[0] + (samples.start, 0)
            raise UserError(
                f"{key}[{i}, {t}] is not zero, but lies before the last {lengths[i]} frames; expected left padding"
            )
        start, stop = stop, stop + int(real.sum())
        packed[start:stop] = block[real]
    return packed


def padded_right(x: Sliceable, lengths: np.ndarray, key: str) -> np.ndarray:
    """`[N]` bool, the samples of padded `[N, T, d]` whose real frames come first, as far as zeros tell.

    A sample that fits both ways (its first and its last frames are zero) is read as all the others are; where those
    are of both kinds, as padded on the left.

    Raises:
        UserError: the shapes do not fit, or a length is not in [0, T].
    """
    _check_padded(x, lengths, key)
    left, right = np.empty((2, len(lengths)), bool)
    for samples in blocks(x.shape):
        occupied, real = x[samples].any(axis=-1), real_frames(lengths[samples], x.shape[1])
        left[samples] = ~(occupied & ~real).any(axis=1)
        right[samples] = ~(occupied & ~real[:, ::-1]).any(axis=1)
    return np.zeros_like(left) if left.all() else right if right.all() else right & ~left


def _check_padded(x: Sliceable, lengths: np.ndarray, key: str) -> None:
    if len(x.shape) != 3 or x.shape[0] != len(lengths):
        raise UserError(f"{key} is {list(x.shape)}, expected [{len(lengths)}, T, d]")
    steps = x.shape[1]
    if (outside := (lengths < 0) | (lengths > steps)).any():
        i = int(np.argmax(outside))
        raise UserError(f"{key} has {steps} frames, but the length of sample {i} is {lengths[i]}")


def unpack(x: np.ndarray, lengths: np.ndarray, steps: int) -> np.ndarray:
    """`[R, d]` -> `[N, steps, d]` with zeros before each sample's rows; no length may be more than `steps`."""
    padded = np.zeros((len(lengths), steps, x.shape[1]), x.dtype)
    padded[real_frames(lengths, steps)] = x
    return padded
