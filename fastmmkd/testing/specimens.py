"""Calls of the kernels at the sizes of the shipped configs: what is compiled offline, held to budgets, and tuned.

A kernel joins by a `Specimen` in `specimens`. Shape legend: G groups, B samples of a batch, T frames, N samples of a
loss. Every sample is as long as the longest, the most that a launch has to do, unless `Make` draws lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch

from fastmmkd.blocks import AttentionModel
from fastmmkd.config import load_config
from fastmmkd.data.synthetic import draw_clips
from fastmmkd.data.synthetic_world import kind_named
from fastmmkd.kernels.launch import Launch, recorded

CONFIGS = Path(__file__).parents[2] / "configs"
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

FRAMES = 50
"""Of aligned data."""
UNALIGNED = 375
"""Of each modality; 3 segments of keys are 1125."""
WIDTH, HIDDEN = AttentionModel().width, 64
"""Of a modality's representation, and of a statistics network."""
VERSIONS = 2
"""Of a batch; UMDF trains on two at once."""
GLOBAL_BATCH = 1024
"""Samples of a loss over many processes."""
FEATURES = (300, 74, 35)
"""Of the modalities of CMU-MOSEI."""


@dataclass(frozen=True)
class Make:
    """Makes a specimen's arguments; on the "meta" device they hold no data."""

    dtype: torch.dtype
    device: str = "meta"
    like: str = ""
    """The data set whose lengths samples have ("mosei"); "": all are as long as the longest."""

    def lengths(self, samples: int, frames: int) -> torch.Tensor:
        """`[samples]` int64, `frames` at most."""
        if not self.like:
            return torch.full((samples,), frames)
        kind = kind_named(self.like)
        drawn = draw_clips(kind, samples, np.random.default_rng(0)).length
        return torch.as_tensor(np.ceil(drawn / max(drawn) * frames)).to(torch.int64)

    def rows(self, samples: int, frames: int) -> int:
        """Of a batch."""
        return int(self.lengths(samples, frames).sum())

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, device=self.device).to(self.dtype)

    def exact(self, *shape: int) -> torch.Tensor:
        """Statistics, which kernels keep in float32."""
        return torch.rand(shape, device=self.device)

    def mask(self, *shape: int) -> torch.Tensor:
        return torch.ones(shape, dtype=torch.bool, device=self.device)

    def indices(self, *shape: int) -> torch.Tensor:
        """Zeros, int64."""
        return torch.zeros(shape, dtype=torch.int64, device=self.device)

    def starts(self, samples: int, frames: int) -> torch.Tensor:
        """`[1, samples + 1]` int64, where each one's rows begin."""
        ends = self.lengths(samples, frames).cumsum(0)
        return torch.nn.functional.pad(ends, (1, 0))[None].to(self.device)


class Specimen(NamedTuple):
    """One call of `fastmmkd.kernels.<op>.<function>`."""

    op: str
    function: str
    shape: str
    arguments: Callable[[Make], tuple[Any, ...]]
    main: bool = False
    """A size that most of the papers' training runs at."""

    @property
    def module(self) -> ModuleType:
        return import_module(f"fastmmkd.kernels.{self.op}")

    def call(self, make: Make) -> Callable[[], Any]:
        """The call with arguments that `make` makes, to be run any number of times."""
        return partial(getattr(self.module, self.function), *self.arguments(make))

    def launches(self, dtype: torch.dtype, arch: int) -> list[Launch]:
        """The launches that a call leads to on an architecture (70 for sm_70); nothing runs."""
        with recorded(divmod(arch, 10)) as launches:
            self.call(Make(dtype))()
        return launches


def specimens() -> list[Specimen]:
    """All of them."""
    return [
        *_cross_attention(),
        *_residual_layer_norm(),
        *_grouped_linear(),
        *_losses(),
        *_missing_draw(),
    ]


@cache
def shipped() -> dict[int, int]:
    """Attention heads of the shipped configs, and the largest batch that each comes with: of the methods that the
    kernels are made for, those that have a literal config besides."""
    batches: dict[int, int] = {}
    configs = {path: load_config(path) for path in sorted(CONFIGS.glob("*.json"))}
    methods = {config.method for path, config in configs.items() if path.stem.endswith("_literal")}
    for config in configs.values():
        if config.method in methods and isinstance(config.model, AttentionModel):
            heads = config.model.heads
            batches[heads] = max(config.train.batch_size, batches.get(heads, 0))
    return batches


