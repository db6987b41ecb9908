"""The Jensen-Shannon bound of CorrKD eq. 6 against its sums, by hand, its gradient, and scores of any size."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmmkd.ops import jsd_mutual_information


def softplus(x):
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def literal(left, right, weight, bias):
    """The two expectations for one group, in Python floats."""
    left, right, weight, bias = left.tolist(), right.tolist(), weight.tolist(), bias.item()

    def score(i, j):
        return sum(w * max(a + b, 0.0) for w, a, b in zip(weight, left[i], right[j], strict=True)) + bias

    n = len(left)
    joint = [-softplus(-score(i, i)) for i in range(n)]
    marginal = [softplus(score(i, j)) for i in range(n) for j in range(n) if i != j]
    return sum(joint) / n - (sum(marginal) / len(marginal) if marginal else 0.0)


def draw(groups, n, h, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (groups, n, h), (groups, n, h), (groups, h), (groups,)
    return [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in shapes]


def test_by_hand_two_samples() -> None:
    """Scores 2 relu(left + right) - 1: F_00 = 1, F_11 = -1 | F_01 = -1, F_10 = 3."""
    left, right = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[1.0], [-2.0]]])
    bound = jsd_mutual_information(left, right, torch.tensor([[2.0]]), torch.tensor([-1.0]))
    joint = -(0.3132617 + 1.3132617) / 2  # softplus(-1), softplus(1)
    marginal = (0.3132617 + 3.0485874) / 2  # softplus(-1), softplus(3)
    assert bound.item() == pytest.approx(joint - marginal, abs=1e-6)
    assert bound.item() == pytest.approx(-2.4941862, abs=1e-6)


def test_by_hand_three_samples() -> None:
    """Scores (left + right) . (1, -1): 1, 0, -1 on the diagonal; 2, 0, -1, -2, 0, 1 off it."""
    left = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]])
    right = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])
    bound = jsd_mutual_information(left, right, torch.tensor([[1.0, -1.0]]), torch.tensor([0.0]))
    joint = -(0.3132617 + 0.6931472 + 1.3132617) / 3
    marginal = (2.1269280 + 0.6931472 + 0.3132617 + 0.1269280 + 0.6931472 + 1.3132617) / 6
    assert bound.item() == pytest.approx(joint - marginal, abs=1e-6)
    assert bound.item() == pytest.approx(-1.6510025, abs=1e-6)


@settings(deadline=None, max_examples=20, derandomize=True)
@given(
    seed=st.integers(0, 1000),
    groups=st.integers(1, 3),
    n=st.integers(1, 7),
    h=st.integers(1, 4),
    scale=st.sampled_from([1.0, 30.0]),
)
def test_equals_the_sums(seed, groups, n, h, scale) -> None:
    left, right, weight, bias = draw(groups, n, h, seed)
    weight = weight * scale
    bound = jsd_mutual_information(left, right, weight, bias)
    assert bound.dtype == torch.float64
    expected = [literal(left[g], right[g], weight[g], bias[g]) for g in range(groups)]
    assert bound.tolist() == pytest.approx(expected, rel=1e-12)


def test_one_sample_leaves_the_joint_term() -> None:
    left, right = torch.tensor([[[0.25]]], requires_grad=True), torch.tensor([[[0.75]]])
    bound = jsd_mutual_information(left, right, torch.tensor([[2.0]]), torch.tensor([-1.0]))
    bound.sum().backward()
    assert bound.item() == pytest.approx(-0.3132617, abs=1e-6)  # -softplus(-1)
    assert left.grad.item() == pytest.approx(2 * 0.2689414, abs=1e-6)  # 2 sigmoid(-1)


def test_a_network_that_tells_nothing_apart_has_minus_two_ln_two() -> None:
    left, right, weight, bias = draw(2, 5, 3)
    bound = jsd_mutual_information(left, right, torch.zeros_like(weight), torch.zeros_like(bias))
    assert bound.tolist() == pytest.approx([-2 * math.log(2)] * 2, rel=1e-12)


def test_scores_beyond_twenty_keep_their_tail() -> None:
    """PyTorch's softplus is the identity from 20 on: softplus(21) would lose 7.6e-10."""
    left, right, weight, _ = draw(1, 3, 2)
    bound = jsd_mutual_information(left, right, torch.zeros_like(weight), torch.tensor([21.0], dtype=torch.float64))
    assert bound.item() == pytest.approx(-softplus(-21.0) - softplus(21.0), rel=1e-14)


