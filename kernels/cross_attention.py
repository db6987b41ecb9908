"""Masked attention over keys spliced from segments, without a score matrix; see `fastmmkd.ops.cross_attention`.

A program owns a block of a sample's queries in one head and walks over blocks of its keys; backward, other programs of
the same launch own a block of keys and walk over the queries. Blocks of keys that are all masked cost one load of the
mask.

A tile of scores is made by `tl.dot` (`TILE`, the dtype of its operands) or, `TILE` being None, by FMAs feature by
feature. Clocks of a multiprocessor of compute capability 8.0 for 32 scores, forward, by its rates (in a clock 16 exp2,
128 FMA, 1024 FMA of half-precision tensor cores, 32 words from shared memory), for heads of 5 features:

    exp2                                              2    either way
    half-precision dot, 5 features filled up to 16    1    0.5 a product; heads of 15 cost the same
    FMA by feature: 2 * 5 a score                     2.5  and 10 for the operands; 5 with 2 queries a thread
    float32 dot, 5 features filled up to 16           8    and about 20 for the operands

So half precision fills up: exp2 stays the bound. float32 must not round to the tensor cores' formats, and Triton has
none below 8.0: FMAs by feature up to 8 features, and a dot beyond, where little is filled up and operands serve more
FMAs. Several heads in one dot, block by block, would multiply as many zeros as the filling up.

Shape legend: G groups, S models of them, B samples, R rows, T queries and K keys of all segments of a sample, H heads,
E features of a head, d = H E; O rows that a program owns, W rows that it walks over at a time. A tile is `[O, W]` for a
dot. For FMAs it is `[W, O]`: the lanes of the one warp lie along O, so that sums over W stay within a thread.

Where a sample's rows lie is read on the device: the grid has room for the longest sample, and programs past the end of
theirs do nothing. Rows of nobody are sample B, which comes after the others: its programs write zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from fastmmkd.kernels.launch import launch, tensor_cores
from fastmmkd.kernels.parameters import parameters

LOG2_E, LN_2 = tl.constexpr(1.4426950408889634), tl.constexpr(0.6931471805599453)
MOST_BY_FEATURE = 8
"""Features of a head up to which FMAs by feature are cheaper than a dot without tensor cores."""
CANDIDATES = [
    {"BO": own, "BW": walked, "num_warps": warps, "num_stages": stages}
    for own, warps in ((16, 1), (16, 2), (32, 1), (32, 2), (32, 4), (64, 2), (64, 4))
    for walked, stages in ((32, 1), (64, 1), (32, 3))
]
HALF = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

View = tuple[torch.Tensor, int, int, int]
"""A tensor `[X, R, ...]` as the kernels take it: with how many groups share one of X, and its strides over X and R."""


def cross_attention(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor],
    starts: torch.Tensor,
    key_starts: Sequence[torch.Tensor],
    longest: Sequence[int],
    heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """out `[G, R, d]`, contiguous; statistics `[G, H, 2, R]` in float32.

    The statistics of a query are its largest score, in units of ln 2, and 1 / the sum of its softmax: both 0 if it has
    no key, or is nobody's.
    """
    groups, rows, _ = query.shape
    out = query.new_empty(query.shape)
    statistics = query.new_empty((groups, heads, 2, rows), dtype=torch.float32)
    views = _views(groups, query, keys, values, key_masks, starts, key_starts)
    queries, *lengths = longest
    options = _options("cross_attention", query, queries, sum(lengths), heads)
    batch = starts.shape[1] - 1
    grid = (groups * (batch + 1) * heads, triton.cdiv(queries, options["BO"]))
    launch(_forward, grid, *views, _view(out, groups), statistics, rows, batch, **options)
    return out, statistics


def cross_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    key_masks: Sequence[torch.Tensor],
    starts: torch.Tensor,
    key_starts: Sequence[torch.Tensor],
    longest: Sequence[int],
    out: torch.Tensor,
    statistics: torch.Tensor,
    heads: int,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
    """The gradients of query, keys and values, contiguous; 0 for masked keys, queries without a key, nobody's rows."""
    groups, rows, _ = query.shape
    grad_query = query.new_empty(query.shape)
    grad_keys, grad_values = ([x.new_empty(x.shape) for x in xs] for xs in (keys, values))
    views = _views(groups, query, keys, values, key_masks, starts, key_starts)
    saved = (_view(out, groups), statistics.contiguous(), _view(grad.to(query.dtype), groups))
    results = (_view(grad_query, groups), *(_tuple(xs, groups) for xs in (grad_keys, grad_values)))
    queries, *lengths = longest
    options = _options("cross_attention_backward", query, queries, sum(lengths), heads)
    batch = starts.shape[1] - 1
    blocks = triton.cdiv(queries, options["BO"]) + triton.cdiv(sum(lengths), options["BO"])
    key_rows = tuple(x.shape[1] for x in keys)
    args = (*views, *saved, *results, key_rows, rows, queries, batch)
    launch(_backward, (groups * (batch + 1) * heads, blocks), *args, **options)
    return grad_query, grad_keys, grad_values