def _cross_attention() -> Iterator[Specimen]:
    for heads, batch in shipped().items():
        both, main = VERSIONS * batch, heads == AttentionModel().heads
        yield from _attention("coarse", 3, both, FRAMES, 3, WIDTH, heads, main)
        yield from _attention("fine", 6, both, FRAMES, 2, WIDTH, heads, main)
        yield from _attention("of a modality", 3, batch, FRAMES, 1, WIDTH, heads, main)
        yield from _attention("joint", 1, both, FRAMES, 1, 3 * WIDTH, heads, main)
        yield from _attention("coarse", 1, both, UNALIGNED, 3, WIDTH, heads)


def _attention(
    what: str, groups: int, batch: int, frames: int, segments: int, width: int, heads: int, main: bool = False
) -> Iterator[Specimen]:
    """Forward and backward; keys and values are packed as the models project them."""
    longest = [frames] * (1 + segments)

    def inputs(make: Make) -> tuple[Any, ...]:
        rows = make.rows(batch, frames)
        packed = [make.normal(groups, rows, 2 * width).chunk(2, dim=-1) for _ in range(segments)]
        keys, values = ([kv[i] for kv in packed] for i in range(2))
        masks, starts = [make.mask(1, rows)] * segments, make.starts(batch, frames)
        return make.normal(groups, rows, width), keys, values, masks, starts, [starts] * segments, longest

    def forward(make: Make) -> tuple[Any, ...]:
        return *inputs(make), heads

    def backward(make: Make) -> tuple[Any, ...]:
        rows = make.rows(batch, frames)
        grad, out = (make.normal(groups, rows, width) for _ in range(2))
        return grad, *inputs(make), out, make.exact(groups, heads, 2, rows), heads

    shape = f"{what}, {groups} x {batch} x {frames} x {segments * frames}, {heads} heads of {width // heads}"
    yield Specimen("cross_attention", "cross_attention", shape, forward, main)
    yield Specimen("cross_attention", "cross_attention_backward", shape, backward, main)


def _residual_layer_norm() -> Iterator[Specimen]:
    rows, largest = (VERSIONS * batch for batch in (shipped()[AttentionModel().heads], max(shipped().values())))
    for shape in ((3, rows, FRAMES, WIDTH), (1, rows, FRAMES, 3 * WIDTH), (3, largest, FRAMES, WIDTH)):
        yield from _norm(shape, main=shape[1] == rows)
    yield from _norm((1, rows, UNALIGNED, WIDTH), main=False)


def _norm(shape: tuple[int, int, int, int], main: bool) -> Iterator[Specimen]:
    groups, *batch, width = shape

    def forward(make: Make) -> tuple[Any, ...]:
        x, residual = (make.normal(groups, make.rows(*batch), width) for _ in range(2))
        return x, residual, make.normal(groups, width), make.normal(groups, width), 1e-5

    def backward(make: Make) -> tuple[Any, ...]:
        x, residual, weight, _, _ = forward(make)
        mean, rstd = (make.exact(*x.shape[:2]) for _ in range(2))
        return make.normal(*x.shape), x, residual, weight, mean, rstd

    text = " x ".join(map(str, shape))
    yield Specimen("residual_layer_norm", "residual_layer_norm", text, forward, main)
    yield Specimen("residual_layer_norm", "residual_layer_norm_backward", text, backward, main)


def _grouped_linear() -> Iterator[Specimen]:
    rows, joint = VERSIONS * shipped()[AttentionModel().heads], 3 * WIDTH
    for groups, n, m, relu in ((3, WIDTH, 4 * WIDTH, True), (3, 4 * WIDTH, WIDTH, False), (6, WIDTH, WIDTH, False)):
        yield from _linear(groups, (rows, FRAMES), n, m, relu, main=True)
    for n, m, relu in ((joint, 4 * joint, True), (4 * joint, joint, False), (3 * FEATURES[0], WIDTH, False)):
        yield from _linear(1, (rows, FRAMES), n, m, relu, main=True)
    yield from _linear(1, (rows, 1), 2 * WIDTH, WIDTH, True)
    yield from _linear(1, (rows, UNALIGNED), WIDTH, 4 * WIDTH, True)


