"""Running a model under the testing conditions of the papers.

Conditions: the seven subsets of modalities, and a sweep over the frame ratio p with all modalities. A condition is
evaluated on the samples that have the modalities it asks for. Masks depend on (evaluation seed, sample, condition).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from fastmmkd.blocks import EvalBlock
from fastmmkd.data.batches import ResidentSplit
from fastmmkd.distributed import rank, world_size
from fastmmkd.errors import UserError
from fastmmkd.evaluation import floors, metrics
from fastmmkd.evaluation.results import Outcome, SeedEvaluation
from fastmmkd.modalities import CONDITIONS, condition_modalities
from fastmmkd.tasks import Task

Predict = Callable[[list[torch.Tensor], list[torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]
"""Features and masks of one batch, `[1, B, ...]` -> logits `[S, B, O]` and joint representations `[S, B, D]`; S is 1
where nothing else is said."""


@dataclass(frozen=True)
class Scenario:
    """One thing to evaluate: the modalities that stay, a frame ratio, and the index that keys its draws."""

    kept: tuple[bool, bool, bool]
    p: float = 0.0
    index: int = 0
    incomplete: bool = False
    """True: samples that lack some of these modalities take part with what they have."""


CONDITION_SCENARIOS = {condition: Scenario(condition_modalities(condition)) for condition in CONDITIONS}
"""The seven conditions at p = 0."""


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

    def run(self, predict: Predict, scenario: Scenario, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Predictions (see `Task`) and joint representations `[n, D]` float32 of some samples under a scenario."""
        return self.run_models(predict, 1, scenario, rows)[0]

    @torch.no_grad()
    def run_models(
        self, predict: Predict, models: int, scenario: Scenario, rows: np.ndarray
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """The same of each of S models, in batches that hold `eval.batch_size` samples over all of them."""
        device, size = self.resident.present.device, max(1, self.block.batch_size // models)
        logits, representations = [], []
        for start in range(0, len(rows), size):
            sample = torch.from_numpy(rows[start : start + size]).to(device)
            exact = self.block.ratio == "exact"
            features, masks = self.resident.evaluation_batch(
                sample, scenario.kept, scenario.p, self.block.seed, scenario.index, exact
            )
            batch_logits, batch_representations = predict(features, masks)
            logits.append(batch_logits.float().cpu())
            representations.append(batch_representations.float().cpu())
        of_models = zip(torch.cat(logits, dim=1), torch.cat(representations, dim=1), strict=True)
        return [(self.task.predictions(found), joint.numpy()) for found, joint in of_models]

    def outcomes(self, predict: Predict, scenarios: Sequence[Scenario]) -> list[Outcome]:
        """Metrics of every scenario."""
        return [found[0] for found in self.model_outcomes(predict, 1, scenarios)]

    def model_outcomes(self, predict: Predict, models: int, scenarios: Sequence[Scenario]) -> list[list[Outcome]]:
        """Metrics `[scenario][model]`. Several processes share the scenarios out and all get every result."""
        mine: dict[int, list[Outcome] | UserError] = {}
        for i in range(rank(), len(scenarios), world_size()):
            try:
                mine[i] = self._outcomes(predict, models, scenarios[i])
            except UserError as error:  # the others wait for this process's share
                mine[i] = error
        if world_size() > 1:
            parts: list[dict[int, list[Outcome] | UserError] | None] = [None] * world_size()
            dist.all_gather_object(parts, mine)
            mine = {i: outcome for part in parts if part for i, outcome in part.items()}
        found = []
        for i in range(len(scenarios)):
            outcome = mine[i]
            if isinstance(outcome, UserError):
                raise outcome
            found.append(outcome)
        return found

    def _outcomes(self, predict: Predict, models: int, scenario: Scenario) -> list[Outcome]:
        rows = self.rows(scenario)
        if not len(rows):
            return [Outcome(0, {})] * models
        labels, found = self.labels[rows], []
        for predictions, _ in self.run_models(predict, models, scenario, rows):
            values = metrics.compute(self.task, labels, predictions)
            found.append(Outcome(len(rows), values | {"loss": metrics.loss(self.task, labels, predictions)}))
        return found

    def constants(self, scenarios: Sequence[Scenario]) -> list[Outcome]:
        """What the best constant prediction reaches under every scenario, see `floors.constant`."""
        found = []
        for rows in map(self.rows, scenarios):
            found.append(Outcome(len(rows), floors.constant(self.task, self.labels[rows]) if len(rows) else {}))
        return found

    def conditions(self, predict: Predict) -> dict[str, Outcome]:
        """The seven conditions at p = 0."""
        return dict(zip(CONDITION_SCENARIOS, self.outcomes(predict, list(CONDITION_SCENARIOS.values())), strict=True))

    def evaluate(self, predict: Predict, seed: int) -> SeedEvaluation:
        """Everything that `results.json` needs of one trained model."""
        sweep = [Scenario((True, True, True), p, index) for index, p in enumerate(self.block.sweep)]
        outcomes = self.outcomes(predict, sweep)
        return SeedEvaluation(
            seed=seed,
            conditions=self.conditions(predict),
            sweep=[(s.p, outcome.metrics) for s, outcome in zip(sweep, outcomes, strict=True)],
            sweep_samples=outcomes[0].samples if outcomes else 0,
        )


def mean_over_conditions(conditions: dict[str, Outcome], key: str) -> float:
    """The mean of a metric over the conditions that have a value for it: what checkpoints are selected by.

    NaN where none has, for example F1 non0 on a split whose scores are all zero.
    """
    values = [outcome.metrics[key] for outcome in conditions.values() if outcome.samples]
    known = [value for value in values if not np.isnan(value)]
    return float(np.mean(known)) if known else float("nan")
