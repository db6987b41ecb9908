"""What the losses share: loads, the gradients' memory, and how a group's work is divided among programs.

A program goes through blocks of BN rows, and for each through blocks of BM other rows: its steps. The programs of a
group take the blocks of rows in turn and, where that makes too few of them, the blocks of other rows, too; then each
leaves a partial sum of the loss and of the gradients, and a second launch adds them up.

Shape legend: G groups, N rows, D features, P programs of a group; BN, BD blocks of rows and features.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastmmkd.kernels.launch import launch
from fastmmkd.kernels.parameters import power_of_two
from fastmmkd.ops.providers import INTERPRETED

STEPS = 1 if INTERPRETED else 8
"""Of a program, where it has enough company. A step of two other rows by 16 rows by 128 features is some 600
instructions of each of four warps, about 1,000 clocks or 0.6 us: eight steps take twice what the second launch costs.

Interpreted, blocks are large, and tests want them divided.
"""
PROGRAMS = 128
"""Beyond as many, about the multiprocessors of a large GPU, other rows are not divided."""
TILE_PROGRAMS, TILE_WIDTH = 64, 32
"""What a program adds up at once: 16 numbers a thread."""


def divide(groups: int, rows: int, block: int, others: int = 1, other_block: int = 1) -> tuple[int, int]:
    """Among how many programs of a group the blocks of rows are divided, and among how many the other rows.

    One and one, which saves the second launch, where a single program has few steps.
    """
    blocks, steps = triton.cdiv(rows, block), triton.cdiv(others, other_block)
    if blocks * steps <= STEPS:
        return 1, 1
    return blocks, max(1, min(triton.cdiv(steps, STEPS), PROGRAMS // max(groups * blocks, 1)))


def gradient_of(x: torch.Tensor, wanted: bool) -> torch.Tensor:
    """Memory for the gradient of x in float32; empty where none is wanted."""
    return x.new_empty(x.shape if wanted else (0,), dtype=torch.float32)


def partial_sums(total: torch.Tensor, count: int) -> torch.Tensor:
    """Memory for what adds up to a total `[G, ...]`: `[G, count, ...]` in float32; the total itself if count is 1."""
    if count == 1 or not total.numel():
        return total
    return total.new_empty((total.shape[0], count, *total.shape[1:]), dtype=torch.float32)


def add_up(*sums: tuple[torch.Tensor, torch.Tensor]) -> None:
    """Write the sums of `[G, P, ...]` over P into `[G, ...]`, one launch for all, in an order that depends only on P.

    A pair whose members are the same is left alone.
    """
    wanted = [(partial, total) for partial, total in sums if partial is not total]
    if not wanted:
        return
    groups = wanted[0][1].shape[0]
    partials, totals = zip(*wanted, strict=True)
    counts = tuple(partial.shape[1] for partial in partials)
    widths = tuple(total[:1].numel() for total in totals)
    blocks = {"BP": min(power_of_two(max(counts)), TILE_PROGRAMS), "BW": min(power_of_two(max(widths)), TILE_WIDTH)}
    grid = (triton.cdiv(max(widths), blocks["BW"]), groups, len(wanted))
    launch(_add_up, grid, partials, totals, counts, widths, **blocks)


@triton.jit
def _add_up(partials, totals, counts, widths, BP: tl.constexpr, BW: tl.constexpr):
    for i in tl.static_range(len(partials)):
        if tl.program_id(2) == i:
            _add_one_up(partials[i], totals[i], counts[i], widths[i], BP, BW)


@triton.jit
def _add_one_up(partial, total, P, W, BP: tl.constexpr, BW: tl.constexpr):
    group = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BW + tl.arange(0, BW)  # [BW]
    b_total = tl.zeros([BW], tl.float32)
    for first in range(0, P, BP):
        program = first + tl.arange(0, BP)  # [BP]
        at = (group * P + program)[:, None] * W + column
        b_total += tl.sum(tl.load(partial + at, (program < P)[:, None] & (column < W), 0.0), 0)
    tl.store(total + group * W + column, b_total.to(total.dtype.element_ty), column < W)


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