def _linear(groups: int, batch: tuple[int, int], n: int, m: int, relu: bool, main: bool = False) -> Iterator[Specimen]:
    def forward(make: Make) -> tuple[Any, ...]:
        rows = make.rows(*batch)
        return make.normal(groups, rows, n), make.normal(groups, n, m), make.normal(groups, m), relu

    def backward(make: Make) -> tuple[Any, ...]:
        x, weight, *_ = forward(make)
        grad, out = (make.normal(groups, x.shape[1], m) for _ in range(2))
        return grad, x, weight, out, relu, [True, True, True]

    shape = f"{groups} x {batch[0]} x {batch[1]}, {n} to {m}{', relu' * relu}"
    yield Specimen("grouped_linear", "grouped_linear", shape, forward, main)
    yield Specimen("grouped_linear", "grouped_linear_backward", shape, backward, main)


def _losses() -> Iterator[Specimen]:
    """Both inputs want a gradient, except the teacher's."""
    joint, largest = 3 * WIDTH, max(shipped().values())
    for n in (min(shipped().values()), largest):
        main = n == largest
        text = f"1 x {n} x {joint}"
        pair = _normal(2, 1, n, joint)
        yield _loss("gaussian_mmd", text, pair, ([True, True],), main)
        yield _loss("js_divergence", f"1 x {n} x 2", _normal(2, 1, n, 2), ([True, True],), main)
        yield _loss("pairwise_contrastive", text, pair, (1.2, 0, True, [True, False]), main)
        yield _loss("prototype_similarity", text, _with_classes(pair, n), (2, [True, False]), main)
        yield _loss("jsd_mutual_information", f"1 x {n} x {HIDDEN}", _scored(n), ([True] * 4,), main)
    seven = _with_classes(_normal(2, 1, largest, joint), largest)
    yield _loss("prototype_similarity", f"1 x {largest} x {joint}, 7 classes", seven, (7, [True, False]))
    narrow = _with_classes(_normal(2, 1, 33, WIDTH), 33)
    yield _loss("prototype_similarity", f"1 x 33 x {WIDTH}, 3 classes", narrow, (3, [True, True]))
    gathered = _normal_of((1, largest, joint), (1, GLOBAL_BATCH, joint))
    text = f"1 x {largest} of {GLOBAL_BATCH} x {joint}"
    yield _loss("pairwise_contrastive", text, gathered, (1.2, largest, True, [True, False]))


Inputs = Callable[[Make], tuple[torch.Tensor, ...]]


def _loss(op: str, shape: str, inputs: Inputs, constants: tuple[Any, ...], main: bool = False) -> Specimen:
    return Specimen(op, op, shape, lambda make: (*inputs(make), *constants), main)


def _normal(count: int, *shape: int) -> Inputs:
    return _normal_of(*(shape,) * count)


def _normal_of(*shapes: tuple[int, ...]) -> Inputs:
    return lambda make: tuple(make.normal(*shape) for shape in shapes)


def _with_classes(pair: Inputs, n: int) -> Inputs:
    return lambda make: (*pair(make), make.indices(1, n))


def _scored(n: int) -> Inputs:
    return _normal_of((1, n, HIDDEN), (1, n, HIDDEN), (1, HIDDEN), (1,))


def _missing_draw() -> Iterator[Specimen]:
    for lengths, exact in (((FRAMES,) * 3, False), ((FRAMES,) * 3, True), ((50, 500, 375), True)):
        yield _draw(lengths, exact, main=not exact)


def _draw(lengths: tuple[int, ...], exact: bool, main: bool) -> Specimen:
    batch = max(shipped().values())

    def arguments(make: Make) -> tuple[Any, ...]:
        features = [make.normal(GLOBAL_BATCH * t, d) for t, d in zip(lengths, FEATURES, strict=True)]
        masks = [make.mask(GLOBAL_BATCH * t) for t in lengths]
        starts = [make.starts(GLOBAL_BATCH, t)[0] for t in lengths]
        keys = make.mask(GLOBAL_BATCH, len(lengths)), make.indices(1, batch), make.indices(1), make.indices()
        batch_starts = [make.starts(VERSIONS * batch, t) for t in lengths]
        rows = [VERSIONS * batch * t for t in lengths]
        return features, masks, starts, *keys, batch_starts, rows, list(lengths), VERSIONS, 0.7, exact

    text = f"{VERSIONS} x {batch} x {'+'.join(map(str, lengths))}{', exact' if exact else ''}"
    return Specimen("missing_draw", "missing_draw", text, arguments, main)
