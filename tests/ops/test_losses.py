"""Loss operations: hand-computed cases, invariants, fp64 gradient checks."""

import math

import pytest
import torch

from fastmmkd.ops import gaussian_mmd, js_divergence


def literal_mmd(x, y):
    """Double loops over the definition, one group."""
    joined = [*x, *y]
    n = len(x)
    distance = [[float(((a - b) ** 2).sum()) for b in joined] for a in joined]
    pairs = [distance[i][j] for i in range(2 * n) for j in range(2 * n) if i != j]
    sigma = sum(pairs) / len(pairs)

    def k(i, j):
        return sum(math.exp(-distance[i][j] / (2.0**u * sigma)) for u in range(-2, 3))

    first, second = range(n), range(n, 2 * n)
    within = sum(k(i, j) for half in (first, second) for i in half for j in half)
    return (within - 2 * sum(k(i, j) for i in first for j in second)) / n**2


def test_mmd_by_hand_one_sample_each() -> None:
    """N = 1, |x - y|^2 = sigma: 2 * 5 - 2 * sum of exp(-1 / 2^u)."""
    x, y = torch.tensor([[[0.0]]]), torch.tensor([[[3.0]]])
    cross = sum(math.exp(-1 / 2.0**u) for u in range(-2, 3))
    assert gaussian_mmd(x, y).item() == pytest.approx(10 - 2 * cross, rel=1e-6)


@pytest.mark.parametrize("n", [2, 3, 7])
def test_mmd_equals_double_loop(n) -> None:
    generator = torch.Generator().manual_seed(n)
    x, y = (torch.randn(2, n, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    loss = gaussian_mmd(x, y)
    assert loss.tolist() == pytest.approx([literal_mmd(x[g], y[g]) for g in range(2)], rel=1e-12)


def test_mmd_of_equal_batches_is_zero() -> None:
    x = torch.randn(1, 6, 3)
    assert gaussian_mmd(x, x).item() == pytest.approx(0.0, abs=1e-6)
    same = torch.ones(1, 4, 3, requires_grad=True)
    loss = gaussian_mmd(same, same.detach().clone())
    loss.sum().backward()
    assert loss.item() == 0.0
    assert torch.isfinite(same.grad).all()


def test_mmd_gradient_with_the_bandwidth_held_constant() -> None:
    """The bandwidth is detached by decision, so the check freezes it at the point of evaluation."""
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(1, 3, 2, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2))
    joined = torch.cat((x, y), 1).detach()
    squared = (joined.unsqueeze(2) - joined.unsqueeze(1)).square().sum(-1)
    sigma = squared.sum() / (6 * 5)

    def frozen(x, y):
        joined = torch.cat((x, y), 1)
        squared = (joined.unsqueeze(2) - joined.unsqueeze(1)).square().sum(-1)
        kernel = sum(torch.exp(-squared / (2.0**u * sigma)) for u in range(-2, 3))
        return kernel[:, :3, :3].mean() + kernel[:, 3:, 3:].mean() - 2 * kernel[:, :3, 3:].mean()

    assert torch.autograd.gradcheck(frozen, (x, y))
    expected = torch.autograd.grad(frozen(x, y), (x, y))
    gradients = torch.autograd.grad(gaussian_mmd(x, y).sum(), (x, y))
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert torch.autograd.gradgradcheck(frozen, (x, y))

    def second(loss):
        (first,) = torch.autograd.grad(loss.sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), (x, y))

    for a, b in zip(second(gaussian_mmd(x, y)), second(frozen(x, y)), strict=True):
        torch.testing.assert_close(a, b)


def test_js_by_hand() -> None:
    """Certain and opposite: ln 2. (1/2, 1/2) against (1/4, 3/4): the sum written out."""
    far = torch.tensor([[[60.0, -60.0]]], dtype=torch.float64)
    assert js_divergence(far, -far).item() == pytest.approx(math.log(2), rel=1e-9)
    a, b = torch.log(torch.tensor([[[0.5, 0.5]]])), torch.log(torch.tensor([[[0.25, 0.75]]]))
    kl_a = 0.5 * math.log(0.5 / 0.375) + 0.5 * math.log(0.5 / 0.625)
    kl_b = 0.25 * math.log(0.25 / 0.375) + 0.75 * math.log(0.75 / 0.625)
    assert js_divergence(a, b).item() == pytest.approx((kl_a + kl_b) / 2, rel=1e-5)


def test_js_is_symmetric_zero_on_equals_and_a_batch_mean() -> None:
    a, b = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, 3, dtype=torch.float64)
    torch.testing.assert_close(js_divergence(a, b), js_divergence(b, a))
    assert js_divergence(a, a + 3.0).abs().max() < 1e-12
    each = torch.stack([js_divergence(a[:, i : i + 1], b[:, i : i + 1]) for i in range(5)])
    torch.testing.assert_close(js_divergence(a, b), each.mean(0))


def test_js_gradient_and_extreme_logits() -> None:
    a, b = (torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(js_divergence, (a, b))
    far = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    js_divergence(far, far.detach().flip(-1)).sum().backward()
    assert torch.isfinite(far.grad).all()
