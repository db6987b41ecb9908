import math

import numpy as np
import pytest

from fastmmkd.evaluation import floors, metrics
from fastmmkd.tasks import TASKS, Task

REGRESSION = Task("regression")


ENOUGH = 20_000
"""Samples, so that what is expected of the ideal also happens."""


def test_always_negative_on_a_test_split_like_mosi():
    """379 negative and 277 positive labels, as in MOSI; training has more positive ones."""
    test = np.repeat([-1.0, 1.0, 0.0], [379, 277, 30])
    train = np.repeat([-1.0, 1.0, 0.0], [552, 679, 53])
    single = floors.trivial(REGRESSION, test, train)
    assert single["always-negative"]["f1_non0"] == pytest.approx(42.3, abs=0.05)
    assert single["always-majority"]["f1_non0"] == pytest.approx(100 * 277 / 656 * (2 * 277 / (656 + 277)))
    assert math.isnan(single["always-negative"]["mae"])
    assert floors.floor(REGRESSION, test, train)["f1_non0"] == single["always-negative"]["f1_non0"]


def test_the_floor_takes_the_best_of_each_metric():
    test = np.array([-2.0, -1.0, 0.5, 2.5])
    train = np.array([0.4, 0.4, 0.4, 2.8])
    floor = floors.floor(REGRESSION, test, train)
    # The mean is 1.0, the median 0.4: absolute errors 3 2 0.5 1.5 and 2.4 1.4 0.1 2.1.
    assert floor["mae"] == pytest.approx(6 / 4)
    assert floor["corr"] == 0.0
    # The most frequent bin in training is 0, as is the third label's (0.5 rounds to even).
    assert floor["acc7"] == 25.0
    assert floor["acc2_has0"] == 50.0


def test_majority_is_taken_per_metric_from_training_labels():
    train = np.array([0.0, 0.0, -1.0, -1.0, -1.0, 2.0, 2.0])
    single = floors.trivial(Task("classification-3"), np.array([0.0, 0.0, -1.0, 2.0]), train)["always-majority"]
    assert single["acc3"] == 25.0  # negative is the most frequent sign
    assert single["acc2_has0"] == 75.0  # but non-negative the more frequent half
    assert single["acc2_non0"] == 50.0  # and negative again where zeros are dropped


def test_constants_are_fitted_to_the_labels_by_hand():
    """Median -1, mean 0.5, the more frequent sign negative; a quarter of one class, three of the other."""
    scores = np.array([-1.0, -1.0, -1.0, 5.0])
    best = floors.constant(REGRESSION, scores)
    assert (best["mae"], best["corr"], best["acc2_non0"]) == (1.5, 0.0, 75.0)
    assert best["loss"] == pytest.approx((3 * 1.5**2 + 4.5**2) / 4)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    for classes in (2, 3, 7):
        assert floors.constant(Task(f"classification-{classes}"), scores)["loss"] == pytest.approx(entropy)
    emotions = np.eye(4)[[0, 0, 0, 1]]
    assert floors.constant(Task("emotions-4way"), emotions)["loss"] == pytest.approx(entropy)
    assert floors.constant(Task("emotions-binary"), emotions)["loss"] == pytest.approx(entropy / 2)


@pytest.mark.parametrize("name", TASKS)
def test_no_constant_prediction_gets_past_them(name):
    task, rng = Task(name), np.random.default_rng(0)
    scores = np.round(rng.normal(0.3, 1.2, 60) * 3) / 3
    labels = scores if task.has_scores else np.eye(4)[rng.choice(4, 60, p=[0.5, 0.2, 0.2, 0.1])]
    best = floors.constant(task, labels)
    for _ in range(30):
        constant = rng.uniform(-3, 3) if task.is_regression else rng.dirichlet(np.ones(task.outputs))
        if name == "emotions-binary":
            constant = rng.uniform(0, 1, 4)
        predictions = np.repeat(np.asarray(constant)[None], 60, axis=0)
        reached = metrics.compute(task, labels, predictions) | {"loss": metrics.loss(task, labels, predictions)}
        for key, value in reached.items():
            assert not metrics.better(key, value, best[key] + (-1e-9 if not metrics.higher_is_better(key) else 1e-9)), (
                key
            )


