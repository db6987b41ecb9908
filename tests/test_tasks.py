"""Targets, losses and predictions of every task, by hand."""

import math

import numpy as np
import pytest
import torch

from fastmmkd.tasks import TASKS, Task


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
    found = Task("classification-2").loss(logits, torch.tensor([[[1], [0]]]))
    assert found.item() == pytest.approx(-(math.log(0.75) + math.log(0.5)) / 2, rel=1e-6)


def test_four_binary_problems_are_summed() -> None:
    task = Task("emotions-binary")
    labels = np.array([[1.0, 0.0, 0.0, 1.0]])
    targets = torch.from_numpy(task.targets(labels))[None]
    assert targets.tolist() == [[[1, 0, 0, 1]]]
    assert task.loss(torch.zeros(1, 1, 8), targets).item() == pytest.approx(4 * math.log(2), rel=1e-6)
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
    assert task.predictions(logits[0]).shape == ((3,) if name == "regression" else (3, len(task.class_names)))
