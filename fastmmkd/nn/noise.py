"""Normal noise that is a pure function of what it is keyed by, as dropout is (`fastmmkd.nn.dropout`).

The key of Philox4x32-10 is the seed, its counter is (four elements, sample, epoch, stream); a stream is a place in the
network, and lies beyond those of dropout. Two words make two numbers (Box and Muller 1958).

Shape legend: S models, B samples, d features.
"""

from __future__ import annotations

import math

import torch

from fastmmkd.nn.dropout import STREAMS
from fastmmkd.ops.philox import WORD, DrawKeys, philox, uniform

NOISE_STREAMS = STREAMS + (1 << 30)
"""They begin here."""
NUMBERS = 4
"""That one counter gives."""


def normal_noise(draw: DrawKeys, place: int, d: int, dtype: torch.dtype) -> torch.Tensor:
    """`N(0, 1)`, `[S, B, d]`: for every sample of a batch its own numbers, whoever lies beside it.

    Args:
        draw: the keys of the batch.
        place: which of the network's noises this is.
    """
    blocks = torch.arange(-(-d // NUMBERS), device=draw.sample.device)
    counter = (
        blocks & WORD,
        draw.sample.unsqueeze(-1) & WORD,
        draw.epoch & WORD,
        torch.full_like(blocks, NOISE_STREAMS + place),
    )
    seed = draw.seed.view(-1, 1, 1)
    u = uniform(philox(counter, (seed & WORD, (seed >> 32) & WORD)))  # [S, B, blocks, 4]
    radius = (-2 * (1 - u[..., :2]).log()).sqrt()  # of numbers in (0, 1]
    angle = 2 * math.pi * u[..., 2:]
    return torch.cat((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(-2)[..., :d].to(dtype)
