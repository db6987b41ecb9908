"""Arrays that stay in their file until a part of them is asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastmmkd.errors import UserError


@dataclass(frozen=True)
class BytesInFile:
    """A stretch of a file."""

    path: Path
    offset: int
    size: int


@dataclass(frozen=True)
class ArrayInFile:
    """The bytes of a C-contiguous array in a file; slices of its first axis are read, and `np.asarray` reads it all."""

    content: BytesInFile
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, step = rows.indices(len(self))
        entry = math.prod(self.shape[1:])
        with self.content.path.open("rb") as file:
            file.seek(self.content.offset + start * entry * self.dtype.itemsize)
            values = np.fromfile(file, self.dtype, max(0, stop - start) * entry)
        if len(values) != max(0, stop - start) * entry:
            raise UserError(f"{self.content.path}: became shorter while it was read")
        return values.reshape(max(0, stop - start), *self.shape[1:])[::step]

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)
