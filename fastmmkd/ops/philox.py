"""Philox4x32-10 (Salmon et al., SC 2011) on int64 tensors: the generator behind missing draws and dropout.

A draw is a pure function of (key, counter), so it does not depend on batch order, batch size, rank or backend; the
compiled kernels compute the same words.
"""

from typing import NamedTuple

import torch

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


class DrawKeys(NamedTuple):
    """What the draws of a batch are keyed by, on its device."""

    sample: torch.Tensor
    """`[S, B]` int64 rows of the training split."""
    seed: torch.Tensor
    """`[S]` int64."""
    epoch: torch.Tensor
    """0-dimensional int64."""


def philox(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], key: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Four 32-bit words for every counter.

    Args:
        counter: four int64 tensors of broadcastable shapes, values in [0, 2^32).
        key: two int64 tensors, broadcastable with the counter.

    Returns:
        `[..., 4]` int64, each in [0, 2^32).
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = key
    for round_index in range(ROUNDS):
        if round_index:
            k0, k1 = (k0 + WEYL[0]) & WORD, (k1 + WEYL[1]) & WORD
        # The product of two 32-bit words wraps in int64, but its two halves are still the right bits.
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & WORD, (product1 >> 32) & WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & WORD, high0 ^ c3 ^ k1, product0 & WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def uniform(words: torch.Tensor) -> torch.Tensor:
    """32-bit words -> float32 in [0, 1), from the upper 24 bits so that the value is exact on every device."""
    return (words >> 8).float() * 2.0**-24
