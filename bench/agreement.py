"""Whether contenders compute the same: nothing is timed that does not."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from bench.contenders import AUTOTUNED, COMPILED, OURS, PLAIN, REFERENCE, SDPA, Contender
from fastmmkd.errors import UserError

TOLERANCE = {torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 1e-1}
"""Of the norm of a parameter's gradient; a loss is held to it too."""
OF_OTHERS = {SDPA: 3e-2, COMPILED: 3e-2, AUTOTUNED: 3e-2}
"""Of the gradients of what is not ours: a ReLU whose input is within rounding of 0 may be open in one contender and
shut in another. With SDPA that was 1.5 % of a gradient in float32, and 2e-15 in float64."""
NEGLIGIBLE = 1e-2
"""A gradient that is this small beside the whole may err by as much of the whole."""


def assert_agreement(contenders: Mapping[str, Contender], dtype: torch.dtype) -> dict[str, float]:
    """Hold first loss and gradients to the reference's, or where it is left out to those of "ours".

    Returns:
        The largest relative error of a gradient, by contender.

    Raises:
        UserError: one differs.
    """
    base = REFERENCE if REFERENCE in contenders else OURS
    loss, gradients = contenders[base].first()
    whole, limit, found = norm(gradients), TOLERANCE[dtype], {}
    for name, contender in contenders.items():
        if name == base:
            continue
        other_loss, others = contender.first()
        off = ((other_loss - loss).abs() / loss.abs().clamp_min(1e-3)).item()
        if off > limit:
            raise UserError(f"{name}: its first loss is {other_loss.item():.6g}, that of {base} {loss.item():.6g}")
        if name == PLAIN:  # its parameters are laid out otherwise
            found[name] = abs(norm(others) / whole - 1)
        else:
            found[name] = max(
                (others[key] - g).float().norm().item() / (g.float().norm().item() + NEGLIGIBLE * whole)
                for key, g in gradients.items()
            )
        if not found[name] <= max(limit, OF_OTHERS.get(name, 0.0)):
            raise UserError(f"{name}: its first gradients differ from those of {base} by {found[name]:.1e}")
    return found


def norm(gradients: Mapping[str, torch.Tensor]) -> float:
    """Of all gradients together."""
    return sum(g.float().square().sum().item() for g in gradients.values()) ** 0.5
