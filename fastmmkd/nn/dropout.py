"""Dropout whose masks are a pure function of what they are keyed by (no paper mentions dropout).

The key of Philox4x32-10 is the seed, its counter is (block of elements, sample, epoch, stream). A stream is a dropout
of the network, one of its groups, and a version of the samples; its top bit sets it apart from the missing draws. Each
word decides on two elements, by 16 bits each. So a mask does not depend on batch order, batch size, rank, the models
beside it, or the padding before a sample. Evaluation and frozen teachers have no keys, and hence no dropout.

Shape legend: S models, n groups of a layer, V versions of B samples, R rows, d features.
"""

from __future__ import annotations

import torch
from torch import nn

from fastmmkd.ops.layout import Layout
from fastmmkd.ops.philox import WORD, DrawKeys, philox

STREAMS = 1 << 31
"""They begin here; the versions of missing draws end far below."""
GROUPS, VERSIONS = 1 << 8, 1 << 4
"""Room for so many groups of a dropout, and versions of a sample."""
LEVELS = 1 << 16
"""Rates are multiples of 1 / LEVELS."""
DECISIONS = 8
"""Elements that one counter decides on."""


class Dropout(nn.Module):
    """`x m / (1 - rate)`, each element of m being 0 with probability `rate`, else 1.

    Args:
        rate: in [0, 1); rounded to a multiple of `1 / LEVELS`.
    """

    place: int
    """Which dropout of its network this is, so that no two have the same masks; see `number_dropouts`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.dropped = min(round(rate * LEVELS), LEVELS - 1)
        """Of `LEVELS`, how many drop an element."""

    def is_off(self, draw: DrawKeys | None) -> bool:
        """Whether `forward` returns its input."""
        return not self.dropped or (draw is None and not self.training)

    def forward(self, x: torch.Tensor, layout: Layout, draw: DrawKeys | None, first: int = 0) -> torch.Tensor:
        """`[S * n, R, d]` -> the same; x itself where the rate is 0 or, in evaluation mode, `draw` is None.

        Args:
            x: the groups of one model side by side.
            layout: whose rows they are: V versions of the samples of `draw`, version-major.
            draw: the keys of its batch, `[S, B]`.
            first: which of the layer's groups x begins with, where it holds a part of them.

        Raises:
            ValueError: there are no keys in training mode: somebody on the way has not handed them on.
        """
        if not self.dropped:
            return x
        if draw is None:
            if self.training:
                raise ValueError("dropout needs the keys of its batch in training mode")
            return x
        kept = kept_elements(self.dropped, self.place, draw, layout, x.shape, first)
        return x * (kept.to(x.dtype) * (LEVELS / (LEVELS - self.dropped)))


def of_samples(layout: Layout) -> Layout:
    """A layout of one row per sample: whose the rows `[S, B, d]` are that a network makes of whole samples."""
    return Layout.of(torch.ones_like(layout.lengths), layout.batch, 1, is_uniform=True)


def number_dropouts(network: nn.Module) -> None:
    """Give every dropout of a network, once it is built, its place."""
    for place, module in enumerate(module for module in network.modules() if isinstance(module, Dropout)):
        module.place = place


def kept_elements(
    dropped: int, place: int, draw: DrawKeys, layout: Layout, shape: torch.Size, first: int
) -> torch.Tensor:
    """m, `[S * n, R, d]` bool; arguments as `Dropout` has them, `shape` that of x."""
    groups, rows, d = shape
    models, samples = draw.sample.shape
    device = draw.sample.device
    group = torch.arange(first, first + groups // models, device=device)
    whose = layout.sample.clamp_max(layout.batch - 1)
    stream_snr = STREAMS + (place * GROUPS + group[:, None]) * VERSIONS + (whose // samples)[:, None, :]
    blocks = -(-d // DECISIONS)
    # Frames count from the last one, which no padding moves.
    frame = layout.starts.gather(1, whose + 1) - 1 - torch.arange(rows, device=device)
    block_sr = frame.clamp_min(0)[..., None] * blocks + torch.arange(blocks, device=device)
    counter = (  # broadcast to [S, n, R, blocks]
        block_sr[:, None] & WORD,
        draw.sample.gather(1, whose % samples)[:, None, :, None] & WORD,
        draw.epoch & WORD,
        stream_snr[..., None],
    )
    seed = draw.seed.view(-1, 1, 1, 1)
    words = philox(counter, (seed & WORD, (seed >> 32) & WORD))
    levels = torch.stack((words & (LEVELS - 1), words >> 16), dim=-1).flatten(-3)[..., :d]
    return (levels >= dropped).view(shape)
