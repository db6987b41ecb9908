"""A statistics network learns to tell related pairs from unrelated ones, and teaches what it measures."""

import math

import pytest
import torch

from fastmmkd.nn.statistics import StatisticsNetwork


def correlated(rows=64):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, rows, 2, generator=generator, dtype=torch.float64)
    return q, q + 0.7 * torch.randn(1, rows, 2, generator=generator, dtype=torch.float64)


def trained(q, u, steps):
    torch.manual_seed(0)
    statistics = StatisticsNetwork((1,), 2, 2, 16).double()
    optimizer = torch.optim.Adam(statistics.parameters(), lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        (-statistics(q, u).sum()).backward()
        optimizer.step()
    return statistics


def test_a_step_raises_the_bound() -> None:
    """Of the network, of the student's rows, and of both at once."""
    q, u = correlated()
    statistics, student = trained(q, u, 20), u.clone().requires_grad_()
    before = statistics(q, student)
    parameters = list(statistics.parameters())
    grads = torch.autograd.grad(-before.sum(), [*parameters, student])
    for moved in (parameters, [student], [*parameters, student]):
        own = {id(p) for p in moved}
        values = [p.detach().clone() for p in (*parameters, student)]
        with torch.no_grad():
            for p, grad in zip((*parameters, student), grads, strict=True):
                p -= 0.01 * grad * (id(p) in own)
            assert (statistics(q, student) > before).all()
            for p, value in zip((*parameters, student), values, strict=True):
                p.copy_(value)


def test_training_finds_more_in_related_pairs_than_in_unrelated_ones() -> None:
    """Independent pairs have at most `-2 ln 2` but for what is learnt by heart."""
    q, u = correlated()
    related, unrelated = (trained(q, x, 150)(q, x).item() for x in (u, u.roll(1, dims=1)))
    assert related > -2 * math.log(2) + 0.3
    assert related > unrelated + 0.2


def test_pools_by_hand() -> None:
    """`F(q, u) = relu(q - u)` on q = u = {0, 1} and {10, 11}: pairs of one pool, and of both joined."""
    statistics = StatisticsNetwork((1,), 1, 1, 1).double()
    with torch.no_grad():
        for parameter in statistics.parameters():
            parameter.zero_()
        statistics.weight_q[:], statistics.weight_u[:], statistics.weight[:] = 1.0, -1.0, 1.0
    rows = torch.tensor([[[[0.0], [1.0]], [[10.0], [11.0]]]], dtype=torch.float64)

    def softplus(x):
        return math.log1p(math.exp(x))

    apart = -softplus(0) - (softplus(0) + softplus(1)) / 2
    joined = -softplus(0) - (6 * softplus(0) + 2 * softplus(1) + softplus(9) + 2 * softplus(10) + softplus(11)) / 12
    assert statistics(rows, rows).item() == pytest.approx(apart, rel=1e-12)
    assert statistics(rows.flatten(1, 2), rows.flatten(1, 2)).item() == pytest.approx(joined, rel=1e-12)


@pytest.mark.parametrize("joined", [False, True])
def test_only_pairs_within_a_layer_measure_information_alone(joined) -> None:
    """Independent rows of two layers that differ in their mean: nothing is to be known, `-2 ln 2` is the most."""
    torch.manual_seed(0)
    statistics = StatisticsNetwork((1,), 4, 4, 16)
    optimizer = torch.optim.Adam(statistics.parameters(), lr=0.01)
    generator, means = torch.Generator().manual_seed(0), torch.tensor([-1.0, 1.0]).view(2, 1, 1)

    def rows():
        found = means + torch.randn(1, 2, 64, 4, generator=generator)
        return found.flatten(1, 2) if joined else found

    bounds = []
    for _ in range(300):
        optimizer.zero_grad()
        bound = statistics(rows(), rows())
        (-bound.sum()).backward()
        optimizer.step()
        bounds.append(bound.item())
    reached, nothing = sum(bounds[-50:]) / 50, -2 * math.log(2)
    assert reached > nothing + 0.3 if joined else reached < nothing + 0.01
