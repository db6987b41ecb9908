"""What a method is: it describes itself in its own file, and nothing else in the package knows its name.

A file `fastmmkd/methods/<name>.py` holds the method's blocks of the config, its network, its losses, and `METHOD`. What
it trains is a `Trainable`; the phases of its training are `PhaseSpec`s. Most of the hooks do nothing by default.

Shape legend: S models, B samples of a batch, V missing versions of a sample, N samples of a split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from fastmmkd.blocks import LARGEST_SEED, Config
from fastmmkd.data.batches import Batch, Inputs, Kept, ResidentSplit, View
from fastmmkd.data.dataset import Split
from fastmmkd.methods.objective import Losses, Parts, objective

FeatureDims = tuple[int, ...]
"""d_m of language, audio, visual, from the data file."""
Earlier = Mapping[str, "Network"]
"""The networks of the phases before, by the phase's name: trained, frozen, in evaluation mode, on the run's device."""
SelectOn = Literal["missing", "complete", "whole"]
"""Validation samples that a checkpoint is chosen on: see `TrainBlock.select_on`; whole = with all that each has."""
TEACHER_SEEDS = LARGEST_SEED + 1
"""Added to a seed for its teacher's initialisation: teacher and student do not start from the same weights. The sum
still fits into 32 bits, all that torch's generator takes of a seed."""


