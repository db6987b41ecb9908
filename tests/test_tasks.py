"""Targets, losses and predictions of every task, by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmkd.labels import sims_classes
from fastmmkd.tasks import TASKS, Task, score_classes


def test_bins() -> None:
    scores = np.array([-3.0, -0.5, 0.0, 0.4, 0.5, 1.5, 2.6])
    assert Task("classification-2").targets(scores)[:, 0].tolist() == [0, 0, 1, 1, 1, 1, 1]
    assert Task("classification-3").targets(scores)[:, 0].tolist() == [0, 0, 1, 2, 2, 2, 2]
    assert Task("classification-7").targets(scores)[:, 0].tolist() == [0, 3, 3, 3, 3, 5, 6]  # half to even
    assert Task("regression").targets(scores).dtype == np.float32


def test_mse_and_cross_entropy_by_hand() -> None:
    logits = torch.tensor([[[1.0], [2.0]]])
    assert Task("regression").loss(logits, torch.tensor([[0.0, 4.0]])).tolist() == [2.5]
    logits = torch.log(torch.tensor([[[0.25, 0.75], [0.5, 0.5]]]))
    loss = Task("classification-2").loss(logits, torch.tensor([[[1], [0]]]))
    assert loss.item() == pytest.approx(-(math.log(0.75) + math.log(0.5)) / 2, rel=1e-6)


def test_four_binary_problems_are_averaged() -> None:
    task = Task("emotions-binary")
    labels = np.array([[1.0, 0.0, 0.0, 1.0]])
    targets = torch.from_numpy(task.targets(labels))[None]
    assert targets.tolist() == [[[1, 0, 0, 1]]]
    assert task.loss(torch.zeros(1, 1, 8), targets).item() == pytest.approx(math.log(2), rel=1e-6)
    logits = torch.zeros(1, 8)
    logits[0, 1] = 3.0  # the second logit of the first problem: happy holds
    assert task.predictions(logits)[0].tolist() == pytest.approx([1 / (1 + math.exp(-3)), 0.5, 0.5, 0.5])


@pytest.mark.parametrize("name", TASKS)
def test_gradient(name) -> None:
    task = Task(name)
    labels = np.eye(4)[[0, 2, 3]] if task.label_kind == "emotions" else np.array([-1.0, 0.0, 2.0])
    targets = torch.from_numpy(task.targets(labels))[None]
    logits = torch.randn(1, 3, task.outputs, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: task.loss(x, targets), (logits,))
    assert task.predictions(logits[0]).shape == ((3,) if task.is_regression else (3, len(task.class_names)))


def test_divergence_by_hand() -> None:
    """KL of the student from the teacher, not the other way round; a mean over two samples, the second one equal."""
    teacher = torch.tensor([[[0.5, 0.5], [0.3, 0.7]]], dtype=torch.float64).log() + 1.5
    student = torch.tensor([[[0.25, 0.75], [0.3, 0.7]]], dtype=torch.float64).log() - 0.5
    expected = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) / 2
    assert Task("classification-2").divergence(teacher, student).tolist() == pytest.approx([expected], rel=1e-12)
    teacher, student = torch.tensor([[[1.0], [2.0]], [[0.0], [0.0]]]), torch.tensor([[[0.0], [4.0]], [[3.0], [1.0]]])
    assert Task("regression").divergence(teacher, student).tolist() == [2.5, 5.0]


def test_divergence_averages_over_the_four_problems() -> None:
    logits = torch.randn(2, 3, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    teacher, student = logits.unbind(2)
    alone = [
        Task("classification-2").divergence(t, s)
        for t, s in zip(teacher.split(2, -1), student.split(2, -1), strict=True)
    ]
    assert len(alone) == 4
    torch.testing.assert_close(Task("emotions-binary").divergence(teacher, student), sum(alone) / 4)


@pytest.mark.parametrize("name", TASKS)
def test_divergence_is_zero_on_equals_and_has_its_gradient(name) -> None:
    task = Task(name)
    teacher, student = torch.randn(
        2, 2, 3, task.outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    assert task.divergence(teacher, teacher).tolist() == [0.0, 0.0]
    assert (task.divergence(teacher, student) > 0).all()
    assert torch.autograd.gradcheck(lambda x: task.divergence(teacher, x), student.requires_grad_())


@pytest.mark.parametrize("bins", [2, 3, 7])
@settings(deadline=None, max_examples=50, derandomize=True)
@given(
    scores=st.lists(
        st.one_of(st.integers(-8, 8).map(lambda n: n / 2), st.floats(-4, 4, width=32), st.sampled_from([0.0, -0.0])),
        min_size=1,
        max_size=8,
    )
)
def test_classes_of_scores_are_those_of_labels(bins, scores) -> None:
    """On the device as `score_classes` bins them, which classification trains on."""
    targets = torch.from_numpy(Task("regression").targets(np.array(scores)))[None]
    classes, count = Task("regression").classes(targets, bins)
    assert classes.dtype == torch.int64
    assert classes.shape == (1, len(scores), 1)
    assert count == bins
    assert classes[0, :, 0].tolist() == score_classes(np.array(scores), bins).tolist()


def test_classes_of_sims() -> None:
    """An edge belongs to the class below it, in single precision; seven are thrice the score, rounded."""
    scores = torch.tensor([[-1.0, -0.7, -0.6, -0.1, 0.0, 0.1, 0.2, 0.7, 1.0]])
    task = Task("regression-sims")
    assert torch.equal(task.loss(scores[..., None], scores), torch.zeros(1))
    expected = {
        2: [0, 0, 0, 0, 0, 1, 1, 1, 1],
        3: [0, 0, 0, 0, 1, 1, 2, 2, 2],
        7: [0, 1, 1, 3, 3, 3, 4, 5, 6],
    }
    for bins, classes in expected.items():
        found, count = task.classes(scores, bins)
        assert (found.dtype, count, found[0, :, 0].tolist()) == (torch.int64, bins, classes)
        if bins != 7:
            assert sims_classes(scores[0].numpy(), bins).tolist() == classes
    assert sims_classes(scores[0].double().numpy(), 5).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4]


@pytest.mark.parametrize(
    ("name", "problems", "count"),
    [
        ("classification-2", 1, 2),
        ("classification-3", 1, 3),
        ("classification-7", 1, 7),
        ("emotions-binary", 4, 2),
        ("emotions-4way", 1, 4),
    ],
)
def test_classes_of_classification_are_its_targets(name, problems, count) -> None:
    targets = torch.arange(2 * 3 * problems).remainder(count).view(2, 3, problems)
    classes, number = Task(name).classes(targets, 5)
    assert torch.equal(classes, targets)
    assert number == count
