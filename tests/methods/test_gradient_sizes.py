"""How hard each part of a loss pulls at the representation."""

from __future__ import annotations

import pytest
import torch

from fastmmkd.methods.objective import Losses, gradient_sizes


def test_two_models_by_hand() -> None:
    """`|d(3 h . x) / dh| = 3 |x|` of each model; what does not reach H pulls with 0."""
    joint = torch.zeros(2, 1, 2, requires_grad=True)
    x = torch.tensor([[[3.0, 4.0]], [[0.0, 1.0]]])
    own = torch.ones(2, requires_grad=True)
    parts = {"task": (3 * joint * x).sum((1, 2)), "other": own * 2}
    sizes = gradient_sizes(Losses(sum(parts.values()), parts, joint))
    assert sizes["task"].tolist() == pytest.approx([15.0, 3.0])
    assert sizes["other"].tolist() == [0.0, 0.0]


def test_the_graph_stays() -> None:
    joint = torch.ones(1, 3, requires_grad=True)
    part = joint.square().sum(1)
    losses = Losses(part, {"task": part}, joint)
    assert gradient_sizes(losses)["task"].tolist() == pytest.approx([12**0.5])
    losses.total.sum().backward()
    assert joint.grad is not None
