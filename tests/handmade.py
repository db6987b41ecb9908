"""Batches, networks and students made by hand, without a data set or a run."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from fastmmkd.blocks import Block, Config, DataBlock, MissingBlock, ModelBlock, TrainBlock
from fastmmkd.data.batches import Batch, Inputs
from fastmmkd.data.dataset import Split
from fastmmkd.methods import METHODS
from fastmmkd.methods.method import Network, Trainable
from fastmmkd.modalities import MODALITIES
from fastmmkd.ops.layout import Layout
from fastmmkd.ops.philox import DrawKeys

CONFIGS = Path(__file__).parents[1] / "configs"


def small_config_of(method: str, path: Path | str, batch: int, layers: int = 1) -> dict[str, Any]:
    """A method's shipped MOSI config with as little of everything as it takes, not validated yet."""
    raw: dict[str, Any] = json.loads((CONFIGS / f"{method}_mosi.json").read_text(encoding="utf-8"))
    raw["data"]["path"] = str(path)
    depths = [key for key, value in raw["model"].items() if key.endswith("_layers") and isinstance(value, int)]
    raw["model"] |= {key: value for key, value in {"width": 8, "heads": 2}.items() if key in raw["model"]}
    raw["model"] |= dict.fromkeys(depths, layers)
    raw["train"] |= {"batch_size": batch, "epochs": 1}
    return raw


def layout_of(models: int, batch: int, frames: int) -> Layout:
    """Samples of one length."""
    lengths = torch.full((models, batch), frames)
    return Layout.of(lengths, batch * frames, frames, is_full=True)


def ragged_layout(lengths: list[list[int]], versions: int = 1, spare: int = 0) -> Layout:
    """Samples of these lengths, `[S, B]`, V times; `spare`: rows beyond those of the model that has most."""
    longest, rows = max(map(max, lengths)), versions * max(map(sum, lengths)) + spare
    return Layout.of(torch.tensor(lengths).repeat(1, versions), rows, longest)


def samples_of(x: torch.Tensor, layout: Layout) -> list[torch.Tensor]:
    """`[S, R, ...]` -> `[T, ...]` of each sample, those of the first model first."""
    return [x[s, start:end] for s, starts in enumerate(layout.starts.tolist()) for start, end in pairwise(starts)]


def inputs_of(features: list[torch.Tensor], masks: list[torch.Tensor]) -> Inputs:
    """Padded samples, features `[S, B, T_m, d_m]` and masks `[S, B, T_m]`: every frame is a row."""
    made = {x.shape[:3]: layout_of(*x.shape[:3]) for x in features}
    rows = ([x.flatten(1, 2) for x in of] for of in (features, masks))
    return Inputs(*rows, [made[x.shape[:3]] for x in features])


def batch_of(
    features: list[torch.Tensor],
    masks: list[torch.Tensor],
    targets: torch.Tensor,
    taught: Any = None,
    draw: DrawKeys | None = None,
) -> Batch:
    """What a method trains on, see `inputs_of`; without `draw` there is no dropout."""
    made = {x.shape[2]: layout_of(len(x), targets.shape[1], x.shape[2]) for x in features}
    layouts = [made[x.shape[2]] for x in features]
    return Batch(inputs_of(features, masks), None, targets, layouts, draw, None, taught)  # type: ignore[arg-type]


def network_of(config: Config, dims: tuple[int, ...], seed: int) -> Network:
    """What a config's last phase exports, freshly initialised."""
    torch.manual_seed(seed)
    return METHODS[config.method].network(config, dims)


def student_of(config: Config, dims: tuple[int, ...], seed: int, teacher: Network | None = None) -> Trainable:
    """What a config's last phase trains, with that teacher or one that has not learnt."""
    earlier = {"teacher": teacher or network_of(config, dims, seed)}
    torch.manual_seed(seed)
    return METHODS[config.method].phases_of(config)[-1].build(config, dims, earlier)


def config_for_data(
    task: str = "regression", clip: float | None = 10.0, missing: dict[str, Any] | None = None, **model: Any
) -> Config:
    """What a `ResidentSplit` asks of a config; `model`: keys of that block."""
    return Config(
        method="none",
        data=DataBlock(path="none.h5", clip=clip),
        model=ModelBlock(**model),
        missing=MissingBlock(**(missing or {})),
        loss=Block(),
        train=TrainBlock(task=task, batch_size=2, epochs=1),
        deepspeed={"optimizer": {"type": "Adam"}},
    )


def lacking(split: Split, modality: str, samples: slice) -> Split:
    """The split, copied where it changes, with a modality of some samples absent."""
    m = MODALITIES.index(modality)
    present, lengths = split.present.copy(), split.lengths.copy()
    present[samples, m], lengths[samples, m] = False, 0
    kept = present[split.row_samples(modality), m]
    features = split.features | {modality: split.features[modality][kept]}
    return replace(split, features=features, lengths=lengths, present=present)