def _view(x: torch.Tensor, groups: int) -> View:
    if x.dim() == 3 and x.stride(2) != 1:
        x = x.contiguous()
    return x, groups // max(len(x), 1), x.stride(0), x.stride(1)


def _tuple(xs: Sequence[torch.Tensor], groups: int) -> tuple[View, ...]:
    return tuple(_view(x, groups) for x in xs)


def _views(groups: int, query: torch.Tensor, *others: Any) -> tuple[Any, ...]:
    """Of the query, and of keys, values, masks, starts of queries and starts of keys."""
    return _view(query, groups), *(
        _view(x, groups) if isinstance(x, torch.Tensor) else _tuple(x, groups) for x in others
    )


def _options(kernel: str, query: torch.Tensor, queries: int, keys: int, heads: int) -> dict[str, Any]:
    """The compile-time constants of a kernel, and num_warps."""
    features = query.shape[2] // heads
    if query.dtype != torch.float32 and tensor_cores(query.device):  # a warp for every 16 rows
        tile = HALF[query.dtype]
        default = {"BO": 64, "BW": 32, "num_warps": 4} if queries > 32 else {"BO": 32, "BW": 32, "num_warps": 2}
    elif features > MOST_BY_FEATURE:
        tile = tl.float32
        default = {"BO": 32 if kernel == "cross_attention" else 16, "BW": 32, "num_warps": 4}
    else:  # one warp, a thread of which has a row or two to itself, or half of one
        tile = None
        forward = {"BO": 64, "BW": 16, "num_warps": 1} if queries > 64 else {"BO": 32, "BW": 32, "num_warps": 1}
        default = forward if kernel == "cross_attention" else {"BO": 16, "BW": 32, "num_warps": 1}
    default["num_stages"] = 1  # walks are short, and what they walk over is in the cache
    sizes = {"T": queries, "K": keys, "E": features, "bytes": query.element_size()}
    return {"H": heads, "E": features, "TILE": tile, **parameters(kernel, default, query.device, **sizes)}


@triton.jit(do_not_specialize=["R", "B"])
def _forward(
    query,
    keys,
    values,
    masks,
    starts,
    key_starts,
    out,
    statistics,
    R,
    B,
    H: tl.constexpr,
    E: tl.constexpr,
    TILE: tl.constexpr,
    BO: tl.constexpr,
    BW: tl.constexpr,
):
    ALONG: tl.constexpr = 0 if TILE is None else 1  # the axis of a tile that is walked over
    group, sample, head = _place(B, H)
    at = group, head * E
    statistics += (group * H + head) * 2 * R
    start, T = _span(starts, group, sample, B, R)
    if sample == B:
        _clear(out, at, start, T, E, TILE, BO)
        _clear_statistics(statistics + start, T, R, BO)
    elif tl.program_id(1) * BO < T:
        shifts, ends = _spans(key_starts, group, sample)
        p_keys, p_values = _all_from(keys, at, shifts), _all_from(values, at, shifts)
        p_masks = _all_from(masks, (group, 0), shifts)
        t = tl.program_id(1) * BO + tl.arange(0, BO)  # [BO]
        b_query = _own(_rows(_from(query, at, start), t), t < T, E, TILE)
        b_top = tl.full([BO], float("-inf"), tl.float32)
        b_total = tl.zeros([BO], tl.float32)
        b_out = _zeros(BO, E, TILE)
        for first in range(0, ends[-1], BW):
            k = first + tl.arange(0, BW)  # [BW]
            present = tl.load(_spliced(p_masks, ends, k), k < ends[-1], 0) != 0
            if _any(present):
                b_key = _walked(_spliced(p_keys, ends, k), present, E, TILE)
                b_value = _walked(_spliced(p_values, ends, k), present, E, TILE)
                b_score = _scores(b_query, b_key, tl.expand_dims(present, 1 - ALONG), E, TILE)
                b_new_top = tl.maximum(b_top, tl.max(b_score, ALONG))  # [BO]
                b_weight = tl.exp2(b_score - tl.expand_dims(b_new_top, ALONG))
                b_shrink = tl.exp2(b_top - b_new_top)
                b_total = b_total * b_shrink + tl.sum(b_weight, ALONG)
                b_out = _add_weighted(_times(b_out, b_shrink, TILE), b_weight, b_value, TILE)
                b_top = b_new_top
        keyless = b_total == 0.0
        b_share = 1.0 / tl.where(keyless, float("inf"), b_total)
        _store(_rows(_from(out, at, start), t), _times(b_out, b_share, TILE), t < T, E, TILE)
        statistics += start
        tl.store(statistics + t, tl.where(keyless, 0.0, b_top), t < T)
        tl.store(statistics + R + t, b_share, t < T)


