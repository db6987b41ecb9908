"""Elementary functions that Triton lacks or has only approximately."""

from __future__ import annotations

import triton
import triton.language as tl  # noqa: F401  # the interpreter wants it in every module of kernels


@triton.jit
def log_ratio(z):
    """`ln((1 + z) / (1 - z))` for |z| <= 1/3; exactly 0 for 0."""
    square = z * z
    p = square * (2.0 / 17) + 2.0 / 15
    p = p * square + 2.0 / 13
    p = p * square + 2.0 / 11
    p = p * square + 2.0 / 9
    p = p * square + 2.0 / 7
    p = p * square + 2.0 / 5
    p = p * square + 2.0 / 3
    return p * (square * z) + (z + z)


@triton.jit
def log_one_plus(x):
    """`ln(1 + x)` for x in [0, 1]."""
    return log_ratio(x / (x + 2.0))
