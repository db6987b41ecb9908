"""Jensen-Shannon divergence of two softmax distributions (UMDF eqs. 4 and 5)."""

import torch

from fastmmkd.ops.registry import implementation


def js_divergence(logits_a: torch.Tensor, logits_b: torch.Tensor) -> torch.Tensor:
    """`JS(softmax a, softmax b)` in nats with the mean distribution `M = (p_a + p_b) / 2`, averaged over samples.

    Args:
        logits_a, logits_b: `[G, N, K]`.

    Returns:
        `[G]` in fp32 or better, in [0, ln 2]; finite for logits of any size.
    """
    if logits_a.shape != logits_b.shape or logits_a.dim() != 3:
        raise ValueError(f"logits are {tuple(logits_a.shape)} and {tuple(logits_b.shape)}; expected [G, N, K] twice")
    return implementation("js_divergence", logits_a, logits_b)(logits_a, logits_b)
