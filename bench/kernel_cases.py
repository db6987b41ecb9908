"""Operations at sizes, with their inputs and PyTorch's own implementations: what `bench.gpu_kernels` times.

Shape legend: G groups, B samples of a batch, T frames of the longest, R rows, N samples of a loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from bench.attention import scaled_dot_product
from fastmmkd.data.synthetic import draw_clips
from fastmmkd.data.synthetic_world import kind_named
from fastmmkd.ops.layout import Layout

RESIDENT, FEATURES = 1024, (300, 74, 35)
"""Samples of the data that a batch is drawn from, and the features of their modalities."""
VERSIONS = 2
"""Of each sample of a batch."""


class KernelCase(NamedTuple):
    """One operation at one size."""

    op: str
    size: str
    dtype: torch.dtype
    leaves: list[torch.Tensor]
    """Inputs that have gradients."""
    call: Callable[..., Any]
    """`call(function, *leaves)`: runs an implementation with the public arguments."""
    others: dict[str, Callable[..., torch.Tensor]] = {}  # noqa: RUF012
    """PyTorch's own implementations, with the arguments of the operation."""
    compiled: dict[str, Callable[..., torch.Tensor]] = {}  # noqa: RUF012
    """Those that `torch.compile` makes."""


def cases(op: str, dtypes: Sequence[torch.dtype], device: torch.device, large: bool, dry: bool) -> Iterator[KernelCase]:
    """One operation, precision by precision.

    Args:
        op: its name.
        dtypes: the first comes first.
        device: where the inputs lie.
        large: at larger sizes than the shipped configs have (batch 16, two versions).
        dry: at tiny sizes.
    """
    for dtype in dtypes:
        yield from _OF[op](op, dtype, device, large, dry)


def normal(device: torch.device, dtype: torch.dtype, *shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal values, the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def layout(samples: int, frames: int, device: torch.device) -> Layout:
    """Of samples as long as MOSEI's, `frames` at most."""
    lengths = draw_clips(kind_named("mosei"), samples, np.random.default_rng(0)).length.clip(max=frames)
    return Layout.of(torch.tensor(lengths, dtype=torch.int64, device=device)[None], int(lengths.sum()), frames)


def _attentions(op: str, dtype: torch.dtype, device: torch.device, large: bool, dry: bool) -> Iterator[KernelCase]:
    paper = {"G": 3, "B": 32, "T": 50, "segments": 3, "heads": 8, "width": 40}
    if dry:
        paper |= {"G": 1, "B": 2, "T": 5}
    sizes = [paper, paper | {"G": 6, "segments": 2}, paper | {"G": 1, "segments": 1, "width": 120}]
    if large:
        sizes = [paper | {"G": 1, "T": 7 if dry else 375}]
    for size in sizes:
        for mix in (False, True):
            yield attention(device, dtype, size, mix)
    if not large:
        yield attention(device, dtype, paper, mix=True, ragged=True)


def attention(
    device: torch.device, dtype: torch.dtype, sizes: dict[str, int], mix: bool, ragged: bool = False
) -> KernelCase:
    """Keys and values packed as the models project them.

    Args:
        device: of the inputs.
        dtype: of the inputs.
        sizes: G, B, T, segments, heads and width.
        mix: modalities and frames are missing as in training.
        ragged: samples are as long as MOSEI's, not as long as the longest.
    """
    g, b, t, n, heads, width = (sizes[k] for k in ("G", "B", "T", "segments", "heads", "width"))
    of_rows = layout(b, t, device) if ragged else None
    rows = (b, t) if of_rows is None else (of_rows.rows,)
    query = normal(device, dtype, g, *rows, width)
    packed = [normal(device, dtype, g, *rows, 2 * width, seed=1 + i) for i in range(n)]
    generator = torch.Generator().manual_seed(9)
    kept = torch.rand(n, b, generator=generator) < (0.57 if mix else 1.0)
    whose = torch.arange(b)[:, None].expand(b, t) if of_rows is None else of_rows.sample[0].cpu()
    masks = [(torch.rand(rows, generator=generator) < (0.65 if mix else 1.0)) & kept[i][whose] for i in range(n)]
    masks = [mask.to(device)[None] for mask in masks]

    def call(function: Callable[..., torch.Tensor], query: torch.Tensor, *packed: torch.Tensor) -> torch.Tensor:
        keys, values = zip(*(x.chunk(2, -1) for x in packed), strict=True)
        return function(query, keys, values, masks, heads, *([of_rows] if of_rows else []))

    size = f"G={g}, B={b}, {t} x {n * t}, {heads} heads of {width // heads}"
    size += ", training mix" * mix + ", MOSEI's lengths" * ragged
    compiled = {} if mix else {"flex_attention": flexible}
    others = {"scaled_dot_product": scaled_dot_product}
    return KernelCase("cross_attention", size, dtype, [query, *packed], call, others, compiled)


@cache
def _flex() -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flexible(
    query: torch.Tensor,
    keys: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor],
    heads: int,
) -> torch.Tensor:
    """FlexAttention, which wants head widths of a power of two from 16: heads are padded."""
    mask = torch.cat(list(masks), 2).expand(len(query), -1, -1).flatten(0, 1)
    width = query.shape[-1] // heads
    padded = [
        F.pad(
            x.unflatten(-1, (heads, -1)).transpose(2, 3).flatten(0, 1),
            (0, max(16, 1 << (width - 1).bit_length()) - width),
        )
        for x in (query, torch.cat(list(keys), 2), torch.cat(list(values), 2))
    ]

    def masked(score: Any, b: Any, h: Any, q: Any, k: Any) -> torch.Tensor:
        return torch.where(mask[b, k], score, -float("inf"))

    attended = _flex()(*padded, score_mod=masked, scale=width**-0.5)[..., :width]
    return attended.unflatten(0, query.shape[:2]).transpose(2, 3).flatten(-2)


