import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from fastmmkd.errors import UserError
from fastmmkd.evaluation import metrics
from fastmmkd.tasks import TASKS, Task

REGRESSION = Task("regression")


def test_regression_by_hand():
    y = np.array([-3.0, -1.0, 0.0, 0.5, 2.0, 2.5])
    p = np.array([-2.5, 0.5, 0.2, -0.5, 1.0, 4.0])
    scores = metrics.compute(REGRESSION, y, p)

    assert scores["mae"] == pytest.approx((0.5 + 1.5 + 0.2 + 1.0 + 1.0 + 1.5) / 6)
    assert scores["corr"] == pytest.approx(np.corrcoef(y, p)[0, 1])
    # Rounded half to even: labels -3 -1 0 0 2 2 (2.5 -> 2), predictions -2 0 0 0 1 3 (4 is clipped).
    assert scores["acc7"] == pytest.approx(100 * 2 / 6)
    # Clipped to +-2: labels -2 -1 0 0 2 2, predictions -2 0 0 0 1 2.
    assert scores["acc5"] == pytest.approx(100 * 4 / 6)
    # y >= 0: labels F F T T T T, predictions F T T F T T.
    assert scores["acc2_has0"] == pytest.approx(100 * 4 / 6)
    # Negative: tp 1, fp 1, fn 1 -> 1/2, weight 2; non-negative: tp 3, fp 1, fn 1 -> 3/4, weight 4.
    assert scores["f1_has0"] == pytest.approx(100 * (2 * 0.5 + 4 * 0.75) / 6)
    # Without the zero: labels F F T T T, predictions F T F T T.
    assert scores["acc2_non0"] == pytest.approx(100 * 3 / 5)
    # Negative: tp 1, fp 1, fn 1 -> 1/2, weight 2; positive: tp 2, fp 1, fn 1 -> 2/3, weight 3.
    assert scores["f1_non0"] == pytest.approx(100 * (2 * 0.5 + 3 * 2 / 3) / 5)


class TestSims:
    """CH-SIMS, as MMSA computes it: both are clipped to +-1, and an edge belongs to the class below it."""

    Y = np.array([-1.0, -0.8, -0.6, -0.2, 0.0, 0.1, 0.2, 0.4, 0.8, 1.0])
    P = np.array([-1.4, -0.5, -0.7, 0.1, -0.3, 0.0, 0.05, 0.7, 0.71, 3.0])

    def test_by_hand(self) -> None:
        scores = metrics.compute(Task("regression-sims"), self.Y, self.P)
        # <= 0 against > 0: labels NNNNNPPPPP, predictions NNNPNNPPPP.
        assert scores["acc2_sims"] == pytest.approx(80)
        # Either class: tp 4, fp 1, fn 1 -> 4/5, weight 5.
        assert scores["f1_sims"] == pytest.approx(80)
        # Ends at -0.1 and 0.1: labels NNNN00PPPP, predictions NNN0N00PPP.
        assert scores["acc3_sims"] == pytest.approx(70)
        # Ends at +-0.7 and +-0.1: labels 0 0 1 1 2 2 3 3 4 4, predictions 0 1 0 2 1 2 2 3 4 4.
        assert scores["acc5_sims"] == pytest.approx(50)
        # After clipping -1.4 to -1 and 3 to 1.
        assert scores["mae_sims"] == pytest.approx((0 + 0.3 + 0.1 + 0.3 + 0.3 + 0.1 + 0.15 + 0.3 + 0.09 + 0) / 10)
        assert scores["corr_sims"] == pytest.approx(np.corrcoef(self.Y, self.P.clip(-1, 1))[0, 1])
        assert tuple(scores) == ("f1_sims", "mae_sims", "corr_sims", "acc2_sims", "acc3_sims", "acc5_sims")

    def test_f1_weighs_by_the_true_classes(self) -> None:
        scores = metrics.compute(Task("regression-sims"), np.array([0.2, 0.4, 0.6, -0.2]), np.full(4, -0.5))
        assert scores["f1_sims"] == pytest.approx(10.0)

    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.tuples(st.floats(-1, 1, width=32), st.floats(-2, 2, width=32)), min_size=2, max_size=20))
    def test_against_loops(self, pairs: list[tuple[float, float]]) -> None:
        """Class by class: which of the half-open intervals a clipped score is in."""

        def found(score: float, edges: tuple[float, ...]) -> int:
            clipped = min(max(score, -1.0), 1.0)
            return sum(clipped > float(np.float32(edge)) for edge in edges)

        y, p = (np.array(column) for column in zip(*pairs, strict=True))
        scores = metrics.compute(Task("regression-sims"), y, p)
        for classes, edges in ((2, (0.0,)), (3, (-0.1, 0.1)), (5, (-0.7, -0.1, 0.1, 0.7))):
            same = [found(a, edges) == found(b, edges) for a, b in pairs]
            assert scores[f"acc{classes}_sims"] == pytest.approx(100 * sum(same) / len(same))

    def test_labels_of_single_precision_lie_on_their_edges(self) -> None:
        """0.1 as a store holds it is more than 0.1 in double precision."""
        scores = metrics.compute(Task("regression-sims"), np.array([np.float32(0.1)], np.float64), np.array([0.0]))
        assert scores["acc3_sims"] == 100


