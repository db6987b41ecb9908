"""The protocol: who is evaluated under which condition, and that batches do not matter."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastmmkd.blocks import EvalBlock
from fastmmkd.data import store
from fastmmkd.data.batches import ResidentSplit
from fastmmkd.data.dataset import Dataset
from fastmmkd.errors import UserError
from fastmmkd.evaluation import metrics
from fastmmkd.evaluation.protocol import CONDITION_SCENARIOS, Evaluator, Scenario, mean_over_conditions
from fastmmkd.evaluation.results import Outcome
from fastmmkd.modalities import CONDITIONS, MODALITIES
from fastmmkd.tasks import Task
from tests.handmade import config_for_data

REGRESSION = Task("regression")
ALL = (True, True, True)


class Counting:
    """Predicts the mean of every feature that is left, and remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, features: list[torch.Tensor], masks: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        assert not torch.is_grad_enabled()
        self.batches.append(features[0].shape[1])
        joint = torch.stack([x.double().sum((2, 3)) / 10 for x in features], dim=-1)
        return joint.sum(-1, keepdim=True), joint


@pytest.fixture(scope="module")
def natural(tiny_dataset: Callable[..., Dataset]) -> Dataset:
    """Test samples 0 to 4 lack language, 3 to 7 lack audio; all have visual."""
    dataset = tiny_dataset()
    split = dataset.splits["test"]
    for m, rows in ((0, range(5)), (1, range(3, 8))):
        split.present[rows, m] = False
        split.lengths[rows, m] = 0
        split.features[MODALITIES[m]][rows] = 0
    return dataset


def evaluator(dataset: Dataset, task: Task = REGRESSION, **block: Any) -> Evaluator:
    split = dataset.splits["test"]
    normalisation = store.normalisation(dataset.splits["train"])
    resident = ResidentSplit(split, normalisation, config_for_data(task.name), torch.device("cpu"), torch.float32)
    return Evaluator(resident, split.labels, split.present, task, EvalBlock(**block))


def test_a_condition_asks_the_samples_that_have_what_it_keeps(natural: Dataset) -> None:
    found = evaluator(natural)
    assert found.rows(Scenario((False, False, True))).tolist() == list(range(14))
    assert found.rows(Scenario((True, False, False))).tolist() == list(range(5, 14))
    assert found.rows(Scenario((False, True, True))).tolist() == [0, 1, 2, *range(8, 14)]
    assert found.rows(Scenario((True, True, False))).tolist() == list(range(8, 14))
    samples = {name: outcome.samples for name, outcome in found.conditions(Counting()).items()}
    assert samples == {"l": 9, "a": 9, "v": 14, "la": 6, "lv": 9, "av": 9, "lav": 6}


def test_an_outcome_is_the_metrics_of_the_predictions(natural: Dataset) -> None:
    found = evaluator(natural)
    rows = found.rows(Scenario((True, False, True)))
    x = [found.resident.features[m][rows].double().sum((1, 2)).numpy() / 10 for m in (0, 2)]
    judged = REGRESSION, natural.splits["test"].labels[rows], x[0] + x[1]
    expected = metrics.compute(*judged) | {"loss": metrics.loss(*judged)}
    outcome = found.conditions(Counting())["lv"]
    assert outcome.metrics == pytest.approx(expected, rel=1e-6, nan_ok=True)
    predictions, joint = found.run(Counting(), Scenario((True, False, True)), rows)
    assert predictions.dtype == np.float64
    np.testing.assert_allclose(joint, np.stack([x[0], 0 * x[0], x[1]], axis=1), rtol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 5, 9, 1000])
@pytest.mark.parametrize("ratio", ["independent", "exact"])
def test_batches_do_not_matter(natural: Dataset, batch_size: int, ratio: str) -> None:
    reference = evaluator(natural, ratio=ratio, batch_size=14).evaluate(Counting(), seed=1)
    counting = Counting()
    evaluation = evaluator(natural, ratio=ratio, batch_size=batch_size).evaluate(counting, seed=1)
    assert max(counting.batches) == min(batch_size, 14)
    for condition in CONDITIONS:
        assert evaluation.conditions[condition] == reference.conditions[condition]
    assert evaluation.sweep == reference.sweep