@triton.jit(do_not_specialize=["R", "longest", "B"])
def _backward(
    query,
    keys,
    values,
    masks,
    starts,
    key_starts,
    out,
    statistics,
    grad,
    grad_query,
    grad_keys,
    grad_values,
    key_rows,
    R,
    longest,
    B,
    H: tl.constexpr,
    E: tl.constexpr,
    TILE: tl.constexpr,
    BO: tl.constexpr,
    BW: tl.constexpr,
):
    ALONG: tl.constexpr = 0 if TILE is None else 1  # the axis of a tile that is walked over
    group, sample, head = _place(B, H)
    at = group, head * E
    start, T = _span(starts, group, sample, B, R)
    statistics += (group * H + head) * 2 * R + start
    block, query_blocks = tl.program_id(1), tl.cdiv(longest, BO)
    if sample == B:
        _clear(grad_query, at, start, T, E, TILE, BO)
        for i in tl.static_range(len(key_rows)):
            start, T = _span(key_starts[i], group, sample, B, key_rows[i])
            _clear(grad_keys[i], at, start, T, E, TILE, BO)
            _clear(grad_values[i], at, start, T, E, TILE, BO)
    else:
        shifts, ends = _spans(key_starts, group, sample)
        p_query, p_grad, p_out = _from(query, at, start), _from(grad, at, start), _from(out, at, start)
        p_keys, p_values = _all_from(keys, at, shifts), _all_from(values, at, shifts)
        p_masks = _all_from(masks, (group, 0), shifts)
        if block < query_blocks:
            t = block * BO + tl.arange(0, BO)  # [BO]
            b_query, b_grad = _own(_rows(p_query, t), t < T, E, TILE), _own(_rows(p_grad, t), t < T, E, TILE)
            b_delta = _dots(b_grad, _own(_rows(p_out, t), t < T, E, TILE), TILE)
            b_top, b_share = tl.load(statistics + t, t < T, 0.0), tl.load(statistics + R + t, t < T, 0.0)
            b_grad_query = _zeros(BO, E, TILE)
            for first in range(0, tl.where(block * BO < T, ends[-1], 0), BW):
                k = first + tl.arange(0, BW)  # [BW]
                present = tl.load(_spliced(p_masks, ends, k), k < ends[-1], 0) != 0
                if _any(present):
                    b_key = _walked(_spliced(p_keys, ends, k), present, E, TILE)
                    b_value = _walked(_spliced(p_values, ends, k), present, E, TILE)
                    b_score = _scores(b_query, b_key, tl.expand_dims(present, 1 - ALONG), E, TILE)
                    b_weight = tl.exp2(b_score - tl.expand_dims(b_top, ALONG)) * tl.expand_dims(b_share, ALONG)
                    b_change = b_weight * (_products(b_grad, b_value, E, TILE) - tl.expand_dims(b_delta, ALONG))
                    b_grad_query = _add_weighted(b_grad_query, b_change, b_key, TILE)
            b_factor = tl.full([BO], LN_2 * _scale(E), tl.float32)
            p_grad_query = _rows(_from(grad_query, at, start), t)
            _store(p_grad_query, _times(b_grad_query, b_factor, TILE), t < T, E, TILE)
        else:
            k = (block - query_blocks) * BO + tl.arange(0, BO)  # [BO]
            present = tl.load(_spliced(p_masks, ends, k), k < ends[-1], 0) != 0
            b_key = _own(_spliced(p_keys, ends, k), present, E, TILE)
            b_value = _own(_spliced(p_values, ends, k), present, E, TILE)
            b_grad_key, b_grad_value = _zeros(BO, E, TILE), _zeros(BO, E, TILE)
            for first in range(0, tl.where(_any(present), T, 0), BW):
                t = first + tl.arange(0, BW)  # [BW]
                b_delta = _dots(_own(_rows(p_grad, t), t < T, E, TILE), _own(_rows(p_out, t), t < T, E, TILE), TILE)
                b_top, b_share = tl.load(statistics + t, t < T, 0.0), tl.load(statistics + R + t, t < T, 0.0)
                b_query = _walked(_rows(p_query, t), t < T, E, TILE)
                b_grad = _walked(_rows(p_grad, t), t < T, E, TILE)
                b_score = _scores(b_key, b_query, tl.expand_dims(present, ALONG), E, TILE)
                b_weight = tl.exp2(b_score - tl.expand_dims(b_top, 1 - ALONG)) * tl.expand_dims(b_share, 1 - ALONG)
                b_change = b_weight * (_products(b_value, b_grad, E, TILE) - tl.expand_dims(b_delta, 1 - ALONG))
                b_grad_value = _add_weighted(b_grad_value, b_weight, b_grad, TILE)
                b_grad_key = _add_weighted(b_grad_key, b_change, b_query, TILE)
            b_factor = tl.full([BO], LN_2 * _scale(E), tl.float32)
            p_grad_key = _spliced(_all_from(grad_keys, at, shifts), ends, k)
            p_grad_value = _spliced(_all_from(grad_values, at, shifts), ends, k)
            _store(p_grad_key, _times(b_grad_key, b_factor, TILE), k < ends[-1], E, TILE)
            _store(p_grad_value, b_grad_value, k < ends[-1], E, TILE)


