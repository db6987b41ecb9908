"""An inner step by hand: what both orders make of a quadratic loss, and the gradient that comes with the value."""

from __future__ import annotations

import pytest
import torch

from fastmmkd.methods.meta import inner_step

RATE = 0.1


def quadratic(x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """`mean (x w - y)^2` of a linear network, per model: `[S, N, d]`, `[S, N]`, `[S, d]` -> `[S]`."""
    return ((x @ w.unsqueeze(-1)).squeeze(-1) - y).square().mean(1)


@pytest.mark.parametrize("models", [1, 2])
def test_orders_differ_by_the_hessian_of_the_inner_loss(models: int) -> None:
    """A linear network and a squared error: `H = 2 X^T X / N`, so that
    `grad_1 = g + grad outer(w')` and `grad_2 = grad_1 - alpha H grad outer(w')`."""
    torch.manual_seed(0)
    (x, y), (x_2, y_2) = (
        (torch.randn(models, 6, 3, dtype=torch.float64), torch.randn(models, 6, dtype=torch.float64)) for _ in "ab"
    )
    w = torch.randn(models, 3, dtype=torch.float64, requires_grad=True)
    rate = torch.tensor([RATE, 3 * RATE][:models])

    def errors(x: torch.Tensor, y: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        return 2 / 6 * (x.mT @ ((x @ at.unsqueeze(-1)).squeeze(-1) - y).unsqueeze(-1)).squeeze(-1)

    g = errors(x, y, w.detach())
    moved = w.detach() - rate.unsqueeze(-1) * g
    outer, hessian = errors(x_2, y_2, moved), 2 / 6 * x.mT @ x
    first = g + outer
    second = first - rate.unsqueeze(-1) * (hessian @ outer.unsqueeze(-1)).squeeze(-1)
    for order, expected in ((1, first), (2, second)):
        inner = quadratic(x, y, w)
        step = inner_step(inner, {"w": w}, [], rate, order)
        torch.testing.assert_close(step.adapted["w"].detach(), moved)
        torch.testing.assert_close(step.loss, inner)
        total = (step.loss + quadratic(x_2, y_2, step.adapted["w"])).sum()
        (found,) = torch.autograd.grad(total, w)
        torch.testing.assert_close(found, expected)


def test_one_number_by_hand() -> None:
    """`inner = (w - 1)^2`, `outer = 3 w'`, w = 3, alpha = 0.1: `w' = 2.6`; in first order 4 + 3, in second 4 + 2.4."""
    for order, expected in ((1, 7.0), (2, 6.4)):
        w = torch.tensor([3.0], requires_grad=True)
        step = inner_step((w - 1) ** 2, {"w": w}, [], torch.tensor([0.1]), order)
        assert step.adapted["w"].item() == pytest.approx(2.6)
        total = step.loss + 3 * step.adapted["w"]
        assert total.item() == pytest.approx(4 + 7.8)
        total.backward()
        assert w.grad is not None
        assert w.grad.item() == pytest.approx(expected)


@pytest.mark.parametrize("order", [1, 2])
def test_others_are_trained_and_left_as_they_are(order: int) -> None:
    """What the inner loss is a function of besides gets its gradient, through the step only in second order; what it is
    no function of stays."""
    w, n, unused = (torch.tensor([x], requires_grad=True) for x in (3.0, 2.0, 5.0))
    step = inner_step(n * (w - 1) ** 2, {"w": w, "unused": unused}, [n], torch.tensor([0.1]), order)  # type: ignore[arg-type]
    assert set(step.adapted) == {"w", "unused"}
    assert step.adapted["unused"] is unused
    (step.loss + 3 * step.adapted["w"] + unused).backward()
    through = 3 * -0.1 * 2 * (3 - 1) if order == 2 else 0.0
    assert n.grad is not None
    assert n.grad.item() == pytest.approx(4 + through)
    assert unused.grad is not None
    assert unused.grad.item() == 1


def test_it_is_taken_where_gradients_are_off() -> None:
    """As a capture does it: the loss has a graph, the surroundings have none."""
    w = torch.tensor([3.0], requires_grad=True)
    inner = (w - 1) ** 2
    with torch.no_grad():
        step = inner_step(inner, {"w": w}, [], torch.tensor([0.1]), 1)
    assert step.adapted["w"].item() == pytest.approx(2.6)