def test_f1_weighs_by_the_true_classes():
    """Three of four are positive, all are called negative. Weighted by the *predicted* classes it would be 40."""
    scores = metrics.compute(REGRESSION, np.array([1.0, 1, 1, -1]), np.array([-1.0, -1, -1, -1]))
    # Negative: tp 1, fp 3 -> 2/5, weight 1; positive: 0, weight 3.
    assert scores["f1_non0"] == pytest.approx(10.0)
    assert scores["f1_has0"] == pytest.approx(10.0)


def test_a_predicted_zero_is_negative_without_zeros_and_nonnegative_with():
    scores = metrics.compute(REGRESSION, np.array([1.0, -1.0]), np.zeros(2))
    assert scores["acc2_non0"] == 50.0
    scores = metrics.compute(REGRESSION, np.array([1.0, 2.0]), np.zeros(2))
    assert (scores["acc2_non0"], scores["acc2_has0"]) == (0.0, 100.0)


@pytest.mark.parametrize(("score", "bin7"), [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (3.4, 3), (-7, -3)])
def test_acc7_rounds_half_to_even_and_clips(score, bin7):
    assert metrics.compute(REGRESSION, np.array([score]), np.array([float(bin7)]))["acc7"] == 100.0


def test_constant_predictions_have_no_correlation_but_are_no_error():
    assert metrics.compute(REGRESSION, np.array([1.0, 2.0, -1.0]), np.full(3, 0.1))["corr"] == 0.0
    assert metrics.compute(REGRESSION, np.full(3, 0.1), np.array([1.0, 2.0, -1.0]))["corr"] == 0.0
    assert math.isnan(metrics.compute(REGRESSION, np.array([1.0]), np.array([1.0]))["corr"])


@pytest.mark.parametrize("name", TASKS)
def test_no_samples_give_nan_for_every_metric(name):
    task = Task(name)
    labels = np.zeros((0,) if task.has_scores else (0, 4))
    width = {"regression": (0,), "regression-sims": (0,), "emotions-binary": (0, 4)}.get(name, (0, task.outputs))
    scores = metrics.compute(task, labels, np.zeros(width))
    assert tuple(scores) == metrics.keys(task)
    assert all(math.isnan(v) for v in scores.values())


def test_only_neutral_labels_leave_nothing_for_non0():
    scores = metrics.compute(REGRESSION, np.zeros(3), np.array([0.1, -0.1, 0.3]))
    assert math.isnan(scores["f1_non0"])
    assert math.isnan(scores["acc2_non0"])
    assert scores["acc2_has0"] == pytest.approx(200 / 3)


def test_two_classes_are_read_as_signs():
    y = np.array([-1.0, 0.0, 2.0, 2.0])
    p = np.array([[0.7, 0.3], [0.2, 0.8], [0.6, 0.4], [0.1, 0.9]])
    scores = metrics.compute(Task("classification-2"), y, p)
    assert set(scores) == {"f1_non0", "acc2_non0", "f1_has0", "acc2_has0"}
    assert scores["acc2_has0"] == pytest.approx(75.0)
    assert scores["acc2_non0"] == pytest.approx(100 * 2 / 3)


@pytest.mark.parametrize("name", ["classification-2", "classification-3", "classification-7"])
def test_a_tie_is_nonnegative_but_not_positive(name):
    task = Task(name)
    p = np.zeros((2, task.outputs))
    p[:, [0, -1]] = 0.5
    scores = metrics.compute(task, np.array([1.0, -1.0]), p)
    assert scores["f1_has0"] == scores["f1_non0"] == pytest.approx(100 / 3)
    assert metrics.compute(task, np.array([1.0, 2.0]), p)["acc2_has0"] == 100.0
    assert metrics.compute(task, np.array([1.0, 2.0]), p)["acc2_non0"] == 0.0


