"""A statistics network learns to tell related pairs from unrelated ones, and teaches what it measures."""

import math

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
