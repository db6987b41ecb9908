"""The missing draw: a program gathers a block of rows of one sample and modality; see `fastmmkd.ops.missing_draw`.

Everything is decided from the words of `fastmmkd.ops.philox`, bit for bit. Where rows lie, and which samples are
wanted, is read on the device: the grid has room for the longest sample, programs past the end of theirs do nothing, and
a sample that the split does not have is not noticed. Rows of nobody are one more sample of a model, after the others.

Shape legend: S models, V versions, B samples of a batch, N samples of the split, R rows of a model, T rows of a sample,
D features, W modalities of `present`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fastmmkd.errors import UserError
from fastmmkd.kernels.launch import launch
from fastmmkd.kernels.parameters import parameters, power_of_two

CANDIDATES = [
    {"BT": frames, "BE": elements, "num_warps": warps}
    for frames in (16, 32, 64)
    for elements in (512, 1024, 2048)
    for warps in (2, 4, 8)
]
MODALITIES = 3
"""That a launch takes."""


def missing_draw(
    features: Sequence[torch.Tensor],
    frame_masks: Sequence[torch.Tensor],
    starts: Sequence[torch.Tensor],
    present: torch.Tensor,
    sample: torch.Tensor,
    seed: torch.Tensor,
    epoch: torch.Tensor,
    batch_starts: Sequence[torch.Tensor],
    rows: Sequence[int],
    longest: Sequence[int],
    versions: int,
    p_max: float,
    exact: bool,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Features `[S, R, D]` and masks `[S, R]` bool per modality, of which there are at most three."""
    if not 0 < len(features) <= MODALITIES:
        raise UserError(f"missing_draw: {len(features)} modalities; expected 1 to {MODALITIES}")
    sources = [[x.contiguous() for x in of] for of in (features, frame_masks, starts, batch_starts)]
    present, sample, seed = (x.contiguous() for x in (present, sample, seed))
    models, batch = sample.shape
    drawn = [x.new_empty((models, n, x.shape[1])) for x, n in zip(features, rows, strict=True)]
    masks = [mask.new_empty((models, n)) for mask, n in zip(frame_masks, rows, strict=True)]
    widths = [x.shape[1] for x in features]
    most = 32 if exact else 64  # exact, every row of a block is compared with every other
    default = {"BT": min(most, power_of_two(max(longest))), "BE": 1024, "num_warps": 4}
    tuned = parameters("missing_draw", default, sample.device, frames=max(longest), width=max(widths))
    grid = (models * (versions * batch + 1), triton.cdiv(max(longest), tuned["BT"]), len(features))
    of_modalities: list[list[Any]] = [*sources, drawn, masks, list(rows), widths]
    filled = [x for of in of_modalities for x in of + of[-1:] * (MODALITIES - len(of))]  # no program reads those added
    args = (*filled, present, sample, seed, epoch, present.shape[1], versions, batch, p_max)
    launch(_draw, grid, *args, EXACT=exact, BW=power_of_two(present.shape[1]), **tuned)
    return drawn, masks