def test_three_classes_take_the_sign_from_the_larger_mass_not_from_the_argmax():
    y = np.array([1.0, -1.0, 0.0])
    p = np.array([[0.2, 0.45, 0.35], [0.45, 0.2, 0.35], [0.3, 0.4, 0.3]])
    scores = metrics.compute(Task("classification-3"), y, p)
    assert scores["acc2_non0"] == 100.0
    # The second has P(>= 0) = 0.55 > P(< 0) = 0.45.
    assert scores["acc2_has0"] == pytest.approx(100 * 2 / 3)
    # Its own classes by argmax: zero, negative, zero.
    assert scores["acc3"] == pytest.approx(100 * 2 / 3)


def test_seven_classes():
    y = np.array([2.6, -0.4, -3.0])
    p = np.zeros((3, 7))
    p[0, 6] = 1.0
    p[1, [2, 3, 4]] = [0.3, 0.5, 0.2]
    p[2, [0, 5, 6]] = [0.4, 0.3, 0.3]
    scores = metrics.compute(Task("classification-7"), y, p)
    assert scores["acc7"] == 100.0
    assert scores["acc2_non0"] == pytest.approx(100 * 2 / 3)
    assert scores["acc2_has0"] == pytest.approx(100 * 1 / 3)


def test_four_binary_emotions_by_hand():
    y = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]], dtype=np.float32)
    p = np.array([[0.9, 0.1, 0.2, 0.0], [0.4, 0.6, 0.5, 0.1], [0.1, 0.2, 0.8, 0.3], [0.2, 0.9, 0.1, 0.7]])
    scores = metrics.compute(Task("emotions-binary"), y, p)
    assert [scores[f"acc_{e}"] for e in ("happy", "sad", "angry", "neutral")] == [75.0, 75.0, 100.0, 100.0]
    # Happy: holds tp 1, fn 1 -> 2/3, weight 2; not tp 2, fp 1 -> 4/5, weight 2.
    assert scores["f1_happy"] == pytest.approx(100 * (2 / 3 + 4 / 5) / 2)
    # Sad: holds tp 1, fp 1 -> 2/3, weight 1; not tp 2, fn 1 -> 4/5, weight 3.
    assert scores["f1_sad"] == pytest.approx(100 * (2 / 3 + 3 * 4 / 5) / 4)
    assert scores["f1"] == pytest.approx((scores["f1_happy"] + scores["f1_sad"] + 200) / 4)
    assert scores["acc"] == pytest.approx(350 / 4)


def test_single_label_emotions_by_hand():
    y = np.eye(4)[[0, 0, 1, 3]]
    p = np.array([[0.4, 0.3, 0.2, 0.1], [0.2, 0.5, 0.2, 0.1], [0.1, 0.9, 0.0, 0.0], [0.3, 0.3, 0.3, 0.1]])
    scores = metrics.compute(Task("emotions-4way"), y, p)
    # Predicted 0, 1, 1, 0: class 0 F1 1/2 (weight 2), class 1 2/3 (1), class 3 0 (1).
    assert scores["acc_4way"] == 50.0
    assert scores["f1_4way"] == pytest.approx(100 * (2 * 0.5 + 2 / 3) / 4)
    assert scores["acc_sad_ovr"] == 75.0
    assert scores["f1_angry_ovr"] == 100.0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_diverged_model_is_refused_not_read_as_negative(bad):
    with pytest.raises(UserError, match="1 of 3 predictions are NaN or infinite"):
        metrics.compute(REGRESSION, np.ones(3), np.array([1.0, bad, 1.0]))
    with pytest.raises(UserError, match="1 of 2 predictions"):
        metrics.compute(Task("classification-2"), np.ones(2), np.array([[0.5, bad], [1.0, 0.0]]))


def test_shapes_are_checked_with_their_values():
    with pytest.raises(ValueError, match=r"predictions have shape \(3, 2\), task regression needs \(3,\)"):
        metrics.compute(REGRESSION, np.ones(3), np.ones((3, 2)))
    with pytest.raises(ValueError, match=r"labels have shape \(3,\), task emotions-4way needs \(3, 4\)"):
        metrics.compute(Task("emotions-4way"), np.ones(3), np.ones((3, 4)))


def test_headline_metrics_and_their_direction():
    assert [metrics.primary(Task(t)) for t in ("regression", "classification-7")] == ["f1_non0", "f1_non0"]
    assert metrics.primary(Task("emotions-binary")) == "f1"
    assert metrics.primary(Task("emotions-4way")) == "f1_4way"
    assert not metrics.higher_is_better("mae")
    assert all(metrics.higher_is_better(k) for t in TASKS for k in metrics.keys(Task(t)) if metrics.is_percent(k))
    assert metrics.title("acc_happy_ovr") == "Accuracy happy vs rest (%)"
    assert metrics.title("f1_sad") == "F1 sad (%)"


