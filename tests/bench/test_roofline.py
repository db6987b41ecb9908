"""The work of every operation, against counts by hand and against literal loops over numbers that count."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench import roofline
from bench.roofline import Ceilings
from fastmmkd.ops import OPERATIONS
from fastmmkd.ops.work import Work

ATTENTION, NORM = OPERATIONS["cross_attention"], OPERATIONS["residual_layer_norm"]


def work_of(name: str) -> Callable[..., Work]:
    return OPERATIONS[name].work


class Number:
    """A number that counts what is done to numbers."""

    operations = 0

    def __init__(self, value: float = 0.0) -> None:
        self.value = value

    def _of(self, value: float) -> Number:
        Number.operations += 1
        return Number(value)

    def __add__(self, other: Number) -> Number:
        return self._of(self.value + other.value)

    def __sub__(self, other: Number) -> Number:
        return self._of(self.value - other.value)

    def __mul__(self, other: Number) -> Number:
        return self._of(self.value * other.value)

    def __truediv__(self, other: Number) -> Number:
        return self._of(self.value / other.value)

    def exp(self) -> Number:
        return self._of(math.exp(self.value))

    def log(self) -> Number:
        return self._of(math.log(self.value))

    def sqrt(self) -> Number:
        return self._of(math.sqrt(self.value))


def row(size: int) -> list[Number]:
    return [Number(0.1 * i + 0.1) for i in range(size)]


def total(terms: list[Number]) -> Number:
    result = Number()
    for term in terms:
        result = result + term
    return result


def dot(a: list[Number], b: list[Number]) -> Number:
    return total([x * y for x, y in zip(a, b, strict=True)])


@pytest.fixture(autouse=True)
def from_zero() -> None:
    Number.operations = 0


ONE, WIDTH, KEYS, QUERIES, HEADS = Number(1.0), 5, 4, 3, 2
"""The width of a head."""


def attend() -> None:
    """One head."""
    keys, values = ([row(WIDTH) for _ in range(KEYS)] for _ in range(2))
    for _ in range(QUERIES):
        query = [x * ONE for x in row(WIDTH)]
        scores = [dot(query, key) for key in keys]
        weights = [(score - ONE).exp() for score in scores]
        whole = total(weights)
        out = [Number()] * WIDTH
        for weight, value in zip(weights, values, strict=True):
            out = [o + weight * v for o, v in zip(out, value, strict=True)]
        assert len([o / whole for o in out]) == WIDTH


def differentiate_attention() -> None:
    """One head."""
    keys, values, grad_keys, grad_values = ([row(WIDTH) for _ in range(KEYS)] for _ in range(4))
    for _ in range(QUERIES):
        grad, query, grad_query = row(WIDTH), [x * ONE for x in row(WIDTH)], [Number()] * WIDTH
        along = dot(grad, row(WIDTH))
        for j in range(KEYS):
            weight = (dot(query, keys[j]) - ONE).exp() * ONE
            slope = weight * (dot(grad, values[j]) - along)
            grad_values[j] = [a + weight * b for a, b in zip(grad_values[j], grad, strict=True)]
            grad_keys[j] = [a + slope * b for a, b in zip(grad_keys[j], query, strict=True)]
            grad_query = [a + slope * b for a, b in zip(grad_query, keys[j], strict=True)]
        assert len([x * ONE for x in grad_query]) == WIDTH


@pytest.mark.parametrize(
    ("literal", "work"),
    [
        (attend, ATTENTION.work),
        (differentiate_attention, ATTENTION.backward_work),
    ],
)
def test_attention_does_what_its_loops_do(literal, work) -> None:
    literal()
    one = work(1, [QUERIES], [KEYS], WIDTH, 1, 4)
    assert one.operations == Number.operations
    many = work(6, [QUERIES] * 7, [KEYS] * 7, HEADS * WIDTH, HEADS, 4)
    assert many.operations == 6 * 7 * HEADS * one.operations


def test_the_norm_does_what_its_loops_do() -> None:
    width = Number(float(WIDTH))
    added = [x + r for x, r in zip(row(WIDTH), row(WIDTH), strict=True)]
    mean = total(added) / width
    centred = [x - mean for x in added]
    scale = ONE / (dot(centred, centred) / width + ONE).sqrt()
    assert len([(x * scale) * w + b for x, w, b in zip(centred, row(WIDTH), row(WIDTH), strict=True)]) == WIDTH
    assert NORM.work(1, 1, WIDTH, 4).operations == Number.operations


def test_the_gradient_of_the_norm_does_what_its_loops_do() -> None:
    width, mean, scale, grad = Number(float(WIDTH)), ONE, ONE, row(WIDTH)
    normed = [((x + r) - mean) * scale for x, r in zip(row(WIDTH), row(WIDTH), strict=True)]
    assert len([w + g * n for w, g, n in zip(row(WIDTH), grad, normed, strict=True)]) == WIDTH
    assert len([b + g for b, g in zip(row(WIDTH), grad, strict=True)]) == WIDTH
    grad = [g * w for g, w in zip(grad, row(WIDTH), strict=True)]
    level, along = total(grad) / width, dot(grad, normed) / width
    assert len([((g - level) - n * along) * scale for g, n in zip(grad, normed, strict=True)]) == WIDTH
    assert NORM.backward_work(1, 1, WIDTH, 4).operations == Number.operations


def test_products_do_what_their_loops_do() -> None:
    rows, n, m = 3, WIDTH, 4
    for _ in range(rows):
        assert len([dot(row(n), row(n)) + ONE for _ in range(m)]) == m
    assert work_of("grouped_linear")(1, rows, n, m, 4).operations == Number.operations
    Number.operations = 0
    for _ in range(rows):
        assert len([dot(row(3 * n), row(3 * n)) + ONE for _ in range(m)]) == m
    assert work_of("temporal_convolution")(1, rows, n, m, 4).operations == Number.operations


def test_the_gradients_of_products_do_what_their_loops_do() -> None:
    rows, n, m = 3, WIDTH, 4
    for taps, name in ((1, "grouped_linear"), (3, "temporal_convolution")):
        Number.operations = 0
        assert len([dot(row(taps * m), row(taps * m)) for _ in range(rows) for _ in range(n)]) == rows * n
        assert len([dot(row(rows), row(rows)) for _ in range(taps * n) for _ in range(m)]) == taps * n * m
        assert len([total(row(rows)) for _ in range(m)]) == m
        assert OPERATIONS[name].backward_work(1, rows, n, m, 4).operations == Number.operations


def linear(rows: int, n: int, m: int, bias: bool = True) -> int:
    """Operations of a product."""
    Number.operations = 0
    for _ in range(rows * m):
        out = dot(row(n), row(n))
        if bias:
            out + ONE
    return Number.operations


def test_an_encoder_layer_does_what_its_steps_do() -> None:
    g, t, d, h = 2, [QUERIES, 2, 5], HEADS * WIDTH, HEADS
    rows = g * sum(t)
    steps = linear(rows, d, 3 * d, bias=False) + linear(rows, d, d) + linear(rows, d, 4 * d) + linear(rows, 4 * d, d)
    steps += ATTENTION.work(g, t, t, d, h, 4).operations + 2 * NORM.work(g, sum(t), d, 4).operations
    assert work_of("encoder_layer")(g, t, d, h, 4).operations == steps
    backward = ATTENTION.backward_work(g, t, t, d, h, 4).operations
    backward += 2 * NORM.backward_work(g, sum(t), d, 4).operations
    backward += 2 * linear(rows, d, 12 * d, bias=False) + rows * (6 * d + 2 * d)  # biases, residuals
    assert OPERATIONS["encoder_layer"].backward_work(g, t, d, h, 4).operations == backward


def test_a_crossmodal_layer_does_what_its_steps_do() -> None:
    s, t, d, h = 2, [QUERIES, 2, 5], HEADS * WIDTH, HEADS
    rows = s * sum(t)
    steps = 9 * linear(rows, d, d, bias=False) + 21 * linear(rows, d, 2 * d, bias=False) + 9 * linear(rows, d, d)
    steps += 3 * (linear(rows, d, 4 * d) + linear(rows, 4 * d, d)) + 3 * rows * d  # the sum of fine attentions
    of_attention = ((3 * s, [3 * n for n in t]), (6 * s, [2 * n for n in t]))
    steps += sum(ATTENTION.work(g, t, k, d, h, 4).operations for g, k in of_attention)
    steps += NORM.work(12 * s, sum(t), d, 4).operations
    assert work_of("crossmodal_layer")(s, t, d, h, 4).operations == steps
    backward = sum(ATTENTION.backward_work(g, t, k, d, h, 4).operations for g, k in of_attention)
    backward += NORM.backward_work(12 * s, sum(t), d, 4).operations
    backward += 2 * linear(rows, d, 84 * d, bias=False) + rows * (24 * d + 12 * d)  # biases, residuals
    assert OPERATIONS["crossmodal_layer"].backward_work(s, t, d, h, 4).operations == backward


@pytest.mark.parametrize("gradients", [False, True])
def test_the_pairwise_loss_does_what_its_loops_do(gradients) -> None:
    loss, samples, rows = Number(), 2, 3
    for _ in range(samples):
        grad = [Number()] * WIDTH
        for _ in range(rows):
            apart = [a - b for a, b in zip(row(WIDTH), [ONE] * WIDTH, strict=True)]
            distance = dot(apart, apart).sqrt()
            margin = ONE - distance
            loss = loss + margin * margin
            if gradients:
                factor = ONE * margin / distance
                grad = [g + factor * x for g, x in zip(grad, apart, strict=True)]
    assert work_of("pairwise_contrastive")(1, samples, rows, WIDTH, 4, gradients).operations == Number.operations


@pytest.mark.parametrize("gradients", [False, True])
def test_the_mmd_does_what_its_loops_do(gradients) -> None:
    samples, whole, kernel = 2, Number(), Number()
    grads = [[Number()] * WIDTH for _ in range(2 * samples)]
    for i in range(2 * samples):
        for j in range(i):
            apart = [a - b for a, b in zip(row(WIDTH), [ONE] * WIDTH, strict=True)]
            squared = dot(apart, apart)
            whole = whole + squared
            values = [(squared * Number(-0.1)).exp()]
            for _ in range(4):
                values.append(values[-1] * values[-1])
            for value in values:
                kernel = kernel + value
            if gradients:
                factor = dot(values, row(5)) * ONE
                steps = [factor * x for x in apart]
                grads[i] = [g + s for g, s in zip(grads[i], steps, strict=True)]
                grads[j] = [g - s for g, s in zip(grads[j], steps, strict=True)]
    assert work_of("gaussian_mmd")(1, samples, WIDTH, 4, gradients).operations == Number.operations


@pytest.mark.parametrize("gradients", [False, True])
def test_the_mutual_information_does_what_its_loops_do(gradients) -> None:
    samples, loss, slope = 2, Number(), Number()
    for _ in range(samples**2):
        hidden = [a + b for a, b in zip(row(WIDTH), row(WIDTH), strict=True)]  # relu compares
        score = dot(hidden, row(WIDTH)) + ONE
        grown = score.exp()
        loss = loss + (grown + ONE).log()
        if gradients:
            factor = grown / (grown + ONE) * ONE
            slope = slope + factor
            for weight, unit, left, right, of_weight in zip(*(row(WIDTH) for _ in range(5)), strict=True):
                step = factor * weight
                assert len([left + step, right + step, of_weight + factor * unit]) == 3
    assert work_of("jsd_mutual_information")(1, samples, WIDTH, 4, gradients).operations == Number.operations


@pytest.mark.parametrize("gradients", [False, True])
def test_the_divergence_does_what_its_loops_do(gradients) -> None:
    def probabilities() -> tuple[list[Number], list[Number]]:
        shifted = [x - ONE for x in row(WIDTH)]
        grown = [x.exp() for x in shifted]
        whole = total(grown)
        level = whole.log()
        return [x / whole for x in grown], [x - level for x in shifted]

    (a, log_a), (b, log_b) = probabilities(), probabilities()
    log_mean = [((x + y) * Number(0.5)).log() for x, y in zip(a, b, strict=True)]
    for p, log_p in ((a, log_a), (b, log_b)):
        apart = [x - y for x, y in zip(log_p, log_mean, strict=True)]
        kl = dot(p, apart)
        if gradients:
            assert len([ONE * x * (y - kl) for x, y in zip(p, apart, strict=True)]) == WIDTH
    assert work_of("js_divergence")(1, 1, WIDTH, 4, gradients).operations == Number.operations


def test_the_prototypes_by_hand() -> None:
    """Two samples, three features, one class, both networks: sums 6, squared norms 12, and of the prototype 3 + 6."""
    assert work_of("prototype_similarity")(1, 2, 3, 1, 4, False).operations == 2 * (6 + 12 + 9 + 12 + 4) + 6
    assert work_of("prototype_similarity")(5, 2, 3, 1, 4, True).operations == 5 * (92 + 24 + 36)


def half(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.float16, device="meta")


def exact(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


def flags(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bool, device="meta")


def moved(op: str, *args: Any) -> int:
    """Bytes of the tensors that a compiled operation takes and gives."""
    return _bytes([args, getattr(torch.ops.fastmmkd, op)(*args)])


def _bytes(tree: Any) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    return sum(map(_bytes, tree)) if isinstance(tree, list | tuple) else 0


def test_bytes_of_attention_are_those_of_inputs_and_outputs() -> None:
    groups, frames, keys, width, heads = 2, (5, 2, 1), ((5, 2, 1), (7, 9, 3)), 8, 4
    x, parts = half(groups, 8, width), [half(groups, sum(k), width) for k in keys]
    masks, statistics = [flags(1, sum(k)) for k in keys], exact(groups, heads, 2, 8)
    starts = torch.empty((1, 4), dtype=torch.int64, device="meta")
    inputs, where = (x, parts, parts, masks, starts, [starts] * 2, [5, 5, 9]), 3 * 4 * 8
    sizes = groups, frames, (12, 11, 4), width, heads, 2
    assert ATTENTION.work(*sizes).bytes == moved("cross_attention", *inputs, heads) - where
    args = x, *inputs, x, statistics, heads
    assert ATTENTION.backward_work(*sizes).bytes == moved("cross_attention_backward", *args) - where


def test_bytes_of_the_norm_are_those_of_inputs_and_outputs() -> None:
    x, affine, statistics = half(2, 6, 8), half(2, 8), exact(2, 6)
    traffic = moved("residual_layer_norm", x, x, affine, affine, 1e-5)
    assert NORM.work(2, 6, 8, 2).bytes == traffic
    traffic = moved("residual_layer_norm_backward", x, x, x, affine, statistics, statistics)
    assert NORM.backward_work(2, 6, 8, 2).bytes == traffic


@pytest.mark.parametrize("gradients", [False, True])
def test_bytes_of_losses_are_those_of_inputs_and_outputs(gradients) -> None:
    x, more, classes = half(2, 6, 8), half(2, 9, 8), torch.empty((2, 6), dtype=torch.int64, device="meta")
    both, one = [gradients, gradients], [gradients, False]
    assert work_of("gaussian_mmd")(2, 6, 8, 2, gradients).bytes == moved("gaussian_mmd", x, x, both)
    assert work_of("js_divergence")(2, 6, 8, 2, gradients).bytes == moved("js_divergence", x, x, both)
    traffic = moved("pairwise_contrastive", x, more, 1.2, 0, True, one)
    assert work_of("pairwise_contrastive")(2, 6, 9, 8, 2, gradients).bytes == traffic
    traffic = moved("prototype_similarity", x, x, classes, 2, one)
    assert work_of("prototype_similarity")(2, 6, 8, 2, 2, gradients).bytes == traffic
    traffic = moved("jsd_mutual_information", x, x, half(2, 8), half(2), [gradients] * 4)
    assert work_of("jsd_mutual_information")(2, 6, 8, 2, gradients).bytes == traffic


def test_fractions() -> None:
    assert roofline.fraction(Work(200, 50), 2.0, Ceilings(400.0, 100.0)) == Ceilings(0.25, 0.25)


def test_a_draw_that_keeps_half() -> None:
    assert work_of("missing_draw")((30, 42), (4, 1), 2, 0.5) == Work(30 * (8 + 4 + 2) + 42 * (2 + 1 + 2), 0)


@pytest.mark.parametrize("op", [op for op in OPERATIONS.values() if op.kernels], ids=lambda op: op.name)
def test_everything_with_kernels_has_a_formula(op) -> None:
    assert op.work
    assert bool(op.backward_work) == (op.gradient == "backward")


def test_ceilings_of_a_cpu() -> None:
    ceilings = roofline.measure_ceilings(torch.device("cpu"), torch.float32, copied=2**22, side=128, repeats=3)
    assert 1e8 < ceilings.bandwidth < 1e13
    assert 1e8 < ceilings.arithmetic < 1e15
