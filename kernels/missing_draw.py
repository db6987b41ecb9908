"""The missing draw: a program gathers a block of frames of one row and modality; see `fastmmkd.ops.missing_draw`.

Everything is decided from the words of `fastmmkd.ops.philox`, bit for bit. Rows are read on the device: one that the
split does not have is not noticed.

Shape legend: S seeds, V versions, B rows of a batch, N rows of the split, T frames, D features, W modalities of
`present`.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    present: torch.Tensor,
    sample: torch.Tensor,
    seed: torch.Tensor,
    epoch: torch.Tensor,
    versions: int,
    p_max: float,
    exact: bool,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Features `[S, V * B, T, D]` and masks `[S, V * B, T]` bool per modality, of which there are at most three."""
    if not 0 < len(features) <= MODALITIES:
        raise UserError(f"missing_draw: {len(features)} modalities; expected 1 to {MODALITIES}")
    sources = [x.contiguous() for x in features], [mask.contiguous() for mask in frame_masks]
    present, sample, seed = (x.contiguous() for x in (present, sample, seed))
    seeds, batch = sample.shape
    drawn, masks = ([x.new_empty((seeds, versions * batch, *x.shape[1:])) for x in of] for of in sources)
    frames, widths = ([x.shape[axis] for x in sources[0]] for axis in (1, 2))
    default = {"BT": min(64, power_of_two(max(frames))), "BE": 1024, "num_warps": 4}
    tuned = parameters("missing_draw", default, sample.device, frames=max(frames), width=max(widths))
    grid = (seeds * versions * batch, triton.cdiv(max(frames), tuned["BT"]), len(features))
    of_modalities = [x for of in (*sources, drawn, masks, frames, widths) for x in _filled(of)]
    args = (*of_modalities, present, sample, seed, epoch, *present.shape, versions, batch, p_max)
    launch(_draw, grid, *args, EXACT=exact, BW=power_of_two(present.shape[1]), **tuned)
    return drawn, masks


def _filled(of_modalities: list) -> list:
    """One for each modality that a launch takes; no program reads the ones added."""
    return of_modalities + of_modalities[-1:] * (MODALITIES - len(of_modalities))


@triton.jit(do_not_specialize=["T0", "T1", "T2", "N", "W", "V", "B"])
def _draw(
    x0, x1, x2, mask0, mask1, mask2, drawn0, drawn1, drawn2, kept0, kept1, kept2, T0, T1, T2, D0, D1, D2,
    present, sample, seed, epoch, N, W, V, B, p_max,
    EXACT: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    row, modality = tl.program_id(0).to(tl.int64), tl.program_id(2)
    named = tl.load(sample + row // (V * B) * B + row % B)
    key = tl.load(seed + row // (V * B))
    low, high = key.to(tl.uint32), (key >> 32).to(tl.uint32)
    c1, c2, c3 = named.to(tl.uint32), tl.load(epoch).to(tl.uint32), (row // B % V).to(tl.uint32)
    source = tl.where(named < 0, named + N, named)

    other = tl.arange(0, BW)  # [BW]
    b_present = tl.load(present + source * W + other, other < W, 0).to(tl.int32)
    rank = tl.sum(tl.where(other < modality, b_present, 0), 0)
    word0, word1, _, _ = _philox(tl.zeros_like(c1), c1, c2, c3, low, high)
    subsets = (1 << tl.sum(b_present, 0)) - 1
    subset = tl.umulhi(word0, subsets.to(tl.uint32)) + 1  # uniform over 1 .. subsets
    p = _uniform(word1) * p_max
    kept = (tl.sum(tl.where(other == modality, b_present, 0), 0) != 0) & (((subset >> rank.to(tl.uint32)) & 1) != 0)
    first = 1 + (modality.to(tl.uint32) << 24)
    if modality == 0:
        _gather(x0, mask0, drawn0, kept0, T0, D0, row, source, kept, p, first, c1, c2, c3, low, high, EXACT, BT, BE)
    elif modality == 1:
        _gather(x1, mask1, drawn1, kept1, T1, D1, row, source, kept, p, first, c1, c2, c3, low, high, EXACT, BT, BE)
    else:
        _gather(x2, mask2, drawn2, kept2, T2, D2, row, source, kept, p, first, c1, c2, c3, low, high, EXACT, BT, BE)


@triton.jit
def _gather(
    x, mask, drawn, masks, T, D, row, source, kept, p, first, c1, c2, c3, low, high,
    EXACT: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """A block of frames of row `source` to row `row` of `drawn`, and which of them are left to `masks`."""
    frame = tl.program_id(1) * BT + tl.arange(0, BT)  # [BT]
    b_mask = tl.load(mask + source * T + frame, frame < T, 0) != 0
    b_u = _of_frames(frame, first, c1, c2, c3, low, high)
    if EXACT:
        rank = tl.zeros([BT], tl.int32)  # among the frames that there are, by (uniform, frame)
        frames = 0
        for start in range(0, T, BT):
            other = start + tl.arange(0, BT)  # [BT]
            b_there = tl.load(mask + source * T + other, other < T, 0) != 0
            b_other = _of_frames(other, first, c1, c2, c3, low, high)
            equal = (b_other[None, :] == b_u[:, None]) & (other[None, :] < frame[:, None])
            before = b_there[None, :] & ((b_other[None, :] < b_u[:, None]) | equal)  # [BT, BT]
            rank += tl.sum(before.to(tl.int32), 1)
            frames += tl.sum(b_there.to(tl.int32), 0)
        wanted = p * frames.to(tl.float32)  # type: ignore[attr-defined]  # no int after the loop
        above = rank.to(tl.float32) + 0.5
        dropped = (wanted > above) | ((wanted == above) & (rank % 2 == 1))  # rank < wanted rounded half to even
    else:
        dropped = b_u < p
    tl.store(masks + row * T + frame, b_mask & kept & (dropped == 0), frame < T)
    tl.debug_barrier()  # what one thread stored others load
    begin = tl.program_id(1) * BT
    for start in range(begin * D, tl.minimum(begin + BT, T) * D, BE):
        at = start + tl.arange(0, BE)  # [BE]
        inside = at < tl.minimum(begin + BT, T) * D
        b_left = tl.load(masks + row * T + at // D, inside, 0) != 0
        tl.store(drawn + row * T * D + at, tl.load(x + source * T * D + at, inside & b_left, 0.0), inside)


@triton.jit
def _of_frames(frame, first, c1, c2, c3, low, high):
    """The uniforms of frames: each block of four has one counter."""
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