scores = st.integers(1, 40).flatmap(
    lambda n: st.tuples(
        *[hnp.arrays(np.float64, n, elements=st.integers(-12, 12).map(lambda k: k / 4)) for _ in range(2)],
        st.permutations(range(n)),
    )
)


@settings(deadline=None, max_examples=25)
@given(scores)
def test_the_order_of_samples_does_not_matter(case):
    y, p, order = case
    shuffled = metrics.compute(REGRESSION, y[list(order)], p[list(order)])
    assert shuffled == pytest.approx(metrics.compute(REGRESSION, y, p), nan_ok=True, abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(scores)
def test_metrics_stay_in_their_range_and_perfect_is_perfect(case):
    y, p, _ = case
    for key, value in metrics.compute(REGRESSION, y, p).items():
        low, high = {"mae": (0, 6), "corr": (-1, 1)}.get(key, (0, 100))
        assert math.isnan(value) or low <= value <= high
    perfect = metrics.compute(REGRESSION, y, y)
    assert perfect["mae"] == 0
    assert all(math.isnan(v) or v == pytest.approx(100) for k, v in perfect.items() if metrics.is_percent(k))


@settings(deadline=None, max_examples=25)
@given(scores)
def test_mirrored_scores_have_the_same_non0_metrics(case):
    y, p, _ = case
    p = np.where(p == 0, 0.5, p)  # a predicted 0 is not symmetric: it counts as "not positive"
    ours, mirrored = metrics.compute(REGRESSION, y, p), metrics.compute(REGRESSION, -y, -p)
    for key in ("f1_non0", "acc2_non0", "mae", "corr", "acc7", "acc5"):
        assert mirrored[key] == pytest.approx(ours[key], nan_ok=True, abs=1e-9)


@settings(deadline=None, max_examples=25)
@given(scores)
def test_hard_class_probabilities_give_the_same_signs_as_scores(case):
    y, p, _ = case
    from_classes = metrics.compute(Task("classification-3"), y, np.eye(3)[np.sign(p).astype(int) + 1])
    from_scores = metrics.compute(REGRESSION, y, p)
    for key in ("f1_non0", "acc2_non0", "f1_has0", "acc2_has0"):
        assert from_classes[key] == pytest.approx(from_scores[key], nan_ok=True)


class TestLoss:
    """What classifiers' checkpoints are chosen by."""

    def test_by_hand(self) -> None:
        y = np.array([-1.0, 0.0, 2.0])
        assert metrics.loss(REGRESSION, y, np.array([0.0, 0.5, 2.0])) == pytest.approx((1 + 0.25) / 3)
        two = np.array([[0.8, 0.2], [0.5, 0.5], [0.9, 0.1]])
        expected = -(math.log(0.8) + math.log(0.5) + math.log(0.1)) / 3
        assert metrics.loss(Task("classification-2"), y, two) == pytest.approx(expected)
        emotions = np.array([[1.0, 0.0, 0.0, 1.0]])
        expected = -sum(map(math.log, (0.6, 0.7, 0.9, 0.2))) / 4
        assert metrics.loss(Task("emotions-binary"), emotions, np.array([[0.6, 0.3, 0.1, 0.2]])) == pytest.approx(
            expected
        )

    @pytest.mark.parametrize("name", TASKS)
    def test_it_is_the_training_loss(self, name: str) -> None:
        task = Task(name)
        generator = torch.Generator().manual_seed(0)
        logits = torch.randn(20, task.outputs, dtype=torch.float64, generator=generator)
        rng = np.random.default_rng(0)
        labels = rng.integers(-3, 4, 20).astype(np.float32)
        if task.label_kind == "emotions":
            labels = np.eye(4, dtype=np.float32)[rng.integers(0, 4, 20)]
        expected = task.loss(logits[None], torch.from_numpy(task.targets(labels))[None]).item()
        assert metrics.loss(task, labels, task.predictions(logits)) == pytest.approx(expected)

    def test_certain_and_wrong_is_finite_and_nothing_is_nan(self) -> None:
        loss = metrics.loss(Task("classification-2"), np.array([1.0]), np.array([[1.0, 0.0]]))
        assert 100 < loss < math.inf
        assert math.isnan(metrics.loss(REGRESSION, np.zeros(0), np.zeros(0)))

    def test_it_can_be_selected_by_and_is_better_when_lower(self) -> None:
        for name in TASKS:
            assert metrics.selectable(Task(name)) == (*metrics.keys(Task(name)), "loss")
        assert not metrics.higher_is_better("loss")


class TestAMetricIsOneEntry:
    def test_keys_and_titles_are_its_own(self) -> None:
        entries = {metric.key: metric for of_task in metrics.METRICS.values() for metric in of_task}
        assert len({metric.title for metric in entries.values()}) == len(entries)
        for of_task in metrics.METRICS.values():
            keys = [metric.key for metric in of_task]
            assert len(set(keys)) == len(keys)
            assert all(entries[metric.key] is metric for metric in of_task)  # tasks share it, none has a variant

    @pytest.mark.parametrize("name", TASKS)
    def test_what_is_true_of_the_labels_is_the_best_decision(self, name: str) -> None:
        rng = np.random.default_rng(0)
        scores = rng.integers(-9, 10, 50) / 3
        emotions = np.eye(4)[rng.integers(0, 4, 50)]
        labels = scores if Task(name).has_scores else emotions
        for metric in metrics.METRICS[name]:
            best = 0.0 if not metric.higher_is_better else 100.0 if metric.percent else 1.0
            assert metric.score(metric.truth(labels), metric.truth(labels)) == pytest.approx(best)
            assert math.isnan(metric.score(metric.truth(labels[:0]), metric.truth(labels[:0])))


class TestConfusion:
    def test_scores_by_hand(self) -> None:
        """Rounded half to even and clipped: labels -3 0 0 2 3, predictions -2 0 1 2 3."""
        y, p = np.array([-3.0, 0.5, -0.2, 1.5, 3.0]), np.array([-2.5, 0.3, 1.2, 2.5, 9.0])
        counts = np.zeros((7, 7), dtype=int)
        for true, decided in ((-3, -2), (0, 0), (0, 1), (2, 2), (3, 3)):
            counts[true + 3, decided + 3] += 1
        assert metrics.confusion(REGRESSION, y, p) == {"acc7": counts.tolist()}
        assert metrics.confused_classes("acc7") == ("-3", "-2", "-1", "0", "+1", "+2", "+3")

    def test_emotions_by_hand(self) -> None:
        y = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0]])
        p = np.array([[0.9, 0.1, 0.2, 0.0], [0.4, 0.6, 0.5, 0.1], [0.7, 0.2, 0.8, 0.3]])
        found = metrics.confusion(Task("emotions-binary"), y, p)
        assert found["acc_happy"] == [[0, 1], [1, 1]]  # rows: it does not hold, it does
        assert found["acc_neutral"] == [[3, 0], [0, 0]]
        assert metrics.confused_classes("acc_sad") == ("other", "sad")

    @pytest.mark.parametrize("name", TASKS)
    def test_its_diagonal_is_the_accuracy(self, name: str) -> None:
        task, rng = Task(name), np.random.default_rng(0)
        labels = rng.integers(-9, 10, 60) / 3 if task.has_scores else np.eye(4)[rng.integers(0, 4, 60)]
        logits = torch.from_numpy(rng.normal(size=(60, task.outputs)))
        predictions = task.predictions(logits)
        values, found = metrics.compute(task, labels, predictions), metrics.confusion(task, labels, predictions)
        assert tuple(found) == metrics.CONFUSED[name]
        for key, rows in found.items():
            counts = np.array(rows)
            assert counts.shape == (len(metrics.confused_classes(key)),) * 2
            assert counts.sum() == 60
            assert 100 * np.trace(counts) / 60 == pytest.approx(values[key])

    @pytest.mark.parametrize("name", TASKS)
    def test_no_samples(self, name: str) -> None:
        task = Task(name)
        labels = np.zeros((0,) if task.has_scores else (0, 4))
        predictions = task.predictions(torch.zeros(0, task.outputs))
        assert all(not np.any(counts) for counts in metrics.confusion(task, labels, predictions).values())


def test_only_non0_uses_fewer_samples():
    labels = np.array([0.0, -1.0, 2.0, 0.0, 1 / 3])
    used = metrics.used(REGRESSION, labels)
    assert tuple(used) == metrics.keys(REGRESSION)
    assert {key for key, count in used.items() if count == 3} == {"f1_non0", "acc2_non0"}
    assert set(used.values()) == {3, 5}
    emotions = np.eye(4)[[0, 1, 1]]
    for name in ("emotions-binary", "emotions-4way"):
        assert set(metrics.used(Task(name), emotions).values()) == {3}