class Trainable(nn.Module):
    """What a phase trains. Every parameter and buffer starts with S, see `fastmmkd.nn.models`."""

    network: Network
    """What is evaluated and exported."""
    frozen: tuple[Network, ...] = ()
    """What it learns from; no submodules of it, because they are in a tuple."""

    def losses(self, batch: Batch) -> Losses:
        """The losses of a batch: their weighted sum, and the parts, `[S]` each."""
        raise NotImplementedError

    def forward(self, batch: Batch) -> tuple[torch.Tensor, Parts]:
        """The scalar to minimise, summed over the models, which share nothing, and its parts, detached, `[S]` each."""
        total, parts, _ = self.losses(batch)
        return objective(total, parts)

    def teach(self, complete: Inputs) -> Any:
        """What the frozen networks make of complete samples: tensors `[S, B, ...]`, in whatever tuples or dicts.

        Asked once of every training sample, when the phase begins; a batch finds its own in `batch.taught`.
        """
        return None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimiser is given: groups as torch's optimisers have them."""
        return [{"params": list(self.parameters())}]

    def order(self, rows: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
        """The training samples `[n]` int64 in an epoch's order: a permutation that depends on (seed, epoch) alone."""
        generator = torch.Generator().manual_seed((seed << 20) + epoch)
        return rows[torch.randperm(len(rows), generator=generator)]

    def start(self) -> None:
        """Called once when the models are stacked, before there is an optimiser: take over what was learnt before."""

    def prepare(self, split: ResidentSplit) -> None:
        """Called once when the phase begins, before a checkpoint is read: fill tables and banks."""

    def after_step(self, batch: Batch) -> None:
        """Called after the update. It may write buffers only, and never waits for the device (it may be captured)."""

    def end_epoch(self, epoch: int) -> None:
        """Called after the last step of an epoch, before validation; `epoch` counts from 0."""


class Network(Trainable):
    """What is evaluated and exported; trained by itself, it has losses of its own."""

    @property
    def network(self) -> Network:  # type: ignore[override]
        return self

    def predict(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[S, B, O]` and joint representations `[S, B, D]`."""
        raise NotImplementedError

    def predict_subsets(self, inputs: Inputs, subsets: Sequence[Kept]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The same of the samples under each of several subsets of their modalities: what these share is computed
        once, where a network can."""
        return [self.predict(inputs.only(kept)) for kept in subsets]


def every_sample(config: Config, train: Split) -> np.ndarray:
    """`[n]` int64: all training samples."""
    return np.arange(len(train))


@dataclass(frozen=True)
class PhaseSpec:
    """One stretch of training: a method's phases follow each other, those of them that a config wants."""

    name: str
    """"network", "teacher", "student", ...; all but the last lie in a folder of this name below the seed's."""
    build: Callable[[Config, FeatureDims, Earlier], Trainable]
    """A freshly initialised module of one model; its weights come from torch's global generator, which is seeded."""
    views: tuple[View, ...]
    """What it sees of a sample."""
    when: Callable[[Config], bool] = lambda config: True
    """Whether a config has this phase."""
    rows: Callable[[Config, Split], np.ndarray] = every_sample
    """The training samples that it uses, `[n]` int64."""
    epochs: Callable[[Config], int] = lambda config: config.train.epochs
    patience: Callable[[Config], int | None] = lambda config: config.train.patience
    select_on: Callable[[Config], SelectOn] = lambda config: config.train.select_on
    seed_offset: int = 0
    """Added to a run's seed for the initialisation."""
    accept_floor: Callable[[Config], bool] = lambda config: False
    """Whether later phases are built on it even where its best validation score is no better than a constant's, such as
    when it does not train for the task."""


@dataclass(frozen=True)
class Method:
    """A method, as its file describes it."""

    name: str
    """As configs spell it; the file's name."""
    title: str
    """As its paper spells it."""
    published: str
    """When, "2024-03"; tables list methods in this order."""
    config: type[Config]
    network: Callable[[Config, FeatureDims], Network]
    """What is evaluated and exported in the end, freshly initialised, one model."""
    phases: tuple[PhaseSpec, ...]
    ablations: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """The rows of its ablation table, the full method first, and the overrides (`--set`) that make each."""
    grouped: bool = True
    """Whether several models can be one module (`train.together`)."""
    check: Callable[[Config, Mapping[str, Split]], None] = lambda config, splits: None
    """Refuse splits that its network cannot read, before anything is trained."""
    compared: bool = False
    """Whether it is one of the systems that the papers of the others compare with."""

    def phases_of(self, config: Config) -> list[PhaseSpec]:
        """The phases of a config, in their order."""
        return [phase for phase in self.phases if phase.when(config)]


def by_name(methods: Iterable[Method]) -> dict[str, Method]:
    """Methods by their names, the first published first."""
    return {method.name: method for method in sorted(methods, key=lambda method: (method.published, method.name))}


def has_teacher(config: Config) -> bool:
    """Whether a run distils."""
    return config.teacher is not None


def distillation(
    network: Callable[[Config, FeatureDims], Trainable], student: Callable[[Config, FeatureDims, Earlier], Trainable]
) -> tuple[PhaseSpec, ...]:
    """The phases of a method with a teacher of the student's architecture: the teacher on complete samples, then the
    student; without a `teacher` block the network by itself, on missing versions.

    Args:
        network: teacher, and network by itself.
        student: with its distillation losses; finds the frozen teacher under `earlier["teacher"]`.
    """
    alone = lambda config, dims, earlier: network(config, dims)  # noqa: E731
    teacher = PhaseSpec(
        "teacher",
        alone,
        (View.COMPLETE,),
        when=has_teacher,
        rows=teacher_rows,
        epochs=lambda config: _teacher(config).epochs or config.train.epochs,
        patience=lambda config: _teacher(config).patience,
        select_on=lambda config: "whole" if _teacher(config).incomplete_samples else "complete",
        seed_offset=TEACHER_SEEDS,
        accept_floor=lambda config: _teacher(config).accept_floor,
    )
    return (
        teacher,
        PhaseSpec("student", student, (View.MISSING,), when=has_teacher),
        PhaseSpec("network", alone, (View.MISSING,), when=lambda config: not has_teacher(config)),
    )


def teacher_rows(config: Config, train: Split) -> np.ndarray:
    """`[n]` int64, the samples that a teacher trains on: the complete ones, or all."""
    return np.arange(len(train)) if _teacher(config).incomplete_samples else np.flatnonzero(train.present.all(axis=1))


def _teacher(config: Config) -> Any:
    assert config.teacher is not None
    return config.teacher
