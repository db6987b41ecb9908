"""Running a model under the testing conditions of the papers.

Conditions: the seven subsets of modalities, and a sweep over the frame ratio p with all modalities. A condition is
evaluated on the samples that have the modalities it asks for. Masks depend on (evaluation seed, sample, condition).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from fastmmkd.blocks import EvalBlock
from fastmmkd.data.batches import Inputs, Kept, ResidentSplit
from fastmmkd.distributed import rank, world_size
from fastmmkd.evaluation import floors, metrics
from fastmmkd.evaluation.results import Outcome, SeedEvaluation
from fastmmkd.modalities import CONDITIONS, condition_modalities
from fastmmkd.tasks import Task

Predictions = tuple[torch.Tensor, torch.Tensor]
"""Logits `[S, B, O]` and joint representations `[S, B, D]`."""


class Predicts(Protocol):
    """What can be evaluated: see `fastmmkd.methods.method.Network`. A batch is the same for every model."""

    def predict(self, inputs: Inputs) -> Predictions:
        """Of a batch of B samples as they are."""

    def predict_subsets(self, inputs: Inputs, subsets: Sequence[Kept]) -> list[Predictions]:
        """Of the same samples under each of several subsets of their modalities."""


@dataclass(frozen=True)
class Scenario:
    """One thing to evaluate: the modalities that stay, a frame ratio, and the index that keys its draws."""

    kept: Kept
    p: float = 0.0
    index: int = 0
    incomplete: bool = False
    """True: samples that lack some of these modalities take part with what they have."""

    @property
    def is_subset(self) -> bool:
        """Whether it is the sample without some of its modalities, all frames there: several share a prediction."""
        return self.p <= 0 and not self.incomplete


CONDITION_SCENARIOS = {condition: Scenario(condition_modalities(condition)) for condition in CONDITIONS}
"""The seven conditions at p = 0."""
WHOLE = Scenario((True, True, True))


@dataclass
class Evaluator:
    """A split with its labels, ready to be predicted under any scenario."""

    resident: ResidentSplit
    labels: np.ndarray
    """`[N]` or `[N, 4]`, as stored."""
    present: np.ndarray
    """`[N, 3]` bool."""
    task: Task
    block: EvalBlock

    def rows(self, scenario: Scenario) -> np.ndarray:
        """`[n]` int64, the samples that a scenario is evaluated on."""
        if scenario.incomplete:
            return np.arange(len(self.present))
        return np.flatnonzero(self.present[:, np.asarray(scenario.kept)].all(axis=1))

    def run(self, network: Predicts, scenario: Scenario, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Predictions (see `Task`) and joint representations `[n, D]` float32 of some samples under a scenario."""
        logits, representations = [], []
        for samples in self._batches(rows, 1):
            batch_logits, batch_representations = self._predict(network, scenario, samples)
            logits.append(batch_logits[0].float().cpu())
            representations.append(batch_representations[0].float().cpu())
        return self.task.predictions(torch.cat(logits)), torch.cat(representations).numpy()

    def outcomes(self, network: Predicts, scenarios: Sequence[Scenario]) -> list[Outcome]:
        """Metrics of every scenario."""
        return [of_models[0] for of_models in self.model_outcomes(network, 1, scenarios)]

    def model_outcomes(self, network: Predicts, models: int, scenarios: Sequence[Scenario]) -> list[list[Outcome]]:
        """Metrics `[scenario][model]`. Several processes share the batches out and all get every result.

        Batches hold `eval.batch_size` samples over all models. Subsets of modalities are predicted of one batch.
        """
        subsets = [i for i, scenario in enumerate(scenarios) if scenario.is_subset]
        jobs = ([subsets] if subsets else []) + [[i] for i in range(len(scenarios)) if i not in subsets]
        work: list[tuple[list[int], np.ndarray]] = []
        for job in jobs:
            rows = np.unique(np.concatenate([self.rows(scenarios[i]) for i in job]))
            work += [(job, samples) for samples in self._batches(rows, models)]
        done = {
            at: self._logits(network, [scenarios[i] for i in job], samples)
            for at, (job, samples) in list(enumerate(work))[rank() :: world_size()]
        }
        if world_size() > 1:
            shares: list[dict[int, list[torch.Tensor]]] = [{}] * world_size()
            dist.all_gather_object(shares, done)
            done = {at: logits for share in shares for at, logits in share.items()}
        logits: dict[int, list[torch.Tensor]] = {i: [] for i in range(len(scenarios))}
        for at, (job, _) in enumerate(work):
            for i, of_scenario in zip(job, done[at], strict=True):
                logits[i].append(of_scenario)
        return [self._outcomes(scenario, models, logits[i]) for i, scenario in enumerate(scenarios)]

    def _batches(self, rows: np.ndarray, models: int) -> list[np.ndarray]:
        size = max(1, self.block.batch_size // models)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    @torch.no_grad()
    def _predict(self, network: Predicts, scenario: Scenario, samples: np.ndarray) -> Predictions:
        return network.predict(self._inputs(scenario, samples))

    def _inputs(self, scenario: Scenario, samples: np.ndarray) -> Inputs:
        rows = torch.from_numpy(samples).to(self.resident.present.device)
        exact = self.block.ratio == "exact"
        return self.resident.evaluation_batch(rows, scenario.kept, scenario.p, self.block.seed, scenario.index, exact)

    @torch.no_grad()
    def _logits(self, network: Predicts, scenarios: Sequence[Scenario], samples: np.ndarray) -> list[torch.Tensor]:
        """Per scenario `[S, n, O]` float32 on the host, of those of the samples that it is evaluated on."""
        if not scenarios[0].is_subset:
            (scenario,) = scenarios
            return [self._predict(network, scenario, samples)[0].float().cpu()]
        kept = list(dict.fromkeys(scenario.kept for scenario in scenarios))
        predicted = network.predict_subsets(self._inputs(WHOLE, samples), kept)
        logits = {subset: logits.float().cpu() for subset, (logits, _) in zip(kept, predicted, strict=True)}
        wanted = (self.present[samples][:, np.asarray(scenario.kept)].all(axis=1) for scenario in scenarios)
        return [logits[scenario.kept][:, rows] for scenario, rows in zip(scenarios, wanted, strict=True)]

    def _outcomes(self, scenario: Scenario, models: int, logits: list[torch.Tensor]) -> list[Outcome]:
        rows = self.rows(scenario)
        if not len(rows):
            return [Outcome(0, {})] * models
        labels, outcomes = self.labels[rows], []
        for of_model in torch.cat(logits, dim=1):
            predictions = self.task.predictions(of_model)
            values = metrics.compute(self.task, labels, predictions)
            values |= {"loss": metrics.loss(self.task, labels, predictions)}
            outcomes.append(Outcome(len(rows), values, metrics.confusion(self.task, labels, predictions)))
        return outcomes

    def constants(self, scenarios: Sequence[Scenario]) -> list[Outcome]:
        """What the best constant prediction reaches under every scenario, see `floors.constant`."""
        outcomes = []
        for rows in map(self.rows, scenarios):
            outcomes.append(Outcome(len(rows), floors.constant(self.task, self.labels[rows]) if len(rows) else {}))
        return outcomes

    def evaluate(self, network: Predicts, seed: int) -> SeedEvaluation:
        """Everything that `results.json` needs of one trained model."""
        sweep = [Scenario((True, True, True), p, index) for index, p in enumerate(self.block.sweep)]
        outcomes = self.outcomes(network, [*CONDITION_SCENARIOS.values(), *sweep])
        conditions, of_sweep = outcomes[: len(CONDITION_SCENARIOS)], outcomes[len(CONDITION_SCENARIOS) :]
        return SeedEvaluation(
            seed=seed,
            conditions=dict(zip(CONDITION_SCENARIOS, conditions, strict=True)),
            sweep=[(s.p, outcome.metrics) for s, outcome in zip(sweep, of_sweep, strict=True)],
            sweep_samples=of_sweep[0].samples if of_sweep else 0,
        )


def mean_over_conditions(conditions: dict[str, Outcome], key: str) -> float:
    """The mean of a metric over the conditions that have a value for it: what checkpoints are selected by.

    NaN where none has, for example F1 non0 on a split whose scores are all zero.
    """
    values = [outcome.metrics[key] for outcome in conditions.values() if outcome.samples]
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
