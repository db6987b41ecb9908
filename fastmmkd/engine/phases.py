"""What a run trains, one stretch after the other: the phases of its method, each built with the networks before it.

A seed's folder holds its last phase; a phase before that lies in a folder of its name below it, and `<name>.json` there
marks it as finished and says what it fits. Seeds that are trained together go through each phase together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from fastmmkd.blocks import Config
from fastmmkd.data.dataset import Dataset
from fastmmkd.engine.groups import SeedGroup
from fastmmkd.evaluation.protocol import CONDITION_SCENARIOS, Scenario
from fastmmkd.methods import METHODS
from fastmmkd.methods.method import Earlier, Network, PhaseSpec, SelectOn, Trainable
from fastmmkd.nn.models import stack_models


@dataclass(frozen=True)
class Phase:
    """One stretch of training."""

    spec: PhaseSpec
    module: Trainable
    """What is trained, one model per seed of the group."""
    group: SeedGroup
    """Whom it trains; its folders are this phase's."""
    rows: torch.Tensor
    """`[n]` int64, the training samples it uses."""
    config: Config
    is_only: bool
    """Whether the run has no other phase."""

    @property
    def epochs(self) -> int:
        return self.spec.epochs(self.config)

    @property
    def patience(self) -> int | None:
        return self.spec.patience(self.config)

    @property
    def scenarios(self) -> dict[str, Scenario]:
        """What the checkpoint is chosen on."""
        select_on: SelectOn = self.spec.select_on(self.config)
        if select_on == "missing":
            return CONDITION_SCENARIOS
        return {"lav": Scenario((True, True, True), incomplete=select_on == "whole")}

    def title(self, whom: str) -> str:
        """What people read about a seed or a group: `"hrlf seed 1 teacher"`."""
        return f"{self.config.method} {whom}{'' if self.is_only else f' {self.spec.name}'}"


def phases_of(config: Config) -> list[PhaseSpec]:
    """The phases of a run, in their order."""
    return METHODS[config.method].phases_of(config)


def begin_phase(spec: PhaseSpec, config: Config, dataset: Dataset, group: SeedGroup, earlier: Earlier) -> Phase:
    """A phase with freshly initialised models.

    Args:
        spec: which.
        config: the run.
        dataset: what it trains on.
        group: whom; the phase's folders are below theirs, the last phase's theirs.
        earlier: the frozen networks of the phases before.
    """
    specs = phases_of(config)
    return Phase(
        spec,
        initialised(spec, config, dataset, group.seeds, earlier),
        group=group if spec is specs[-1] else group.below(spec.name),
        rows=torch.from_numpy(spec.rows(config, dataset.splits["train"])),
        config=config,
        is_only=len(specs) == 1,
    )


def initialised(
    spec: PhaseSpec, config: Config, dataset: Dataset, seeds: tuple[int, ...], earlier: Earlier
) -> Trainable:
    """What a phase trains, one model per seed; a model's weights depend on its seed alone."""
    modules = []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed_offset + seed)
            modules.append(spec.build(config, dataset.feature_dims, earlier))
    module = stack_models(modules)
    module.start()
    return module


def frozen(network: Network, device: torch.device, dtype: torch.dtype) -> Network:
    """A network for those that learn from it: evaluation mode, no gradients."""
    return network.to(device, dtype).eval().requires_grad_(False)


def untrained(
    config: Config, dataset: Dataset, seeds: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> tuple[PhaseSpec, Trainable]:
    """The last phase of a run and what it trains, built with networks that have not learnt yet."""
    *before, last = phases_of(config)
    earlier: dict[str, Any] = {}
    for spec in before:
        earlier[spec.name] = frozen(initialised(spec, config, dataset, seeds, earlier).network, device, dtype)
    return last, initialised(last, config, dataset, seeds, earlier).to(device, dtype)
