"""The compiled losses against plain PyTorch, forward and backward: `pytest bench/bench_losses.py --benchmark-enable`.

Parity is asserted before anything is timed. `OMP_NUM_THREADS` sets the threads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from fastmmkd import ops
from fastmmkd.ops import reference
from fastmmkd.testing.losses import check, normal
from fastmmkd.testing.parity import needs, value_and_gradients

pytestmark = needs("gaussian_mmd")

WIDTH, HIDDEN = 120, 64
CHECKED = 256
"""Rows that parity is asserted on."""


class BenchCase(NamedTuple):
    """Inputs, of which a method differentiates the first `learned`, and constants."""

    op: str
    size: str
    inputs: list[torch.Tensor]
    constants: tuple[Any, ...] = ()
    learned: int = 2


def pair(groups: int, n: int, width: int) -> list[torch.Tensor]:
    return [normal(groups, n, width, seed=seed) for seed in (0, 1)]


def cases() -> list[BenchCase]:
    """CorrKD's teacher does not learn. 16 is a method's batch, 6 groups are six seeds in one process."""
    listed = [
        BenchCase("pairwise_contrastive", f"N={n}", pair(1, n, WIDTH), (1.4 * WIDTH**0.5, 0, "mean"), 1)
        for n in (64, 1024, 8192)
    ]
    for groups, n in ((1, 16), (6, 16), (1, 512)):
        size = f"G={groups},N={n}"
        network = [normal(groups, HIDDEN, seed=2, scale=HIDDEN**-0.5), normal(groups, seed=3)]
        classes = torch.arange(n).remainder(2).expand(groups, n)
        listed += [
            BenchCase("jsd_mutual_information", size, pair(groups, n, HIDDEN) + network, (), 4),
            BenchCase("gaussian_mmd", size, pair(groups, n, WIDTH)),
            BenchCase("prototype_similarity", size, pair(groups, n, WIDTH), (classes, 2), 1),
            BenchCase("js_divergence", size, pair(groups, n, 7)),
        ]
    return listed


def differentiate(module: Any, case: BenchCase) -> list[torch.Tensor]:
    """The loss and the gradients of what learns."""
    fixed = (*case.inputs[case.learned :], *case.constants)
    grad = torch.ones(case.inputs[0].shape[0])
    return value_and_gradients(lambda *x: getattr(module, case.op)(*x, *fixed), case.inputs[: case.learned], grad)


def with_distances(case: BenchCase) -> list[torch.Tensor]:
    """`pairwise_contrastive` as one writes it in plain PyTorch where N^2 d numbers do not fit: `torch.cdist`."""
    (student, teacher), (eta, _, _) = case.inputs, case.constants
    student = student.detach().requires_grad_()
    n = student.shape[1]
    own = torch.eye(n, dtype=torch.bool)
    negative = (eta - torch.cdist(student, teacher)).clamp_min(0).square().masked_fill(own, 0).sum((1, 2))
    positive = (student - teacher).square().sum((1, 2))
    loss = ((n - 1) * positive + negative) / (n * (n - 1))
    return [loss.detach(), *torch.autograd.grad(loss.sum(), student)]


CONTENDERS = {
    "plain PyTorch": lambda case: differentiate(reference, case),
    "plain PyTorch, cdist": with_distances,
    "ours": lambda case: differentiate(ops, case),
}


def contenders(case: BenchCase) -> list[str]:
    """Those that can run a case: the reference of the pairwise loss holds N^2 d numbers."""
    if case.op != "pairwise_contrastive":
        return ["plain PyTorch", "ours"]
    return list(CONTENDERS)[1 if case.inputs[0].shape[1] > 1024 else 0 :]


@pytest.mark.parametrize(
    ("case", "contender"),
    [(case, contender) for case in cases() for contender in contenders(case)],
    ids=lambda x: f"{x.op}-{x.size}" if isinstance(x, BenchCase) else x,
)
def test_loss(case: BenchCase, contender: str, benchmark: BenchmarkFixture) -> None:
    assert ops.explain(case.op, *case.inputs).provider == "cpp"
    part = [x[:, :CHECKED] if x.dim() == 3 else x for x in case.inputs]
    constants = [x[:, :CHECKED] if isinstance(x, torch.Tensor) else x for x in case.constants]
    check(case.op, part, constants)
    if contender == "plain PyTorch, cdist":
        few = case._replace(inputs=part)
        for actual, expected in zip(with_distances(few), differentiate(reference, few), strict=True):
            torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)
    benchmark.group = f"{case.op}, {case.size}"
    benchmark.name = contender
    benchmark.extra_info["baselines"] = list(CONTENDERS)[:-1]
    benchmark.pedantic(CONTENDERS[contender], (case,), rounds=30, warmup_rounds=3)