@triton.jit(do_not_specialize=["R0", "R1", "R2", "W", "V", "B"])
def _draw(
    x0, x1, x2, mask0, mask1, mask2, starts0, starts1, starts2, batch_starts0, batch_starts1, batch_starts2,
    drawn0, drawn1, drawn2, kept0, kept1, kept2, R0, R1, R2, D0, D1, D2,
    present, sample, seed, epoch, W, V, B, p_max,
    EXACT: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    modality, size = tl.program_id(2), V * B
    model, place = tl.program_id(0).to(tl.int64) // (size + 1), tl.program_id(0).to(tl.int64) % (size + 1)
    is_nobody = place == size
    named = tl.load(sample + model * B + place % B, place < size, 0)
    key = tl.load(seed + model)
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    c1, c2, c3 = named.to(tl.uint32), tl.load(epoch).to(tl.uint32), (place // B).to(tl.uint32)

    other = tl.arange(0, BW)  # [BW]
    b_present = tl.load(present + named * W + other, (place < size) & (other < W), 0).to(tl.int32)
    rank = tl.sum(tl.where(other < modality, b_present, 0), 0)
    word0, word1, _, _ = _philox(tl.zeros_like(c1), c1, c2, c3, low, high)
    subsets = (1 << tl.sum(b_present, 0)) - 1
    subset = tl.umulhi(word0, subsets.to(tl.uint32)) + 1  # uniform over 1 .. subsets
    p = _uniform(word1) * p_max
    kept = (tl.sum(tl.where(other == modality, b_present, 0), 0) != 0) & (((subset >> rank.to(tl.uint32)) & 1) != 0)
    first = 1 + (modality.to(tl.uint32) << 24)
    words = (first, c1, c2, c3, low, high)
    at = (model * (size + 1) + place, model, named)
    if modality == 0:
        _gather(x0, mask0, starts0, batch_starts0, drawn0, kept0, R0, D0, at, is_nobody, kept, p, words, EXACT, BT, BE)
    elif modality == 1:
        _gather(x1, mask1, starts1, batch_starts1, drawn1, kept1, R1, D1, at, is_nobody, kept, p, words, EXACT, BT, BE)
    else:
        _gather(x2, mask2, starts2, batch_starts2, drawn2, kept2, R2, D2, at, is_nobody, kept, p, words, EXACT, BT, BE)


@triton.jit
def _gather(
    x, mask, starts, batch_starts, drawn, masks, R, D, at, is_nobody, kept, p, words,
    EXACT: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """A block of rows of sample `at[2]` of the split to `drawn`, and which of them are left to `masks`."""
    begin = tl.load(batch_starts + at[0])
    drawn += (at[1] * R + begin) * D
    masks += at[1] * R + begin
    if is_nobody:
        _clear(drawn, (R - begin) * D, BE)
        _clear(masks, R - begin, BT)
    else:
        T = (tl.load(batch_starts + at[0] + 1) - begin).to(tl.int32)
        stored = tl.load(starts + at[2])
        before = T - (tl.load(starts + at[2] + 1) - stored).to(tl.int32)  # rows before its first frame
        mask += stored - before
        x += (stored - before) * D
        first = tl.program_id(1) * BT
        row = first + tl.arange(0, BT)  # [BT]
        b_mask = tl.load(mask + row, (row >= before) & (row < T), 0) != 0
        b_u = _of_frames(row - before, words)
        if EXACT:
            rank = tl.zeros([BT], tl.int32)  # among the frames that there are, by (uniform, row)
            frames = 0
            for start in range(0, T, BT):
                other = start + tl.arange(0, BT)  # [BT]
                b_there = tl.load(mask + other, (other >= before) & (other < T), 0) != 0
                b_other = _of_frames(other - before, words)
                equal = (b_other[None, :] == b_u[:, None]) & (other[None, :] < row[:, None])
                ahead = b_there[None, :] & ((b_other[None, :] < b_u[:, None]) | equal)  # [BT, BT]
                rank += tl.sum(ahead.to(tl.int32), 1)
                frames += tl.sum(b_there.to(tl.int32), 0)
            wanted = p * frames.to(tl.float32)  # type: ignore[attr-defined]  # no int after the loop
            above = rank.to(tl.float32) + 0.5
            dropped = (wanted > above) | ((wanted == above) & (rank % 2 == 1))  # rank < wanted rounded half to even
        else:
            dropped = b_u < p
        tl.store(masks + row, b_mask & kept & (dropped == 0), row < T)
        tl.debug_barrier()  # what one thread stored others load
        end = tl.minimum(first + BT, T) * D
        for start in range(first * D, end, BE):
            element = start + tl.arange(0, BE)  # [BE]
            b_left = tl.load(masks + element // D, element < end, 0) != 0
            tl.store(drawn + element, tl.load(x + element, (element < end) & b_left, 0.0), element < end)


@triton.jit
def _clear(to, count, BLOCK: tl.constexpr):
    """Zeros, which the programs of the second axis divide among themselves."""
    for first in range(tl.program_id(1) * BLOCK, count, tl.num_programs(1) * BLOCK):
        element = first + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
        tl.store(to + element, tl.zeros([BLOCK], to.dtype.element_ty), element < count)


@triton.jit
def _of_frames(frame, words):
    """The uniforms of frames: each block of four has one counter."""
    first, c1, c2, c3, low, high = words
    word0, word1, word2, word3 = _philox(first + (frame // 4).to(tl.uint32), c1, c2, c3, low, high)
    word = tl.where(frame % 4 < 2, tl.where(frame % 4 == 0, word0, word1), tl.where(frame % 4 == 2, word2, word3))
    return _uniform(word)


@triton.jit
def _uniform(word):
    return (word >> 8).to(tl.float32) * 5.9604644775390625e-08  # 2^-24


@triton.jit
def _philox(c0, c1, c2, c3, low, high):
    """Philox4x32-10: four words of 32 bits, which are meant to overflow."""
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        low0, low1 = (tl.mul(c0, 0xD2511F53, sanitize_overflow=False), tl.mul(c2, 0xCD9E8D57, sanitize_overflow=False))
        c0, c1, c2, c3 = high1 ^ c1 ^ low, low1, high0 ^ c3 ^ high, low0
        low = tl.add(low, 0x9E3779B9, sanitize_overflow=False)
        high = tl.add(high, 0xBB67AE85, sanitize_overflow=False)
    return c0, c1, c2, c3
