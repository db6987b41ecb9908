"""The compiled losses against plain PyTorch, forward and backward: `pytest bench/bench_losses.py --benchmark-enable`.

Parity is asserted before anything is timed. `OMP_NUM_THREADS` sets the threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from fastmmkd import ops
from fastmmkd.ops import reference
from tests.parity.losses import check, normal
from tests.parity.parity import needs_extension, value_and_gradients

pytestmark = needs_extension

WIDTH, HIDDEN = 120, 64
CHECKED = 256
"""Rows that parity is asserted on."""
PLAIN_PAIRS = 512 * 1024
"""Pairs that plain PyTorch takes at once: it holds several tensors of WIDTH times as many."""


class Case(NamedTuple):
    """Inputs, of which a method differentiates the first `learned`, and constants."""

    op: str
    size: str
    inputs: list[torch.Tensor]
    constants: tuple[Any, ...] = ()
    learned: int = 2


def pair(groups: int, n: int, width: int) -> list[torch.Tensor]:
    return [normal(groups, n, width, seed=seed) for seed in (0, 1)]


def cases() -> list[Case]:
    """CorrKD's teacher does not learn. 16 is a method's batch, 6 groups are six seeds in one process."""
    found = [
        Case("pairwise_contrastive", f"N={n}", pair(1, n, WIDTH), (1.4 * WIDTH**0.5, 0, "mean"), 1)
        for n in (64, 1024, 8192)
    ]
    for groups, n in ((1, 16), (6, 16), (1, 512)):
        size = f"G={groups},N={n}"
        network = [normal(groups, HIDDEN, seed=2, scale=HIDDEN**-0.5), normal(groups, seed=3)]
        classes = torch.arange(n).remainder(2).expand(groups, n)
        found += [
            Case("jsd_mutual_information", size, pair(groups, n, HIDDEN) + network, (), 4),
            Case("gaussian_mmd", size, pair(groups, n, WIDTH)),
            Case("prototype_similarity", size, pair(groups, n, WIDTH), (classes, 2), 1),
            Case("js_divergence", size, pair(groups, n, 7)),
        ]
    return found


def differentiate(module: Any, case: Case) -> list[torch.Tensor]:
    """The loss and the gradients of what learns."""
    fixed = (*case.inputs[case.learned :], *case.constants)
    grad = torch.ones(case.inputs[0].shape[0])
    return value_and_gradients(lambda *x: getattr(module, case.op)(*x, *fixed), case.inputs[: case.learned], grad)


def in_slices(case: Case) -> list[torch.Tensor]:
    """Plain PyTorch's `pairwise_contrastive` of a batch whose pairs do not fit into memory at once."""
    (student, teacher), (eta, _, _) = case.inputs, case.constants
    rows, step = student.shape[1], PLAIN_PAIRS // teacher.shape[1]
    parts = [
        differentiate(reference, case._replace(inputs=[student[:, i : i + step], teacher], constants=(eta, i, "sum")))
        for i in range(0, rows, step)
    ]
    losses, gradients = zip(*parts, strict=True)
    return [x / (rows * (rows - 1)) for x in (sum(losses), torch.cat(gradients, 1))]


@pytest.mark.parametrize("provider", ["reference", "cpp"])
@pytest.mark.parametrize("case", cases(), ids=lambda case: f"{case.op}-{case.size}")
def test_loss(case, provider, benchmark) -> None:
    rows = case.inputs[0].shape[1]
    assert ops.explain(case.op, *case.inputs).provider == "cpp"
    part = [x[:, :CHECKED] if x.dim() == 3 else x for x in case.inputs]
    constants = [x[:, :CHECKED] if isinstance(x, torch.Tensor) else x for x in case.constants]
    check(case.op, part, constants)
    if provider == "cpp":
        run, arguments = differentiate, (ops, case)
    elif case.op == "pairwise_contrastive" and rows**2 > PLAIN_PAIRS:
        run, arguments = in_slices, (case,)
    else:
        run, arguments = differentiate, (reference, case)
    rounds = 100 if rows <= 64 else 5 if rows < 1024 or (provider == "cpp" and rows == 1024) else 1
    benchmark.pedantic(run, arguments, rounds=rounds, warmup_rounds=rounds // 10)
