"""The protocol: who is evaluated under which condition, and that batches do not matter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from fastmmkd.blocks import EvalBlock
from fastmmkd.data.batches import Inputs, Kept, ResidentSplit
from fastmmkd.data.dataset import Dataset
from fastmmkd.data.integrity import normalisation as normalisation_of
from fastmmkd.errors import UserError
from fastmmkd.evaluation import metrics
from fastmmkd.evaluation.protocol import CONDITION_SCENARIOS, Evaluator, Predictions, Scenario, mean_over_conditions
from fastmmkd.evaluation.results import Outcome
from fastmmkd.modalities import CONDITIONS
from fastmmkd.ops.layout import unpack
from fastmmkd.tasks import Task
from tests.handmade import config_for_data, lacking

REGRESSION = Task("regression")
ALL = (True, True, True)


class Counting:
    """Predicts the mean of every feature that is left, and remembers the batches."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def predict(self, inputs: Inputs) -> Predictions:
        assert not torch.is_grad_enabled()
        self.batches.append(inputs.layouts[0].batch)
        of_modalities = zip(inputs.features, inputs.layouts, strict=True)
        joint = torch.stack([unpack(x.double(), layout).sum((2, 3)) / 10 for x, layout in of_modalities], dim=-1)
        return joint.sum(-1, keepdim=True), joint

    def predict_subsets(self, inputs: Inputs, subsets: Sequence[Kept]) -> list[Predictions]:
        return [self.predict(inputs.only(kept)) for kept in subsets]


@pytest.fixture(scope="module")
def natural(tiny_dataset: Callable[..., Dataset]) -> Dataset:
    """Test samples 0 to 4 lack language, 3 to 7 lack audio; all have visual."""
    dataset = tiny_dataset()
    split = lacking(dataset.splits["test"], "language", slice(5))
    dataset.splits["test"] = lacking(split, "audio", slice(3, 8))
    return dataset


def evaluator(dataset: Dataset, task: Task = REGRESSION, **block: Any) -> Evaluator:
    split = dataset.splits["test"]
    normalisation = normalisation_of(dataset.splits["train"])
    resident = ResidentSplit(split, normalisation, config_for_data(task.name), torch.device("cpu"), torch.float32)
    return Evaluator(resident, split.labels, split.present, task, EvalBlock(**block))


def conditions(of: Evaluator, network: Counting) -> dict[str, Outcome]:
    """The seven conditions at p = 0."""
    return dict(zip(CONDITION_SCENARIOS, of.outcomes(network, list(CONDITION_SCENARIOS.values())), strict=True))


def test_a_condition_asks_the_samples_that_have_what_it_keeps(natural: Dataset) -> None:
    judge = evaluator(natural)
    assert judge.rows(Scenario((False, False, True))).tolist() == list(range(14))
    assert judge.rows(Scenario((True, False, False))).tolist() == list(range(5, 14))
    assert judge.rows(Scenario((False, True, True))).tolist() == [0, 1, 2, *range(8, 14)]
    assert judge.rows(Scenario((True, True, False))).tolist() == list(range(8, 14))
    samples = {name: outcome.samples for name, outcome in conditions(judge, Counting()).items()}
    assert samples == {"l": 9, "a": 9, "v": 14, "la": 6, "lv": 9, "av": 9, "lav": 6}