@triton.jit
def _place(B, H: tl.constexpr):
    """Group, sample (B: nobody) and head of a program."""
    program = tl.program_id(0).to(tl.int64)
    return program // H // (B + 1), program // H % (B + 1), program % H


@triton.jit
def _from(view, at, row):
    """Pointer to a row of a view at (group, column), and the stride to the next."""
    return view[0] + at[0] // view[1] * view[2] + at[1] + row * view[3], view[3]


@triton.jit
def _all_from(views, at, rows):
    pointers = (_from(views[0], at, rows[0]),)
    for i in tl.static_range(1, len(views)):
        pointers += (_from(views[i], at, rows[i]),)  # type: ignore[assignment]  # Triton tuples grow
    return pointers


@triton.jit
def _rows(first, row):
    """Pointers to rows, counted from a first one."""
    return first[0] + row.to(tl.int64) * first[1]


@triton.jit
def _span(starts, group, sample, B, rows):
    """The first row of a sample, and how many it has; of nobody all that are left of `rows`."""
    p_start, step = _from(starts, (group, 0), sample)
    start = tl.load(p_start)
    return start, (tl.load(p_start + step, sample < B, rows) - start).to(tl.int32)


@triton.jit
def _spans(key_starts, group, sample):
    """Of the keys of a sample, counted on from one segment to the next: what lies between their number and their row,
    and the number at which a segment ends."""
    start, end = _span(key_starts[0], group, sample, sample + 1, 0)
    shifts, ends = (start,), (end,)
    for i in tl.static_range(1, len(key_starts)):
        start, length = _span(key_starts[i], group, sample, sample + 1, 0)
        shifts += (start - end,)  # type: ignore[assignment]  # Triton tuples grow
        end += length
        ends += (end,)  # type: ignore[assignment]
    return shifts, ends


@triton.jit
def _spliced(firsts, ends, k):
    """Pointers to keys."""
    pointers, steps = firsts[0]
    for i in tl.static_range(1, len(ends)):
        pointers = tl.where(k < ends[i - 1], pointers, firsts[i][0])
        steps = tl.where(k < ends[i - 1], steps, firsts[i][1])
    return pointers + k.to(tl.int64) * steps


@triton.jit
def _clear(view, at, start, count, E: tl.constexpr, TILE: tl.constexpr, BO: tl.constexpr):
    """Zeros to `count` rows, which the programs of a head divide among themselves."""
    first_row = _from(view, at, start)
    for first in range(tl.program_id(1) * BO, count, tl.num_programs(1) * BO):
        row = first + tl.arange(0, BO)  # [BO]
        _store(_rows(first_row, row), _zeros(BO, E, TILE), row < count, E, TILE)


@triton.jit
def _clear_statistics(statistics, count, R, BO: tl.constexpr):
    for first in range(tl.program_id(1) * BO, count, tl.num_programs(1) * BO):
        row = first + tl.arange(0, BO)  # [BO]
        tl.store(statistics + row, tl.zeros([BO], tl.float32), row < count)
        tl.store(statistics + R + row, tl.zeros([BO], tl.float32), row < count)


