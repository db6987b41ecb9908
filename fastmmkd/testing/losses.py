"""What the parity tests of the losses share: inputs, and a loss with its gradients against the fp64 reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from fastmmkd import ops
from fastmmkd.ops import reference, use_provider
from fastmmkd.ops.providers import INTERPRETED
from fastmmkd.testing.parity import (
    DEVICE,
    INSTRUCTION_SETS,
    PROVIDER,
    assert_as_exact,
    instruction_set,
    poisoned_memory,
    value_and_gradients,
)


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    """Standard normal values times `scale`."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE) * scale


def upstream(groups: int) -> torch.Tensor:
    """A different gradient per group, none of them 1."""
    return torch.linspace(-1.7, 2.3, groups, device=DEVICE)


def fast(name: str, inputs: Sequence[torch.Tensor], constants: Sequence[Any] = ()) -> list[torch.Tensor]:
    """The compiled loss and its gradients in all inputs, in memory that starts as NaN."""
    with use_provider(PROVIDER), poisoned_memory():
        return value_and_gradients(lambda *x: getattr(ops, name)(*x, *constants), inputs, upstream(inputs[0].shape[0]))


def check(name: str, inputs: Sequence[torch.Tensor], constants: Sequence[Any] = ()) -> list[torch.Tensor]:
    """Hold the compiled loss and gradients of every instruction set to the fp64 reference; returns the last."""
    grad = upstream(inputs[0].shape[0])

    def run(x: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return value_and_gradients(lambda *x: getattr(reference, name)(*x, *constants), x, grad)

    plain, exact = run(inputs), run([x.double() for x in inputs])
    for isa in INSTRUCTION_SETS:
        with instruction_set(isa):
            values = fast(name, inputs, constants)
        for i, actual in enumerate(values):
            what = f"gradient {i}" if i else name
            assert_as_exact(f"{what}, {isa}", actual, plain[i], exact[i], 3 if i else 2)
    return values


SIZES = (1, 2, 3, 16, 33, 64, 129)
WIDTHS = (1, 3, 40, 120)
SHAPES = [(groups, n, width) for groups in (1, 3) for n in SIZES for width in WIDTHS]
if INTERPRETED:  # every program takes milliseconds
    SHAPES = [(1, 1, 40), (2, 2, 3), (1, 3, 120), (2, 16, 1), (3, 16, 40), (2, 33, 40), (1, 64, 3), (1, 129, 40)]


class LossCase(NamedTuple):
    """Arguments of the public function, and what the operation takes in the place of its constants."""

    inputs: Sequence[torch.Tensor]
    constants: Sequence[Any] = ()
    schema: Sequence[Any] = ()


def contrastive(groups: int, n: int, width: int) -> LossCase:
    inputs = [normal(groups, n, width), normal(groups, n + 2, width, seed=1)]
    return LossCase(inputs, (9.0, 1, "mean"), (9.0, 1, True))


def bound(groups: int, n: int, width: int) -> LossCase:
    inputs = [normal(groups, n, width), normal(groups, n, width, seed=1)]
    return LossCase([*inputs, normal(groups, width, seed=2, scale=0.3), normal(groups, seed=3)])


def two(groups: int, n: int, width: int) -> LossCase:
    return LossCase([normal(groups, n, width), normal(groups, n, width, seed=1)])


def prototypes(groups: int, n: int, width: int) -> LossCase:
    constants = (torch.arange(n, device=DEVICE).remainder(3).expand(groups, n), 4)
    return LossCase([normal(groups, n, width), normal(groups, n, width, seed=1)], constants, constants)


CASES = {
    "pairwise_contrastive": contrastive,
    "jsd_mutual_information": bound,
    "gaussian_mmd": two,
    "prototype_similarity": prototypes,
    "js_divergence": two,
}