@pytest.mark.parametrize("batch_size", [1, 9, 1000])
def test_several_models_in_one_pass_are_each_its_own(natural: Dataset, batch_size: int) -> None:
    """They share the batch size, and a scenario without samples is one for all."""
    found, counting, scenarios = (
        evaluator(natural, batch_size=batch_size),
        Counting(),
        list(CONDITION_SCENARIOS.values()),
    )
    found.present = found.present & [True, True, False]

    def pair(features: list[torch.Tensor], masks: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        logits, joint = counting(features, masks)
        return torch.cat((logits, 2 * logits + 1)), torch.cat((joint, joint))

    def second(features: list[torch.Tensor], masks: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        logits, joint = Counting()(features, masks)
        return 2 * logits + 1, joint

    of_models = found.model_outcomes(pair, 2, scenarios)
    assert [[one for one, _ in of_models], [two for _, two in of_models]] == [
        found.outcomes(Counting(), scenarios),
        found.outcomes(second, scenarios),
    ]
    assert max(counting.batches) == max(1, min(batch_size // 2, 9))


def test_the_rows_asked_for_do_not_change_each_others_masks(natural: Dataset) -> None:
    """The masks of a sample are its own: another subset or order gives it the same prediction."""
    found, scenario = evaluator(natural), Scenario(ALL, p=0.5, index=3)
    everything, _ = found.run(Counting(), scenario, np.arange(14))
    some, _ = found.run(Counting(), scenario, np.array([11, 2, 7]))
    np.testing.assert_array_equal(some, everything[[11, 2, 7]])


def test_the_sweep_is_on_complete_samples_and_draws_anew_at_every_ratio(natural: Dataset) -> None:
    found = evaluator(natural, sweep=(0.0, 0.5, 0.5, 1.0))
    evaluation = found.evaluate(Counting(), seed=9)
    assert evaluation.seed == 9
    assert evaluation.sweep_samples == 6
    assert [p for p, _ in evaluation.sweep] == [0.0, 0.5, 0.5, 1.0]
    assert evaluation.sweep[0][1] == evaluation.conditions["lav"].metrics
    assert evaluation.sweep[1][1]["mae"] != evaluation.sweep[2][1]["mae"]
    # Nothing is left at p = 1: the prediction is 0 for all.
    labels = natural.splits["test"].labels[found.rows(Scenario(ALL))]
    assert evaluation.sweep[3][1]["mae"] == pytest.approx(np.abs(labels).mean())


def test_the_evaluation_seed_changes_the_sweep_not_the_conditions(natural: Dataset) -> None:
    a, b = (evaluator(natural, seed=s, sweep=(0.5,)).evaluate(Counting(), seed=1) for s in (1, 2))
    assert a.conditions == b.conditions
    assert a.sweep != b.sweep


def test_a_condition_that_no_sample_can_meet_has_no_value(natural: Dataset) -> None:
    found = evaluator(natural)
    found.present = found.present.copy()
    found.present[:, 0] = False
    outcomes = found.conditions(Counting())
    assert outcomes["l"] == Outcome(0, {})
    assert outcomes["lav"] == Outcome(0, {})
    assert outcomes["v"].samples == 14
    evaluation = found.evaluate(Counting(), seed=1)
    assert evaluation.sweep_samples == 0
    assert all(not values for _, values in evaluation.sweep)


def test_a_diverged_model_is_one_line(natural: Dataset) -> None:
    def diverged(features: list[torch.Tensor], masks: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        logits, joint = Counting()(features, masks)
        return logits * math.nan, joint

    with pytest.raises(UserError, match="9 of 9 predictions are NaN or infinite"):
        evaluator(natural).conditions(diverged)


def test_selection_averages_what_has_a_value() -> None:
    conditions = {
        "l": Outcome(3, {"f1_non0": 60.0}),
        "a": Outcome(0, {}),
        "v": Outcome(2, {"f1_non0": math.nan}),
        "lav": Outcome(3, {"f1_non0": 80.0}),
    }
    assert mean_over_conditions(conditions, "f1_non0") == 70.0
    assert math.isnan(mean_over_conditions({"v": conditions["v"], "a": conditions["a"]}, "f1_non0"))