@triton.jit
def _any(present):
    return tl.max(present.to(tl.int32), 0) > 0


@triton.jit
def _scale(E: tl.constexpr):
    """Of a product, for a score in units of ln 2."""
    return LOG2_E / E**0.5


@triton.constexpr_function
def _filled(features):
    return max(16, triton.next_power_of_2(features))


# For a dot, rows are a tile [rows, E filled up]. For FMAs, own rows are a tuple of E vectors [O] in float32, and rows
# walked over are pointers and a mask, read where a feature is needed: a thread would need 32 registers for each.


@triton.jit
def _own(pointers, inside, E: tl.constexpr, TILE: tl.constexpr):
    if TILE is not None:
        feature = tl.arange(0, _filled(E))
        return tl.load(pointers[:, None] + feature, inside[:, None] & (feature < E), 0.0).to(TILE)
    else:
        x = ()
        for e in tl.static_range(E):
            x += (tl.load(pointers + e, inside, 0.0).to(tl.float32),)  # type: ignore[assignment]  # Triton tuples grow
        return x


@triton.jit
def _walked(pointers, inside, E: tl.constexpr, TILE: tl.constexpr):
    if TILE is not None:
        return _own(pointers, inside, E, TILE)
    else:
        return pointers, inside


@triton.jit
def _products(own, walked, E: tl.constexpr, TILE: tl.constexpr):
    """A tile of the dot products of own rows and rows walked over."""
    if TILE is not None:
        return tl.dot(own, tl.trans(walked), input_precision="ieee")
    else:
        b_product = tl.load(walked[0], walked[1], 0.0).to(tl.float32)[:, None] * own[0]
        for e in tl.static_range(1, E):
            b_product += tl.load(walked[0] + e, walked[1], 0.0).to(tl.float32)[:, None] * own[e]
        return b_product


@triton.jit
def _scores(own, walked, present, E: tl.constexpr, TILE: tl.constexpr):
    """A tile of scores in units of ln 2; those of masked keys are -inf, so that they weigh 0.

    The choice also keeps the compiler from joining the scale with the subtraction of the largest score into one FMA:
    forward and backward have to round a score alike, for the largest to weigh exactly its share.
    """
    return tl.where(present, _products(own, walked, E, TILE) * _scale(E), float("-inf"))


@triton.jit
def _add_weighted(x, weight, walked, TILE: tl.constexpr):
    """`x + weight @ walked`, x being like own rows and weight a tile."""
    if TILE is not None:
        return tl.dot(weight.to(walked.dtype), walked, x, input_precision="ieee")
    else:
        y = ()
        for e in tl.static_range(len(x)):
            # The policy keeps the compiler from holding on to what _products has read.
            b_walked = tl.load(walked[0] + e, walked[1], 0.0, eviction_policy="evict_last").to(tl.float32)
            y += (x[e] + tl.sum(weight * b_walked[:, None], 0),)  # type: ignore[assignment]  # Triton tuples grow
        return y


@triton.jit
def _zeros(rows: tl.constexpr, E: tl.constexpr, TILE: tl.constexpr):
    if TILE is not None:
        return tl.zeros([rows, _filled(E)], tl.float32)
    else:
        return (tl.zeros([rows], tl.float32),) * E


@triton.jit
def _times(x, factor, TILE: tl.constexpr):
    """Every row times its factor."""
    if TILE is not None:
        return x * factor[:, None]
    else:
        y = ()
        for e in tl.static_range(len(x)):
            y += (x[e] * factor,)  # type: ignore[assignment]  # Triton tuples grow
        return y


@triton.jit
def _dots(x, y, TILE: tl.constexpr):
    """`x . y` per row, in float32."""
    if TILE is not None:
        return tl.sum(x.to(tl.float32) * y.to(tl.float32), 1)
    else:
        total = x[0] * y[0]
        for e in tl.static_range(1, len(x)):
            total += x[e] * y[e]
        return total


@triton.jit
def _store(pointers, x, inside, E: tl.constexpr, TILE: tl.constexpr):
    if TILE is not None:
        feature = tl.arange(0, _filled(E))
        to = pointers[:, None] + feature
        tl.store(to, x.to(to.dtype.element_ty), inside[:, None] & (feature < E))
    else:
        for e in tl.static_range(E):
            tl.store(pointers + e, x[e].to(pointers.dtype.element_ty), inside)
