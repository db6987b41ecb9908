"""Jensen-Shannon divergence of two softmax distributions (UMDF eqs. 4 and 5)."""

import math

import torch
import torch.nn.functional as F

from fastmmkd.ops.declaration import declare_loss, wanted
from fastmmkd.ops.dispatch import implementation
from fastmmkd.ops.operation import Op
from fastmmkd.ops.precision import accumulation
from fastmmkd.ops.work import Work, loss_work


def js_divergence(logits_a: torch.Tensor, logits_b: torch.Tensor) -> torch.Tensor:
    """`JS(softmax a, softmax b)` in nats with the mean distribution `M = (p_a + p_b) / 2`, averaged over samples.

    Args:
        logits_a, logits_b: `[G, N, K]`.

    Returns:
        `[G]` in fp32 or better, in [0, ln 2]; finite for logits of any size.
    """
    if logits_a.shape != logits_b.shape or logits_a.dim() != 3:
        raise ValueError(f"logits are {tuple(logits_a.shape)} and {tuple(logits_b.shape)}; expected [G, N, K] twice")
    return implementation(OP, logits_a, logits_b)(logits_a, logits_b)


def _definition(logits_a: torch.Tensor, logits_b: torch.Tensor) -> torch.Tensor:
    log_a, log_b = F.log_softmax(accumulation(logits_a), -1), F.log_softmax(accumulation(logits_b), -1)
    log_mean = torch.logaddexp(log_a, log_b) - math.log(2.0)
    kl_a = (log_a.exp() * (log_a - log_mean)).sum(-1)
    kl_b = (log_b.exp() * (log_b - log_mean)).sum(-1)
    return 0.5 * (kl_a + kl_b).mean(-1)


_declared = declare_loss(
    "js_divergence",
    "(Tensor logits_a, Tensor logits_b, bool[2] wanted) -> (Tensor loss, Tensor grad_a, Tensor grad_b)",
    inputs=2,
    definition=_definition,
)


def _compiled(logits_a: torch.Tensor, logits_b: torch.Tensor) -> torch.Tensor:
    return _declared(logits_a, logits_b, wanted(logits_a, logits_b))[0]


def _work(g: int, n: int, c: int, e: int, gradients: bool) -> Work:
    """`G (2 N C e + 4)` bytes, and `8 N C` for the gradients.

    `G N (19 C + 2)` operations: for both inputs difference, exponential, sum, division, log-probability; mean 2 and its
    logarithm; for both difference, product and sum; two logarithms of sums. Gradients: `6 C` more.
    """
    moved = 2 * n * c
    return loss_work(g, moved * e, moved * gradients, n * (19 * c + 2 + 6 * c * gradients))


OP = Op("js_divergence", _definition, ("triton", "cpp"), _compiled, gradient="forward", work=_work, place=100)