def test_emotion_floor():
    train = np.array([[1, 0, 0, 0], [1, 0, 0, 0], [0, 1, 0, 0]], dtype=np.float32)
    test = np.array([[1, 0, 0, 0], [0, 0, 0, 1]], dtype=np.float32)
    single = floors.trivial(Task("emotions-binary"), test, train)
    assert single["always-majority"]["acc"] == pytest.approx((50 + 100 + 100 + 50) / 4)
    four_way = floors.floor(Task("emotions-4way"), test, train)
    assert four_way["acc_4way"] == 50.0
    assert four_way["acc_sad_ovr"] == 100.0


@pytest.mark.parametrize("name", TASKS)
def test_floors_have_the_keys_of_the_task_and_cope_with_no_samples(name, make_world):
    task = Task(name)
    world = make_world(task, 50)
    floor = floors.floor(task, world.labels, world.train_labels)
    assert tuple(floor) == metrics.keys(task)
    assert not any(math.isnan(v) for v in floor.values())
    assert all(math.isnan(v) for v in floors.floor(task, world.labels[:0], world.train_labels).values())


def test_a_floor_needs_training_labels():
    with pytest.raises(ValueError, match="at least one training label"):
        floors.floor(REGRESSION, np.ones(3), np.ones(0))


def test_ideal_decisions_by_hand():
    support = np.array([2.0, -1.0, 0.0, 1.6])  # in any order
    posterior = np.array([[0.3, 0.35, 0.05, 0.3], [0.1, 0.45, 0.3, 0.15]])
    labels = np.array([1.6, -1.0])
    ideal = floors.ideal(REGRESSION, labels, posterior, support)
    # Medians 1.6 and 0; means 0.73 and -0.01; 2.0 and 1.6 share the bin 2.
    assert ideal["mae"] == pytest.approx((0.0 + 1.0) / 2)
    assert ideal["corr"] == pytest.approx(1.0)
    assert ideal["acc7"] == 100.0
    assert ideal["acc2_non0"] == 100.0  # P(> 0) = 0.25 < P(< 0) = 0.45
    assert ideal["acc2_has0"] == 50.0  # P(>= 0) = 0.55 > P(< 0) = 0.45


def test_ideal_emotions_by_hand():
    posterior = np.array([[0.6, 0.2, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1]])
    labels = np.eye(4)[[0, 0]]
    support = np.arange(4.0)
    assert floors.ideal(Task("emotions-binary"), labels, posterior, support)["acc_happy"] == 50.0
    assert floors.ideal(Task("emotions-4way"), labels, posterior, support)["acc_4way"] == 100.0


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("condition", ["l", "v", "lav"])
def test_the_ideal_is_above_the_floor(name, condition, make_world):
    world = make_world(Task(name), ENOUGH)
    floor, ideal = world.floor(), world.ideal(condition)
    assert ideal.keys() == floor.keys()
    for key, value in ideal.items():
        if metrics.higher_is_better(key):
            assert value >= floor[key] - 0.5, key  # half a point of sampling noise where nothing can be told
        else:
            assert value < floor[key]
    headline = metrics.primary(world.task)
    assert world.ideal("lav")[headline] > floor[headline] + 10


@pytest.mark.parametrize("name", TASKS)
def test_no_noisy_reading_of_the_posterior_beats_the_ideal_accuracy(name, make_world):
    world = make_world(Task(name), ENOUGH)
    noisy = metrics.compute(world.task, world.labels, world.predict("la", noise=0.5, seed=1))
    ideal = world.ideal("la")
    for key in metrics.keys(world.task):
        if key.startswith(("acc", "corr")):
            assert ideal[key] > noisy[key], key
        if key.startswith("mae"):
            assert ideal[key] < noisy[key]


def test_posterior_shape_is_checked():
    with pytest.raises(ValueError, match=r"posterior has shape \(2, 3\), expected \(2, 4\)"):
        floors.ideal(REGRESSION, np.ones(2), np.ones((2, 3)), np.ones(4))
