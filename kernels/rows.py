"""What the losses share: loads, the gradients' memory, and how a group's rows are divided among programs.

The programs of a group take its blocks of BN rows in turn, and each leaves a partial sum of the loss. A group of few
rows has one program, whose sum is the loss, so that the loss is one launch.

Shape legend: G groups, N rows, D features, P programs of a group; BN, BD blocks of rows and features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastmmkd.kernels.launch import launch
from fastmmkd.kernels.parameters import power_of_two

ROWS_OF_ONE_PROGRAM = 64
"""Up to here a group has one program, which saves the second launch; a choice, not a measurement."""


def programs(rows: int, block: int) -> int:
    """P: one where there are few rows, and otherwise one for every block."""
    return 1 if rows <= ROWS_OF_ONE_PROGRAM else triton.cdiv(rows, block)


def gradient_of(x: torch.Tensor, wanted: bool) -> torch.Tensor:
    """Memory for the gradient of x in float32; empty where none is wanted."""
    return x.new_empty(x.shape if wanted else (0,), dtype=torch.float32)


def partial_sums(x: torch.Tensor, programs: int, *width: int) -> torch.Tensor:
    """`[G, P, *width]` in float32, on x's device."""
    return x.new_empty((x.shape[0], programs, *width), dtype=torch.float32)


def add_up(partial: torch.Tensor) -> torch.Tensor:
    """`[G, P]` -> `[G]`, in an order that depends only on P."""
    groups, count = partial.shape
    if count == 1:
        return partial.squeeze(1)
    total = partial.new_empty(groups)
    launch(_add_up, (groups,), partial, total, count, BP=min(power_of_two(count), 1024))
    return total


@triton.jit
def _add_up(partial, total, P, BP: tl.constexpr):
    group = tl.program_id(0).to(tl.int64)
    tl.store(total + group, sum_of(partial + group * P, P, BP))


@triton.jit
def sum_of(partial, P, BP: tl.constexpr):
    """The sum of P numbers."""
    b_total = tl.zeros([BP], tl.float32)
    for first in range(0, P, BP):
        program = first + tl.arange(0, BP)  # [BP]
        b_total += tl.load(partial + program, program < P, 0.0)
    return tl.sum(b_total, 0)


@triton.jit
def load_rows(x, group, row, inside, N, D, BD: tl.constexpr):
    """Rows of x `[G, N, D]` in float32, `[rows, BD]`; 0 where not `inside` and beyond D."""
    column = tl.arange(0, BD)
    at = (group * N + row)[:, None] * D + column
    return tl.load(x + at, inside[:, None] & (column < D), 0.0).to(tl.float32)


@triton.jit
def store_rows(x, b_rows, group, row, inside, N, D, BD: tl.constexpr):
    """Store `b_rows` `[rows, BD]` where `load_rows` would load them."""
    column = tl.arange(0, BD)
    at = (group * N + row)[:, None] * D + column
    tl.store(x + at, b_rows, inside[:, None] & (column < D))
