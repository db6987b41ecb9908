import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmkd.evaluation.significance import holm, paired_test


def test_t_test_by_hand():
    """Differences 1, 2, 3: mean 2, standard error 1/sqrt(3), t = 2 sqrt(3) with 2 degrees of freedom."""
    outcome = paired_test([11.0, 22.0, 33.0], [10.0, 20.0, 30.0])
    t = 2 * math.sqrt(3)
    assert outcome.t_p == pytest.approx(1 - t / math.sqrt(2 + t * t))  # the closed form for two degrees of freedom
    assert outcome.wilcoxon_p is None
    assert (outcome.mean_difference, outcome.n) == (pytest.approx(2.0), 3)


def test_six_pairs_on_one_side_are_what_wilcoxon_needs():
    a = [1.0, 2.0, 3.0, 4.0, 5.0, 6.5]
    assert paired_test(a, [0.0] * 6).wilcoxon_p == pytest.approx(2 / 2**6)
    assert paired_test(a[:5], [0.0] * 5).wilcoxon_p is None


def test_the_sign_of_the_difference_turns_with_the_order():
    a, b = [80.0, 81.0, 82.5], [79.0, 80.5, 80.0]
    assert paired_test(a, b).mean_difference == pytest.approx(-paired_test(b, a).mean_difference)
    assert paired_test(a, b).t_p == pytest.approx(paired_test(b, a).t_p)


def test_too_few_pairs_are_said_not_computed():
    assert paired_test([], []) == paired_test([None], [1.0])
    one = paired_test([2.0], [1.0])
    assert (one.t_p, one.wilcoxon_p, one.mean_difference, one.n) == (None, None, 1.0, 1)


def test_values_that_are_missing_drop_their_pair():
    assert paired_test([1.0, None, 3.0, 5.0], [0.0, 1.0, float("nan"), 3.0]).n == 2


def test_differences_without_variance():
    assert paired_test([1.0, 2.0], [1.0, 2.0]).t_p == 1.0
    assert paired_test([1.0] * 6, [1.0] * 6).wilcoxon_p == 1.0
    assert paired_test([80.1, 81.2, 82.3], [80.0, 81.1, 82.2]).t_p is None


def test_lists_of_different_length_are_refused():
    with pytest.raises(ValueError, match="a has 2 values, b has 1"):
        paired_test([1.0, 2.0], [1.0])


def test_holm_by_hand():
    """0.01 x 4, 0.03 x 3, then 0.04 x 2 < 0.09 and 0.05 x 1 < 0.09 are lifted to it."""
    assert holm([0.04, 0.01, 0.05, 0.03]) == pytest.approx([0.09, 0.04, 0.09, 0.09])
    assert holm([0.02, None, 0.6, 0.7]) == pytest.approx([0.06, None, 1.0, 1.0])  # 2 x 0.6 is no probability
    assert holm([0.02]) == [0.02]
    assert holm([None, None]) == [None, None]
    assert holm([]) == []


p_values = st.lists(st.none() | st.floats(0, 1), max_size=12)


@settings(deadline=None, max_examples=50)
@given(p_values)
def test_holm_rejects_as_its_steps_do(values):
    """Step down: reject the smallest while p_(k) <= alpha / (m - k + 1), and stop at the first that is not."""
    corrected = holm(values)
    known = sorted(p for p in values if p is not None)
    for alpha in (0.01, 0.05, 0.3):
        rejected = 0
        while rejected < len(known) and known[rejected] * (len(known) - rejected) <= alpha:
            rejected += 1
        assert sum(p <= alpha for p in corrected if p is not None) == rejected
    for p, c in zip(values, corrected, strict=True):
        assert (p is None) == (c is None)
        assert p is None or p <= c <= 1
