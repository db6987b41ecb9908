"""Squared maximum mean discrepancy with a multi-bandwidth Gaussian kernel (UMDF eqs. 1 to 3)."""

import torch

from fastmmkd.ops.declaration import declare_loss, wanted
from fastmmkd.ops.dispatch import implementation
from fastmmkd.ops.operation import Op
from fastmmkd.ops.precision import accumulation
from fastmmkd.ops.work import Work, loss_work

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)
"""`2^u` for u = -2 .. 2, in units of the mean squared distance."""


def gaussian_mmd(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Biased (V-statistic) estimate of `MMD^2(x, y)` per group.

    `k(x, y) = sum_{u=-2..2} exp(-|x - y|^2 / (2^u sigma))`; `sigma` is the mean squared distance over all pairs of
    different samples of the joined 2N, constant in the backward pass and in that of a gradient (Long et al. 2015, as
    in their implementation).

    Args:
        x, y: `[G, N, d]`.

    Returns:
        `[G]` in fp32 or better, >= 0; exactly 0 where x equals y. All 2N samples identical gives 0.
    """
    if x.shape != y.shape or x.dim() != 3:
        raise ValueError(f"x is {tuple(x.shape)}, y is {tuple(y.shape)}; expected [G, N, d] twice")
    return implementation(OP, x, y)(x, y)


def _definition(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    n = x.shape[1]
    joined = torch.cat((accumulation(x), accumulation(y)), dim=1)
    squared = (joined.unsqueeze(2) - joined.unsqueeze(1)).square().sum(-1)
    sigma = squared.detach().sum((1, 2), keepdim=True) / (2 * n * (2 * n - 1))
    sigma = sigma.clamp_min(torch.finfo(sigma.dtype).tiny)  # all samples identical: every kernel value is 1
    kernel = sum(torch.exp(-squared / (u * sigma)) for u in BANDWIDTHS)
    assert isinstance(kernel, torch.Tensor)
    within = kernel[:, :n, :n].mean((1, 2)) + kernel[:, n:, n:].mean((1, 2))
    return within - 2 * kernel[:, :n, n:].mean((1, 2))


_declared = declare_loss(
    "gaussian_mmd",
    "(Tensor x, Tensor y, bool[2] wanted) -> (Tensor loss, Tensor grad_x, Tensor grad_y)",
    inputs=2,
    definition=_definition,
)


def _compiled(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return _declared(x, y, wanted(x, y))[0]


def _work(g: int, n: int, d: int, e: int, gradients: bool) -> Work:
    """`G (2 N D e + 4)` bytes, and `8 N D` for the gradients.

    `G P (3 D + 12)` operations for P = N (2 N - 1) pairs: distance; its sum; scale, exponential, four squares, five
    sums. Gradients: `3 D + 11` more, five products of kernel and bandwidth with their sums, a factor, one product and
    two sums per feature.
    """
    pairs, moved = n * (2 * n - 1), 2 * n * d
    return loss_work(g, moved * e, moved * gradients, pairs * (3 * d + 12 + (3 * d + 11) * gradients))


OP = Op("gaussian_mmd", _definition, ("triton", "cpp"), _compiled, gradient="forward", work=_work, place=70)
