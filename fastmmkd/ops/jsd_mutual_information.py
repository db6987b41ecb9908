"""Jensen-Shannon lower bound of a mutual information (CorrKD eq. 6; MI of HRLF)."""

import torch

from fastmmkd.ops.registry import implementation


def jsd_mutual_information(
    left: torch.Tensor, right: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    """`E_P[-softplus(-F)] - E_PxP[softplus(F)]` per group, with `F(q_i, u_j) = w . relu(left_i + right_j) + b`.

    F is a two-layer network of the pair [q, u] whose first layer was applied to q and to u separately. Joint pairs are
    the N pairs i = j; marginal pairs are all `N (N - 1)` pairs i != j (decision).

    Args:
        left: `[G, N, h]`, the first layer on q, its bias included.
        right: `[G, N, h]`, the first layer on u.
        weight, bias: `[G, h]`, `[G]`, the second layer.

    Returns:
        `[G]` in fp32 or better, <= 0, to be maximised; `-2 ln 2` where F is 0; finite for scores of any size.
        N = 1 leaves only the joint term.

    Raises:
        ValueError: shapes that do not fit.
    """
    if left.shape != right.shape or left.dim() != 3:
        raise ValueError(f"left is {tuple(left.shape)}, right is {tuple(right.shape)}; expected [G, N, h] twice")
    groups, _, hidden = left.shape
    if weight.shape != (groups, hidden) or bias.shape != (groups,):
        raise ValueError(
            f"weight is {tuple(weight.shape)}, bias is {tuple(bias.shape)}; "
            f"left {tuple(left.shape)} needs {(groups, hidden)} and {(groups,)}"
        )
    return implementation("jsd_mutual_information", left, right, weight, bias)(left, right, weight, bias)
