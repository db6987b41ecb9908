"""Arguments that an operation cannot take are named, with what was expected."""

from __future__ import annotations

import pytest
import torch

from fastmmkd import ops

X = torch.ones(2, 3, 4)
PADDED = torch.ones(2, 3, 5, 4)
MASK = torch.ones(2, 3, 5, dtype=torch.bool)
NUMBERS = "expected a tensor of float32, float16, bfloat16 or float64"


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ops.gaussian_mmd(X[0], X[0]), r"x is \(3, 4\), y is \(3, 4\); expected \[G, N, d\] twice"),
        (lambda: ops.gaussian_mmd(X.long(), X.long()), f"gaussian_mmd: x is of int64; {NUMBERS}"),
        (lambda: ops.pairwise_contrastive(X, X.long(), 1.0), f"pairwise_contrastive: teacher is of int64; {NUMBERS}"),
        (lambda: ops.js_divergence(X[0], X[0]), r"logits are \(3, 4\) and \(3, 4\); expected \[G, N, K\] twice"),
        (
            lambda: ops.cross_attention(PADDED, PADDED, [PADDED], [MASK], 2),
            r"keys is a tensor \(2, 3, 5, 4\); expected a list of 1 to 3 segments",
        ),
        (
            lambda: ops.cross_attention(PADDED, [PADDED], [PADDED], [MASK.long()], 2),
            r"segment 0: key_mask is of torch.int64; expected bool, True = may be attended to",
        ),
        (
            lambda: ops.cross_attention(PADDED[0], [PADDED[0]], [PADDED[0]], [MASK[0]], 2),
            r"query is \(3, 5, 4\); expected \[G, B, T, d\], or rows \[G, R, d\] and their layout",
        ),
        (
            lambda: ops.cross_attention(PADDED.long(), [PADDED.long()], [PADDED.long()], [MASK], 2),
            f"cross_attention: query is of int64; {NUMBERS}",
        ),
        (lambda: ops.residual_layer_norm(X[0, 0], X[0, 0], X[0], X[0]), r"x is \(4,\); expected \[G, ..., d\]"),
        (lambda: ops.residual_layer_norm(X, X, X[:, 0], X[0]), r"bias is \(3, 4\); expected \(2, 4\)"),
        (
            lambda: ops.prototype_similarity(X, X, torch.zeros(2, 3), 2),
            r"classes are \(2, 3\) torch.float32, student needs \(2, 3\) torch.int64",
        ),
    ],
)
def test_it_is_named(call, said) -> None:
    with pytest.raises(ValueError, match=said):
        call()
