"""Every operation at the sizes that the shipped configs train at: what a short check on a new device runs first."""

from __future__ import annotations

import pytest
import torch

from fastmmkd.ops import OPERATIONS, cross_attention, missing_draw, reference, residual_layer_norm, use_provider
from fastmmkd.ops.providers import INTERPRETED
from fastmmkd.testing import attention, losses, norm
from fastmmkd.testing.parity import (
    DEVICE,
    DTYPES,
    PROVIDER,
    assert_as_exact,
    needs,
    poisoned_memory,
    value_and_gradients,
)

BATCH, VERSIONS, FRAMES, WIDTH, HEADS = 16, 2, 50, 40, 8
"""UMDF on MOSEI, the config that takes longest; CorrKD has 32 samples in one version."""
ROWS = VERSIONS * BATCH
FEATURES = (300, 74, 35)
if INTERPRETED:  # a program takes milliseconds
    BATCH, ROWS, FRAMES = 4, 1, 20

ATTENTION = {
    "coarse": (3, ROWS, FRAMES, (FRAMES,) * 3, HEADS, WIDTH // HEADS),
    "fine": (6, ROWS, FRAMES, (FRAMES,) * 2, HEADS, WIDTH // HEADS),
    "of a modality": (3, ROWS, FRAMES, (FRAMES,), HEADS, WIDTH // HEADS),
    "joint": (1, ROWS, FRAMES, (FRAMES,), HEADS, 3 * WIDTH // HEADS),
}
NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
LOSSES = {
    "gaussian_mmd": (1, BATCH, 3 * WIDTH),
    "js_divergence": (1, BATCH, 7),
    "pairwise_contrastive": (1, 2 * BATCH, 3 * WIDTH),
    "prototype_similarity": (1, 2 * BATCH, 3 * WIDTH),
    "jsd_mutual_information": (1, 2 * BATCH, 64),
}


def of(op: str, *parameters) -> pytest.MarkDecorator:
    """Cases of an operation, skipped where the provider under test has no kernels of it."""
    return pytest.param(op, *parameters, marks=needs(op), id="-".join(map(str, (op, *parameters))))


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(("op", "what"), [of("cross_attention", what) for what in ATTENTION])
def test_attention(op, what, dtype) -> None:
    case = attention.draw(*ATTENTION[what], dtype)
    with use_provider(PROVIDER), poisoned_memory():
        found = case.run(cross_attention)
    attention.hold(case, found)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(("op", "groups", "width"), [of("residual_layer_norm", n, d) for n, d in ((3, 40), (1, 120))])
def test_norm(op, groups, width, dtype) -> None:
    inputs, grad = norm.draw((groups, ROWS, FRAMES, width), dtype)
    with use_provider(PROVIDER), poisoned_memory():
        found = value_and_gradients(residual_layer_norm, inputs, grad)
    plain = value_and_gradients(reference.residual_layer_norm, inputs, grad)
    exact = value_and_gradients(reference.residual_layer_norm, [x.double() for x in inputs], grad)
    for i, name in enumerate(norm.NAMES):
        assert_as_exact(name, found[i], plain[i], exact[i], 3 if i else 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("op", [of(op) for op in LOSSES])
def test_loss(op, dtype) -> None:
    case = losses.CASES[op](*LOSSES[op])
    losses.check(op, [x.to(dtype) for x in case.inputs], case.constants)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("op", [of("missing_draw")])
def test_draw(op, dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    present = torch.rand(8 * BATCH, 3, generator=generator) < 0.7
    masks = [(torch.rand(8 * BATCH, FRAMES, generator=generator) < 0.8) & present[:, m, None] for m in range(3)]
    features = [
        (torch.randn(8 * BATCH, FRAMES, d, generator=generator) * mask.unsqueeze(-1)).to(DEVICE, dtype)
        for d, mask in zip(FEATURES, masks, strict=True)
    ]
    rows = torch.randperm(8 * BATCH, generator=generator)[None, :BATCH]
    keys = [x.to(DEVICE) for x in (present, rows, torch.tensor([7]), torch.tensor(3))]
    arguments = features, [mask.to(DEVICE) for mask in masks], *keys, VERSIONS, 0.7
    with use_provider(PROVIDER), poisoned_memory():
        found = missing_draw(*arguments)
    expected = reference.missing_draw(*arguments)
    for x, y in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def test_every_operation_has_a_case() -> None:
    compiled = {name for name, op in OPERATIONS.items() if op.kernels}
    assert {"cross_attention", "residual_layer_norm", "missing_draw", *LOSSES} == compiled
