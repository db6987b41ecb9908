"""Jensen-Shannon lower bound of a mutual information (CorrKD eq. 6; MI of HRLF)."""

import torch
import torch.nn.functional as F

from fastmmkd.ops.declaration import declare_loss, wanted
from fastmmkd.ops.dispatch import implementation
from fastmmkd.ops.operation import Op
from fastmmkd.ops.precision import accumulation
from fastmmkd.ops.work import Work, loss_work


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
    return implementation(OP, left, right, weight, bias)(left, right, weight, bias)


def _definition(left: torch.Tensor, right: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    n = left.shape[1]
    hidden_gijh = (accumulation(left).unsqueeze(2) + accumulation(right).unsqueeze(1)).relu()
    with torch.autocast(left.device.type, enabled=False):  # it would take this product in half precision
        score_gij = (hidden_gijh @ accumulation(weight)[:, None, :, None]).squeeze(-1)
    score_gij = score_gij + accumulation(bias)[:, None, None]
    joint = F.logsigmoid(score_gij.diagonal(0, 1, 2)).mean(-1)  # log sigmoid(x) = -softplus(-x)
    same_ij = torch.eye(n, dtype=torch.bool, device=left.device)
    marginal = F.logsigmoid(-score_gij).masked_fill(same_ij, 0.0).sum((1, 2)) / max(n * (n - 1), 1)
    return joint + marginal


_declared = declare_loss(
    "jsd_mutual_information",
    "(Tensor left, Tensor right, Tensor weight, Tensor bias, bool[4] wanted)"
    " -> (Tensor loss, Tensor grad_left, Tensor grad_right, Tensor grad_weight, Tensor grad_bias)",
    inputs=4,
    definition=_definition,
)


def _compiled(left: torch.Tensor, right: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return _declared(left, right, weight, bias, wanted(left, right, weight, bias))[0]


def _work(g: int, n: int, d: int, e: int, gradients: bool) -> Work:
    """`G ((2 N D + D + 1) e + 4)` bytes (D is the hidden width), and `4 (2 N D + D + 1)` for the gradients.

    `G N^2 (3 D + 5)` operations: sum, product and sum per hidden unit; bias, exponential, sum, logarithm, sum.
    Gradients: `5 D + 4` more: the sigmoid and its factor 3, bias 1; per hidden unit a product and two sums, and a
    product and a sum for its weight.
    """
    moved = 2 * n * d + d + 1
    return loss_work(g, moved * e, moved * gradients, n * n * (3 * d + 5 + (5 * d + 4) * gradients))


OP = Op("jsd_mutual_information", _definition, ("triton", "cpp"), _compiled, gradient="forward", work=_work, place=60)