def _norms(op: str, dtype: torch.dtype, device: torch.device, large: bool, dry: bool) -> Iterator[KernelCase]:
    rows = 2 if dry else 32
    for shape in ((1, rows, 375, 40),) if large else ((3, rows, 50, 40), (1, rows, 50, 120)):
        x, residual = (normal(device, dtype, *shape, seed=i) for i in range(2))
        affine = [normal(device, dtype, shape[0], shape[-1], seed=i) for i in (2, 3)]
        yield KernelCase(op, " x ".join(map(str, shape)), dtype, [x, residual, *affine], lambda f, *args: f(*args))


def _linears(op: str, dtype: torch.dtype, device: torch.device, large: bool, dry: bool) -> Iterator[KernelCase]:
    """The first half of a feed-forward network, and its second."""
    rows = 32 if dry else 375 * 32 if large else 640
    for groups, n, m, relu in ((3, 40, 160, True), (3, 160, 40, False), (1, 120, 480, True)):
        x = normal(device, dtype, groups, rows, n)
        weight = normal(device, dtype, groups, n, m, seed=1) / n**0.5
        size = f"{groups} x {rows}, {n} to {m}" + ", relu" * relu
        leaves = [x, weight, normal(device, dtype, groups, m, seed=2)]
        yield KernelCase(op, size, dtype, leaves, lambda f, *args, relu=relu: f(*args, relu))


def _draws(op: str, dtype: torch.dtype, device: torch.device, large: bool, dry: bool) -> Iterator[KernelCase]:
    """No gradients; the batch of a step."""
    samples, batch, frames = (64, 2, 5) if dry else (RESIDENT, 128 if large else 16, 50)
    for ragged in (False, True):
        lengths = (
            layout(samples, frames, device).lengths[0] if ragged else torch.full((samples,), frames, device=device)
        )
        starts = F.pad(lengths.cumsum(0), (1, 0))
        stored = int(starts[-1])
        features = [normal(device, dtype, stored, d, seed=i) for i, d in enumerate(FEATURES)]
        real = torch.ones(stored, dtype=torch.bool, device=device)
        present = torch.ones(samples, len(FEATURES), dtype=torch.bool, device=device)
        sample = torch.arange(batch, device=device)[None]
        drawn = lengths[:batch].repeat(VERSIONS)[None]
        layouts = [Layout.of(drawn, int(drawn.sum()), frames)] * len(FEATURES)
        keys = (
            sample,
            torch.ones(1, dtype=torch.int64, device=device),
            torch.zeros((), dtype=torch.int64, device=device),
        )
        split = features, [real] * len(FEATURES), [starts] * len(FEATURES), present

        def call(function: Callable[..., Any], args: tuple[Any, ...] = (*split, *keys, layouts)) -> Any:
            return function(*args, VERSIONS, 0.7, False)

        yield KernelCase(op, f"{VERSIONS} x {batch} x {frames}" + ", MOSEI's lengths" * ragged, dtype, [], call)


def _losses(op: str, dtype: torch.dtype, device: torch.device, large: bool, dry: bool) -> Iterator[KernelCase]:
    """At a method's batch; large, at a global batch, and pairwise at one that no N x N x d tensor fits."""
    for n in (128, 32 if dry else 1024) if large else (16,):
        yield _loss(op, n, dtype, device)


def _loss(op: str, n: int, dtype: torch.dtype, device: torch.device) -> KernelCase:
    pair = [normal(device, dtype, 1, n, 120, seed=i) for i in range(2)]
    size, teacher = f"N={n}", pair[1]
    if op == "gaussian_mmd":
        return KernelCase(op, size, dtype, pair, lambda f, x, y: f(x, y))
    if op == "jsd_mutual_information":
        hidden = [normal(device, dtype, 1, n, 64, seed=i) for i in range(2)]
        network = [normal(device, dtype, 1, 64, seed=2), normal(device, dtype, 1, seed=3)]
        return KernelCase(op, size, dtype, hidden + network, lambda f, *args: f(*args))
    if op == "js_divergence":
        logits = [normal(device, dtype, 1, n, 7, seed=i) for i in range(2)]
        return KernelCase(op, size, dtype, logits, lambda f, x, y: f(x, y))
    if op == "prototype_similarity":
        classes = torch.arange(n, device=device).remainder(2)[None]
        return KernelCase(op, size, dtype, pair[:1], lambda f, x: f(x, teacher, classes, 2))
    return KernelCase(op, size, dtype, pair[:1], lambda f, x: f(x, teacher, 15.0, 0, "mean"))


_OF: dict[str, Callable[[str, torch.dtype, torch.device, bool, bool], Iterator[KernelCase]]] = {
    "cross_attention": _attentions,
    "residual_layer_norm": _norms,
    "grouped_linear": _linears,
    "missing_draw": _draws,
    **dict.fromkeys(
        ("jsd_mutual_information", "gaussian_mmd", "pairwise_contrastive", "prototype_similarity", "js_divergence"),
        _losses,
    ),
}
