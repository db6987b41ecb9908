"""Which contenders a config and a device allow, in what order they are measured, and how each is built."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch

from bench.as_trained import AsTrained
from bench.attention import jagged, scaled_dot_product
from bench.compilation import forget_compiled
from bench.contenders import WITH_REFERENCE, Contender, Context, Forward, Graphed, reference_with
from bench.padding import PADDED, CroppedSplit
from bench.variants import (
    AS_TRAINED,
    AUTOTUNED,
    COMPILED,
    COMPILED_GRAPHED,
    CROPPED,
    GRAPHED,
    JAGGED,
    OURS,
    OURS_COMPILED,
    PLAIN,
    REFERENCE,
    SDPA,
    SEEDS,
)
from fastmmkd.blocks import Config
from fastmmkd.data.batches import Batch, ResidentSplit
from fastmmkd.data.dataset import Dataset
from fastmmkd.engine.graphs import CudaCapture
from fastmmkd.engine.step import Objective, untrained_objective
from fastmmkd.errors import UserError
from fastmmkd.ops.layout import Positions, unpack

TOGETHER = (OURS, AS_TRAINED, GRAPHED, REFERENCE, SDPA, CROPPED, PLAIN)
"""What takes a moment to set up, the most important first: they take turns."""
LATER = (OURS_COMPILED, COMPILED_GRAPHED, COMPILED, SEEDS, JAGGED, AUTOTUNED)
"""What takes long, to set up or by itself: one after the other, each in turns with "ours"."""
ALWAYS = (OURS, AS_TRAINED, GRAPHED, REFERENCE, SDPA, CROPPED)
"""What is measured unless others are asked for."""
OF_OURS = frozenset({OURS, AS_TRAINED, GRAPHED, OURS_COMPILED, SEEDS})
NEED_CUDA = frozenset({GRAPHED, COMPILED_GRAPHED, OURS_COMPILED, AUTOTUNED})
OPAQUE = frozenset({COMPILED, AUTOTUNED})
"""The dispatcher does not see what they call, nor what replays."""
PLAIN_PYTORCH = (REFERENCE, SDPA, CROPPED, JAGGED, PLAIN, COMPILED, AUTOTUNED, COMPILED_GRAPHED)
SHOWN = (*PLAIN_PYTORCH, OURS, GRAPHED, OURS_COMPILED, AS_TRAINED, SEEDS)
"""The order of tables."""
RESIDENT = dict.fromkeys(PLAIN_PYTORCH, PADDED) | {CROPPED: CroppedSplit, JAGGED: ResidentSplit}
"""How the data lie of those that do not train on rows as ours does."""
CONTEXTS: dict[str, Context] = dict.fromkeys(PLAIN_PYTORCH, WITH_REFERENCE) | {
    SDPA: partial(reference_with, scaled_dot_product),
    JAGGED: partial(reference_with, jagged),
}


def names(config: Config, device: torch.device) -> list[str]:
    """All contenders that a config and a device allow, the most important first."""
    left_out = set() if device.type == "cuda" else set(NEED_CUDA)
    if plain_of(config.method) is None:
        left_out.add(PLAIN)
    return [name for name in (*TOGETHER, *LATER) if name not in left_out]


def plain_of(method: str) -> ModuleType | None:
    """The module `bench.plain_<method>`, where a method has one: its `Plain(trainable, attention)` is the method in the
    modules that PyTorch users write, `loss(batch)` its loss."""
    name = f"bench.plain_{method}"
    return import_module(name) if find_spec(name) else None


def choose(text: str, allowed: Sequence[str]) -> list[str]:
    """The contenders that `"reference,ours,ours + graph, bare loop"` names; some names hold a comma.

    Raises:
        UserError: one is not allowed.
    """
    words, named = [word.strip() for word in text.split(",")], []
    while words:
        lengths = [n for n in range(len(words), 0, -1) if ", ".join(words[:n]) in allowed]
        if not lengths:
            raise UserError(f"--variants {words[0]}: no such contender here; expected some of {'; '.join(allowed)}")
        named.append(", ".join(words[: lengths[0]]))
        words = words[lengths[0] :]
    return [name for name in allowed if name in named]


def build(
    name: str, config: Config, dataset: Dataset, models: int, device: torch.device, dtype: torch.dtype
) -> Contender:
    """A contender; each has its own models, of the weights of seed 1 (and 2, 3, ... where it trains several)."""
    if name == AS_TRAINED:
        return AsTrained(config, dataset, device)
    if name != SEEDS:
        models = 1
    using, resident = CONTEXTS.get(name, nullcontext), RESIDENT.get(name, ResidentSplit)
    with using():  # a teacher is asked here
        objective = untrained_objective(config, dataset, range(1, models + 1), device, dtype, resident=resident)
    if name == PLAIN:
        module = plain_of(config.method)
        assert module
        plain = module.Plain(objective.module, "sdpa").to(device, dtype)
        return Contender(config, objective, 1, using, partial(_plain_loss, plain, config.model.positions), plain)
    if name in (COMPILED, AUTOTUNED):
        return Contender(
            config, objective, 1, using, compiled(objective, "max-autotune" if name == AUTOTUNED else None)
        )
    if name == GRAPHED:
        return Graphed(config, objective, CudaCapture())
    if name == OURS_COMPILED:
        return Graphed(config, objective, CudaCapture(), forward=compiled(objective))
    if name == COMPILED_GRAPHED:
        return Graphed(config, objective, CudaCapture(), using, compiled(objective))
    contender = Contender(config, objective, models, using)
    if name in OF_OURS and device.type == "cuda":
        contender.make_room()
    return contender


def compiled(objective: Objective, mode: str | None = None, **options: Any) -> Forward:
    """The step's loss by `torch.compile`, which fails where it would rather run eagerly."""
    forget_compiled()
    return partial(_compiled_loss, torch.compile(objective.module, mode=mode, **options))


def _plain_loss(module: torch.nn.Module, positions: Positions, batch: Batch) -> torch.Tensor:
    features, masks, (layout, *_), _ = batch.inputs
    features, masks, (position,) = (
        [unpack(x, layout)[0] for x in rows] for rows in (features, masks, [layout.counted_from(positions)])
    )
    return module(features, masks, position, batch.targets[0])


def _compiled_loss(module: Any, batch: Batch) -> torch.Tensor:
    return module(batch)[0]
