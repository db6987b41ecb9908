"""Every operation at the sizes that the shipped configs train at: what a short check on a new device runs first."""

from __future__ import annotations

import pytest
import torch

from fastmmkd.ops import (
    OPERATIONS,
    cross_attention,
    crossmodal_layer,
    encoder_layer,
    grouped_linear,
    missing_draw,
    reference,
    residual_layer_norm,
    temporal_convolution,
    use_provider,
)
from fastmmkd.ops.providers import INTERPRETED
from fastmmkd.testing import attention, draws, layers, losses, norm
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


def drawn_lengths(models: int) -> list[list[int]]:
    """Of the samples of a batch, any up to FRAMES."""
    return torch.randint(1, FRAMES + 1, (models, ROWS), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(("op", "what"), [of("cross_attention", what) for what in ATTENTION])
def test_attention(op, what, dtype) -> None:
    case = attention.draw(*ATTENTION[what], dtype)
    with use_provider(PROVIDER), poisoned_memory():
        results = case.run(cross_attention)
    attention.hold(case, results)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(("op", "models"), [of("cross_attention", models) for models in (1, 2)])
def test_ragged_attention(op, models, dtype) -> None:
    case = attention.draw_ragged(6, [drawn_lengths(models)] * 3, [models, 6], HEADS, WIDTH // HEADS, dtype)
    with use_provider(PROVIDER), poisoned_memory():
        actual = case.run(cross_attention)
    attention.hold(case, actual)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(("op", "groups", "width"), [of("residual_layer_norm", n, d) for n, d in ((3, 40), (1, 120))])
def test_norm(op, groups, width, dtype) -> None:
    inputs, grad = norm.draw((groups, ROWS, FRAMES, width), dtype)
    with use_provider(PROVIDER), poisoned_memory():
        fast = value_and_gradients(residual_layer_norm, inputs, grad)
    plain = value_and_gradients(reference.residual_layer_norm, inputs, grad)
    exact = value_and_gradients(reference.residual_layer_norm, [x.double() for x in inputs], grad)
    for i, name in enumerate(norm.NAMES):
        assert_as_exact(name, fast[i], plain[i], exact[i], 3 if i else 2)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(
    ("op", "groups", "width"), [of("encoder_layer", (1, 3), WIDTH), of("encoder_layer", (1,), 3 * WIDTH)]
)
def test_encoder(op, groups, width, dtype) -> None:
    case = layers.draw_encoder(groups, drawn_lengths(1), 1, HEADS, width // HEADS, dtype)
    with use_provider(PROVIDER), poisoned_memory():
        actual = case.run(encoder_layer)
    layers.hold(case, actual)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize("op", [of("grouped_linear")])
def test_linear(op, dtype) -> None:
    inputs, grad = layers.draw_linear((1,), (ROWS * FRAMES,), 3 * WIDTH, 3 * WIDTH, dtype)
    with use_provider(PROVIDER), poisoned_memory():
        fast = value_and_gradients(grouped_linear, inputs, grad)
    plain = value_and_gradients(reference.grouped_linear, inputs, grad)
    exact = value_and_gradients(reference.grouped_linear, [x.double() for x in inputs], grad)
    for name, *values in zip(("out", "grad x", "grad weight", "grad bias"), fast, plain, exact, strict=True):
        assert_as_exact(name, *values, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(("op", "width"), [of("temporal_convolution", width) for width in FEATURES])
def test_convolution(op, width, dtype) -> None:
    inputs, layout, grad = layers.draw_convolution(1, drawn_lengths(1), width, WIDTH, dtype)

    def of_layout(implementation):
        return lambda x, weight, bias: implementation(x, layout, weight, bias)

    with use_provider(PROVIDER), poisoned_memory():
        fast = value_and_gradients(of_layout(temporal_convolution), inputs, grad)
    plain = value_and_gradients(of_layout(reference.temporal_convolution), inputs, grad)
    exact = value_and_gradients(of_layout(reference.temporal_convolution), [x.double() for x in inputs], grad)
    for name, *values in zip(("out", "grad x", "grad weight", "grad bias"), fast, plain, exact, strict=True):
        assert_as_exact(name, *values, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=NAMES.get)
@pytest.mark.parametrize(("op", "models"), [of("crossmodal_layer", models) for models in (1, 2)])
def test_crossmodal(op, models, dtype) -> None:
    case = layers.draw_crossmodal(models, drawn_lengths(models), HEADS, WIDTH // HEADS, dtype)
    with use_provider(PROVIDER), poisoned_memory():
        actual = case.run(crossmodal_layer)
    layers.hold(case, actual)


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
    split = draws.split(present, (FRAMES,) * 3, FEATURES, (dtype,) * 3, generator=generator)
    sample = torch.randperm(8 * BATCH, generator=generator)[None, :BATCH].to(DEVICE)
    keys = sample, torch.tensor([7], device=DEVICE), torch.tensor(3, device=DEVICE)
    arguments = *split, *keys, split.layouts(sample, VERSIONS, spare=2), VERSIONS, 0.7
    with use_provider(PROVIDER), poisoned_memory():
        drawn = missing_draw(*arguments)
    expected = reference.missing_draw(*arguments)
    for x, y in zip([*drawn[0], *drawn[1]], [*expected[0], *expected[1]], strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def test_every_operation_has_a_case() -> None:
    compiled = {name for name, op in OPERATIONS.items() if op.kernels}
    products = {"grouped_linear", "temporal_convolution"}
    blocks = {"cross_attention", "residual_layer_norm", "encoder_layer", "crossmodal_layer"}
    assert {*products, *blocks, "missing_draw", *LOSSES} == compiled
