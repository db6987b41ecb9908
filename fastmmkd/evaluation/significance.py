"""Is one run better than another over the same seeds? Paired tests on per-seed values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

MIN_T_PAIRS = 2
MIN_WILCOXON_PAIRS = 6
"""With fewer pairs the two-sided signed-rank test cannot reach p < 0.05: its smallest p is 2 / 2^n."""


@dataclass(frozen=True)
class PairedTest:
    t_p: float | None
    """Two-sided paired t-test. None with fewer than 2 pairs, or where all differences are one same non-zero number
    (no variance to test against); 1.0 where all differences are 0."""
    wilcoxon_p: float | None
    """Two-sided Wilcoxon signed-rank test; None with fewer than 6 pairs, 1.0 where all differences are 0."""
    mean_difference: float | None
    """Mean of a - b; None without pairs."""
    n: int
    """Pairs that were compared."""


def paired_test(a: Sequence[float | None], b: Sequence[float | None]) -> PairedTest:
    """Compare two runs seed by seed (scipy's `ttest_rel` and `wilcoxon`).

    Args:
        a, b: one value per common seed, in the same order; a pair with None or NaN on either side is left out.

    Raises:
        ValueError: the lists differ in length.
    """
    if len(a) != len(b):
        raise ValueError(f"a has {len(a)} values, b has {len(b)}; pairs need equally many")
    difference = np.array(a, dtype=np.float64) - np.array(b, dtype=np.float64)
    difference = difference[~np.isnan(difference)]
    n = len(difference)
    if n == 0:
        return PairedTest(None, None, None, 0)
    t_p = _t_p(difference) if n >= MIN_T_PAIRS else None
    wilcoxon_p = _wilcoxon_p(difference) if n >= MIN_WILCOXON_PAIRS else None
    return PairedTest(t_p, wilcoxon_p, float(difference.mean()), n)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """p values corrected for their number by Holm's step-down method (Scandinavian Journal of Statistics 6, 1979).

    The k-th smallest of m is multiplied by m - k + 1, and none comes out smaller than one before it. Rejecting where
    the corrected value is at most alpha keeps the chance of any false rejection at alpha, however the tests depend on
    each other.

    Args:
        p_values: of one family of tests; None stands for a test that could not be made, which does not count.

    Returns:
        In the same order, None where there was None.
    """
    known = sorted((p, i) for i, p in enumerate(p_values) if p is not None)
    corrected: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for k, (p, i) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - k) * p))
        corrected[i] = largest
    return corrected


def _t_p(difference: np.ndarray) -> float | None:
    if not difference.any():
        return 1.0
    # Differences that agree to rounding error would give a p of 0 out of nothing.
    if np.ptp(difference) <= 1e-9 * np.abs(difference).max():
        return None
    return float(stats.ttest_1samp(difference, 0.0).pvalue)


def _wilcoxon_p(difference: np.ndarray) -> float:
    return float(stats.wilcoxon(difference).pvalue) if difference.any() else 1.0
