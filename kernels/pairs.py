"""Tiles of pairs: what the losses over all pairs of rows share.

A tile `[BE, BM, BN, LANES]` has M other rows by N rows by D features, which are split in two: feature `e * LANES + l`.
Triton gives the last axes to threads, so that a sum over features is short and one over other rows stays in a thread.

Shape legend: G groups, N rows, M other rows, D features; BN, BM blocks of rows; BE = D / LANES rounded up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from fastmmkd.kernels.parameters import Parameters, parameters, power_of_two
from fastmmkd.ops.providers import INTERPRETED

LANES = tl.constexpr(8)

MAX_ROWS, MAX_OTHERS, TILE = (64, 128, 1024) if INTERPRETED else (16, 2, 32)
"""The largest BN and BM, and of a tile's elements `BE * BM` that a thread has in registers.

Interpreted, an operation takes as long whatever the size of its tile.
"""


PAIR_CANDIDATES = [
    {"BN": rows, "BM": others, "num_warps": warps}
    for rows in (8, 16, 32)
    for others in (1, 2, 4)
    for warps in (2, 4, 8)
]
"""For the `CANDIDATES` of a module whose kernel takes `pair_parameters`."""


def pair_parameters(kernel: str, x: torch.Tensor, rows: int, others: int) -> Parameters:
    """BN, BM, BE and num_warps of a kernel over tiles of pairs; x is `[G, N, D]`."""
    width = x.shape[-1]
    features = power_of_two(triton.cdiv(width, LANES.value))
    block = min(power_of_two(rows), MAX_ROWS)
    other_block = min(power_of_two(others), MAX_OTHERS, max(1, TILE // features))
    default = {"BN": block, "BM": other_block, "num_warps": max(1, block * LANES.value // 32)}
    return {"BE": features, **parameters(kernel, default, x.device, rows=rows, others=others, width=width)}


@triton.jit
def load_split(x, group, row, inside, N, D, BE: tl.constexpr):
    """Rows of x `[G, N, D]` in float32, `[BE, rows, LANES]`; 0 where not `inside` and beyond D."""
    column = (tl.arange(0, BE) * LANES)[:, None, None] + tl.arange(0, LANES)
    at = (group * N + row)[:, None] * D + column
    return tl.load(x + at, inside[:, None] & (column < D), 0.0).to(tl.float32)


@triton.jit
def store_split(x, b_rows, group, row, inside, N, D, BE: tl.constexpr):
    """Store `b_rows` `[BE, rows, LANES]` where `load_split` would load them."""
    column = (tl.arange(0, BE) * LANES)[:, None, None] + tl.arange(0, LANES)
    at = (group * N + row)[:, None] * D + column
    tl.store(x + at, b_rows, inside[:, None] & (column < D))


@triton.jit
def sum_features(b_tile):
    """`[BE, BM, BN, LANES]` -> `[BM, BN]`."""
    return tl.sum(tl.sum(b_tile, 0), 2)


@triton.jit
def sum_others(b_weights, b_tile):
    """The sum over the other rows of weights `[BM, BN]` times a tile: `[BE, BN, LANES]`."""
    return tl.sum(b_weights[None, :, :, None] * b_tile, 1)
