"""Squared maximum mean discrepancy with a multi-bandwidth Gaussian kernel (UMDF eqs. 1 to 3)."""

import torch

from fastmmkd.ops.registry import implementation


def gaussian_mmd(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Biased (V-statistic) estimate of `MMD^2(x, y)` per group.

    `k(x, y) = sum_{u=-2..2} exp(-|x - y|^2 / (2^u sigma))`; `sigma` is the mean squared distance over all pairs of
    different samples of the joined 2N, constant in the backward pass (Long et al. 2015, as in their implementation).

    Args:
        x, y: `[G, N, d]`.

    Returns:
        `[G]` in fp32 or better, >= 0; exactly 0 where x equals y. All 2N samples identical gives 0.
    """
    if x.shape != y.shape or x.dim() != 3:
        raise ValueError(f"x is {tuple(x.shape)}, y is {tuple(y.shape)}; expected [G, N, d] twice")
    return implementation("gaussian_mmd", x, y)(x, y)