def test_an_outcome_is_the_metrics_of_the_predictions(natural: Dataset) -> None:
    judge = evaluator(natural)
    rows = judge.rows(Scenario((True, False, True)))
    sums = [
        [x[start:end].double().sum().item() / 10 for start, end in pairwise(starts.tolist())]
        for x, starts in zip(judge.resident.features, judge.resident.starts, strict=True)
    ]
    x = [np.array(sums[m])[rows] for m in (0, 2)]
    judged = REGRESSION, natural.splits["test"].labels[rows], x[0] + x[1]
    expected = metrics.compute(*judged) | {"loss": metrics.loss(*judged)}
    outcome = conditions(judge, Counting())["lv"]
    assert outcome.metrics == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert outcome.confusion == metrics.confusion(*judged)
    predictions, joint = judge.run(Counting(), Scenario((True, False, True)), rows)
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

    class Second(Counting):
        def predict(self, inputs: Inputs) -> Predictions:
            logits, joint = super().predict(inputs)
            return 2 * logits + 1, joint

    class Pair(Counting):
        def predict(self, inputs: Inputs) -> Predictions:
            logits, joint = super().predict(inputs)
            return torch.cat((logits, 2 * logits + 1)), torch.cat((joint, joint))

    judge, pair, scenarios = evaluator(natural, batch_size=batch_size), Pair(), list(CONDITION_SCENARIOS.values())
    judge.present = judge.present & [True, True, False]
    of_models = judge.model_outcomes(pair, 2, scenarios)
    assert [[one for one, _ in of_models], [two for _, two in of_models]] == [
        judge.outcomes(Counting(), scenarios),
        judge.outcomes(Second(), scenarios),
    ]
    assert max(pair.batches) == max(1, min(batch_size // 2, 12))  # samples with language or audio


def test_the_rows_asked_for_do_not_change_each_others_masks(natural: Dataset) -> None:
    """The masks of a sample are its own: another subset or order gives it the same prediction."""
    judge, scenario = evaluator(natural), Scenario(ALL, p=0.5, index=3)
    everything, _ = judge.run(Counting(), scenario, np.arange(14))
    some, _ = judge.run(Counting(), scenario, np.array([11, 2, 7]))
    np.testing.assert_array_equal(some, everything[[11, 2, 7]])


def test_the_sweep_is_on_complete_samples_and_draws_anew_at_every_ratio(natural: Dataset) -> None:
    nearly = 0.5 + 1e-9  # the same draws would drop the same frames
    judge = evaluator(natural, sweep=(0.0, 0.5, nearly, 1.0))
    evaluation = judge.evaluate(Counting(), seed=9)
    assert evaluation.seed == 9
    assert evaluation.sweep_samples == 6
    assert [p for p, _ in evaluation.sweep] == [0.0, 0.5, nearly, 1.0]
    assert evaluation.sweep[0][1] == evaluation.conditions["lav"].metrics
    assert evaluation.sweep[1][1]["mae"] != evaluation.sweep[2][1]["mae"]
    # Nothing is left at p = 1: the prediction is 0 for all.
    labels = natural.splits["test"].labels[judge.rows(Scenario(ALL))]
    assert evaluation.sweep[3][1]["mae"] == pytest.approx(np.abs(labels).mean())


def test_the_evaluation_seed_changes_the_sweep_not_the_conditions(natural: Dataset) -> None:
    a, b = (evaluator(natural, seed=s, sweep=(0.5,)).evaluate(Counting(), seed=1) for s in (1, 2))
    assert a.conditions == b.conditions
    assert a.sweep != b.sweep


def test_a_condition_that_no_sample_can_meet_has_no_value(natural: Dataset) -> None:
    judge = evaluator(natural)
    judge.present = judge.present.copy()
    judge.present[:, 0] = False
    outcomes = conditions(judge, Counting())
    assert outcomes["l"] == Outcome(0, {})
    assert outcomes["lav"] == Outcome(0, {})
    assert outcomes["v"].samples == 14
    evaluation = judge.evaluate(Counting(), seed=1)
    assert evaluation.sweep_samples == 0
    assert all(not values for _, values in evaluation.sweep)


def test_a_diverged_model_is_one_line(natural: Dataset) -> None:
    class Diverged(Counting):
        def predict(self, inputs: Inputs) -> Predictions:
            logits, joint = super().predict(inputs)
            return logits * math.nan, joint

    with pytest.raises(UserError, match="9 of 9 predictions are NaN or infinite"):
        conditions(evaluator(natural), Diverged())


def test_subsets_of_modalities_are_predicted_from_one_batch(natural: Dataset) -> None:
    """Of all samples that any of them is evaluated on; a condition and the sweep's p = 0 are the same prediction."""
    counting = Counting()
    evaluation = evaluator(natural, batch_size=100, sweep=(0.0, 0.5)).evaluate(counting, seed=1)
    assert counting.batches == [14] * len(CONDITIONS) + [6]
    for condition, kept in CONDITION_SCENARIOS.items():
        (alone,) = evaluator(natural).outcomes(Counting(), [kept])
        assert evaluation.conditions[condition] == alone


def test_a_sample_that_lacks_a_modality_takes_part_where_it_is_asked_to(natural: Dataset) -> None:
    judge, scenario = evaluator(natural), Scenario(ALL, incomplete=True)
    (outcome,) = judge.outcomes(Counting(), [scenario])
    assert outcome.samples == 14
    predictions, _ = judge.run(Counting(), scenario, np.arange(14))
    labels = natural.splits["test"].labels
    assert outcome.metrics["mae"] == pytest.approx(np.abs(predictions - labels).mean(), rel=1e-6)


def test_selection_averages_what_has_a_value() -> None:
    conditions = {
        "l": Outcome(3, {"f1_non0": 60.0}),
        "a": Outcome(0, {}),
        "v": Outcome(2, {"f1_non0": math.nan}),
        "lav": Outcome(3, {"f1_non0": 80.0}),
    }
    assert mean_over_conditions(conditions, "f1_non0") == 70.0
    assert math.isnan(mean_over_conditions({"v": conditions["v"], "a": conditions["a"]}, "f1_non0"))
