"""How close a kernel comes to what its device can do: the work of every operation, and a device's ceilings.

Bytes are those of inputs and outputs, each moved once. Operations are additions, subtractions, multiplications,
divisions, roots, exponentials and logarithms in the least that an algorithm without stored pairs does; a sum of n terms
counts n, comparisons count nothing.

Shape legend: G groups, B rows of a batch, T queries or frames, K keys, H heads, R rows, D features, N samples, M rows
of the other side, C classes, V versions; e bytes of an element.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

FLOAT = 4
"""Bytes of float32, in which statistics, losses and their gradients are."""


class Ceilings(NamedTuple):
    """What a device reaches: bytes per second of a copy, operations per second of a matrix product."""

    bandwidth: float
    arithmetic: float


class Work(NamedTuple):
    """What an operation must move and compute."""

    bytes: int
    operations: int

    def fraction(self, seconds: float, ceilings: Ceilings) -> Ceilings:
        """Shares of the two ceilings that doing the work in `seconds` reaches; the larger says what bounds it."""
        return Ceilings(self.bytes / seconds / ceilings.bandwidth, self.operations / seconds / ceilings.arithmetic)


def cross_attention(g: int, b: int, t: int, k: int, d: int, h: int, e: int) -> Work:
    """`G B ((2 T D + 2 K D) e + K + 8 H T)` bytes: query, out, keys, values, mask, statistics.

    `G B (T K (4 D + 3 H) + 2 T D)` operations: two products; difference, exponential and sum of a score; scaling the
    query and dividing by the sum. K counts the keys that are present.
    """
    return Work(
        g * b * ((2 * t * d + 2 * k * d) * e + k + 2 * FLOAT * h * t), g * b * (t * k * (4 * d + 3 * h) + 2 * t * d)
    )


def cross_attention_backward(g: int, b: int, t: int, k: int, d: int, h: int, e: int) -> Work:
    """`G B ((4 T D + 4 K D) e + K + 8 H T)` bytes: grad, query, out, grad of query; keys, values and their gradients.

    `G B (T K (10 D + 5 H) + 4 T D)` operations: five products; a score's weight (difference, exponential, product) and
    its gradient (difference, product); scaling the query and its gradient, and the product of grad and out.
    """
    return Work(
        g * b * ((4 * t * d + 4 * k * d) * e + k + 2 * FLOAT * h * t), g * b * (t * k * (10 * d + 5 * h) + 4 * t * d)
    )


def residual_layer_norm(g: int, r: int, d: int, e: int) -> Work:
    """`G (3 R D e + 2 D e + 8 R)` bytes: x, residual, out, the affine map, mean and 1 / deviation.

    `G R (8 D + 5)` operations: sum, mean, centre, square and add, scale, affine map; two divisions, eps, root, inverse.
    """
    return Work(g * (3 * r * d * e + 2 * d * e + 2 * FLOAT * r), g * r * (8 * d + 5))


def residual_layer_norm_backward(g: int, r: int, d: int, e: int) -> Work:
    """`G (4 R D e + D e + 8 D + 8 R)` bytes: grad, x, residual, gradient of their sum; weight, its and the bias'
    gradients; statistics.

    `G R (14 D + 2)` operations: the normalised x 3, gradients of weight 2 and bias 1, times weight 1, two means 3,
    what they take away and the scale 4; two divisions.
    """
    return Work(g * (4 * r * d * e + d * e + 2 * FLOAT * d + 2 * FLOAT * r), g * r * (14 * d + 2))


def gaussian_mmd(g: int, n: int, d: int, e: int, gradients: bool) -> Work:
    """`G (2 N D e + 4)` bytes, and `8 N D` for the gradients.

    `G P (3 D + 12)` operations for P = N (2 N - 1) pairs: distance; its sum; scale, exponential, four squares, five
    sums. Gradients: `3 D + 11` more, five products of kernel and bandwidth with their sums, a factor, one product and
    two sums per feature.
    """
    pairs, moved = n * (2 * n - 1), 2 * n * d
    return _loss(g, moved * e, moved * gradients, pairs * (3 * d + 12 + (3 * d + 11) * gradients))


def js_divergence(g: int, n: int, c: int, e: int, gradients: bool) -> Work:
    """`G (2 N C e + 4)` bytes, and `8 N C` for the gradients.

    `G N (19 C + 2)` operations: for both inputs difference, exponential, sum, division, log-probability; mean 2 and its
    logarithm; for both difference, product and sum; two logarithms of sums. Gradients: `6 C` more.
    """
    moved = 2 * n * c
    return _loss(g, moved * e, moved * gradients, n * (19 * c + 2 + 6 * c * gradients))


def pairwise_contrastive(g: int, n: int, m: int, d: int, e: int, gradients: bool) -> Work:
    """`G ((N + M) D e + 4)` bytes, and `4 N D` for the student's gradient.

    `G N M (3 D + 4)` operations: distance, root, margin, square, sum. Gradient: `2 D + 2` more, the factor and, per
    feature, a product and a sum.
    """
    return _loss(g, (n + m) * d * e, n * d * gradients, n * m * (3 * d + 4 + (2 * d + 2) * gradients))


def prototype_similarity(g: int, n: int, d: int, c: int, e: int, gradients: bool) -> Work:
    """`G (2 N D e + 8 N + 4)` bytes (classes are int64), and `4 N D` for the student's gradient.

    `G (2 (3 N D + 3 C D + 2 N C D + 2 N C) + 3 N C)` operations: for both networks the sums of the classes, squared
    norms, prototypes, products and their two scales; differences, squares, sums. Gradient: `4 N C D + 6 N D` more.
    """
    both = 2 * (3 * n * d + 3 * c * d + 2 * n * c * d + 2 * n * c)
    more = (4 * n * c * d + 6 * n * d) * gradients
    return _loss(g, 2 * n * d * e + 8 * n, n * d * gradients, both + 3 * n * c + more)


def jsd_mutual_information(g: int, n: int, d: int, e: int, gradients: bool) -> Work:
    """`G ((2 N D + D + 1) e + 4)` bytes (D is the hidden width), and `4 (2 N D + D + 1)` for the gradients.

    `G N^2 (3 D + 5)` operations: sum, product and sum per hidden unit; bias, exponential, sum, logarithm, sum.
    Gradients: `5 D + 4` more: the sigmoid and its factor 3, bias 1; per hidden unit a product and two sums, and a
    product and a sum for its weight.
    """
    moved = 2 * n * d + d + 1
    return _loss(g, moved * e, moved * gradients, n * n * (3 * d + 5 + (5 * d + 4) * gradients))


def missing_draw(v: int, b: int, lengths: Sequence[int], widths: Sequence[int], e: int, left: float = 1.0) -> Work:
    """`V B sum_m T_m (D_m e (1 + left) + 2)` bytes: `left` is the share of frames that are read and kept; masks.

    No operations: its arithmetic is on integers.
    """
    frames = zip(lengths, widths, strict=True)
    return Work(round(v * b * sum(t * (d * e * (1 + left) + 2) for t, d in frames)), 0)


def _loss(groups: int, read: int, written: int, operations: int) -> Work:
    """Bytes read and float32 elements written besides the loss, of one group."""
    return Work(groups * (read + FLOAT * written + FLOAT), groups * operations)


def measure_ceilings(
    device: torch.device, dtype: torch.dtype, copied: int = 2**28, side: int = 4096, repeats: int = 10
) -> Ceilings:
    """The best of `repeats` copies of `copied` bytes, and of as many products of square matrices of `side`."""
    source = torch.zeros(copied, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    matrix = torch.ones(side, side, dtype=dtype, device=device)
    product = torch.empty_like(matrix)
    copying = _best(device, repeats, lambda: target.copy_(source))
    multiplying = _best(device, repeats, lambda: torch.mm(matrix, matrix, out=product))
    return Ceilings(2 * copied / copying, 2 * side**3 / multiplying)


def _best(device: torch.device, repeats: int, run: Callable[[], object]) -> float:
    """Seconds of the fastest run after one that warms up."""
    run()
    return min(_timed(device, run) for _ in range(repeats))


def _timed(device: torch.device, run: Callable[[], object]) -> float:
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return time.perf_counter() - begin
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3