def test_a_perfect_network_has_zero() -> None:
    """Score 80 for the pairs i = j, -80 for the others: h = N columns that are positive only on the diagonal."""
    n = 4
    left = torch.eye(n)[None] - 1
    bound = jsd_mutual_information(left, torch.eye(n)[None], torch.full((1, n), 160.0), torch.tensor([-80.0]))
    assert bound.item() == pytest.approx(0.0, abs=1e-6)


def test_equal_inputs_have_a_finite_gradient() -> None:
    left, _, weight, bias = draw(2, 5, 3)
    left.requires_grad_()
    bound = jsd_mutual_information(left, left.detach().clone(), weight, bias)
    bound.sum().backward()
    expected = [literal(left[g], left[g], weight[g], bias[g]) for g in range(2)]
    assert bound.tolist() == pytest.approx(expected, rel=1e-12)
    assert torch.isfinite(left.grad).all()
    assert left.grad.abs().max() > 0


def test_gradients() -> None:
    """With respect to all four inputs, away from the kink of relu (asserted)."""
    inputs = draw(2, 4, 3, seed=2)
    hidden = inputs[0].unsqueeze(2) + inputs[1].unsqueeze(1)
    assert hidden.abs().min() > 1e-3
    assert (hidden < 0).any()
    assert torch.autograd.gradcheck(jsd_mutual_information, [x.requires_grad_() for x in inputs])


def test_order_of_the_pairs_does_not_matter_but_the_pairing_does() -> None:
    left, right, weight, bias = draw(2, 6, 3)
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    bound = jsd_mutual_information(left, right, weight, bias)
    torch.testing.assert_close(jsd_mutual_information(left[:, order], right[:, order], weight, bias), bound)
    torch.testing.assert_close(jsd_mutual_information(right, left, weight, bias), bound)
    assert (jsd_mutual_information(left[:, order], right, weight, bias) - bound).abs().min() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_fp32(dtype) -> None:
    """Close to fp64 on the same rounded inputs, and as close as the rounding allows on the inputs before it.

    Autocast, too, leaves the scores in fp32.
    """
    exact = draw(2, 9, 20)
    inputs = [x.to(dtype).requires_grad_() for x in exact]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bound = jsd_mutual_information(*inputs)
    assert bound.dtype == torch.float32
    torch.testing.assert_close(bound.double(), jsd_mutual_information(*(x.double() for x in inputs)), rtol=1e-5, atol=0)
    torch.testing.assert_close(bound.double(), jsd_mutual_information(*exact), rtol=2e-2, atol=0)
    bound.sum().backward()
    for x in inputs:
        assert x.grad.dtype == dtype
        assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_scores_are_finite(size) -> None:
    """All scores are `size`: softplus is the size of it on the wrong side, 0 on the right one."""
    left = torch.full((1, 3, 1), 0.5, requires_grad=True)
    right, weight = torch.full((1, 3, 1), 0.5, requires_grad=True), torch.full((1, 1), size, requires_grad=True)
    bound = jsd_mutual_information(left, right, weight, torch.zeros(1))
    bound.sum().backward()
    assert bound.tolist() == [-1e4]
    for x in (left, right, weight):
        assert torch.isfinite(x.grad).all()


def test_the_bound_never_waits_for_the_device() -> None:
    """Fake tensors have shapes but no numbers: reading one, or a shape that depends on one, would raise."""
    with FakeTensorMode():
        left = torch.empty(2, 5, 4, requires_grad=True)
        bound = jsd_mutual_information(left, torch.empty(2, 5, 4), torch.empty(2, 4), torch.empty(2))
        bound.sum().backward()
        assert bound.shape == (2,)


def test_the_bound_says_what_does_not_fit() -> None:
    x, weight, bias = torch.zeros(1, 3, 4), torch.zeros(1, 4), torch.zeros(1)
    with pytest.raises(ValueError, match=r"left is \(1, 3, 4\), right is \(1, 2, 4\)"):
        jsd_mutual_information(x, x[:, :2], weight, bias)
    with pytest.raises(ValueError, match=r"left is \(3, 4\), right is \(3, 4\)"):
        jsd_mutual_information(x[0], x[0], weight, bias)
    with pytest.raises(ValueError, match=r"weight is \(1, 3\), bias is \(1,\); left \(1, 3, 4\) needs \(1, 4\)"):
        jsd_mutual_information(x, x, weight[:, :3], bias)
    with pytest.raises(ValueError, match=r"bias is \(1, 1\)"):
        jsd_mutual_information(x, x, weight, bias[None])
