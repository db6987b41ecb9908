"""Ragged batches: the frames of all samples one after the other, without padding, and where each sample's lie.

Shape legend: S models, G groups (S times those of a layer), B samples of a batch, R rows, T frames of the longest
sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch

Positions = Literal["first", "last"]
"""The real frame of a sample that its positions count from."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the rows of a batch lie. A sample's rows follow each other in time order; no sample is without one.

    The models of a batch may hold different numbers of rows; R is at least the largest of them, and rows beyond a
    model's own belong to nobody: operations give 0 there.
    """

    starts: torch.Tensor
    """`[S, B + 1]` int64: sample b has the rows from `starts[s, b]` up to `starts[s, b + 1]`."""
    sample: torch.Tensor
    """`[S, R]` int64, whose row it is; B = nobody's."""
    position: torch.Tensor
    """`[S, R]` int64, counted from the sample's first real frame; 0 in rows of nobody, and in padding before it."""
    longest: int
    """T; no sample has more rows."""
    is_full: bool = False
    """Whether every row is known to be somebody's."""
    is_uniform: bool = False
    """Whether, besides, every sample is known to have T rows: padding them, and back, takes views."""
    _factors: dict[torch.dtype, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(
        cls,
        lengths: torch.Tensor,
        rows: int,
        longest: int,
        padding: torch.Tensor | None = None,
        is_full: bool = False,
        is_uniform: bool = False,
    ) -> Layout:
        """Of samples of the given lengths.

        Args:
            lengths: `[S, B]` int64, each at least 1.
            rows: R, at least the sum of a model's.
            longest: at least the largest length.
            padding: `[S, B]` int64, how many of a sample's first rows are no frames; by default none.
            is_full: R is that sum for each model.
            is_uniform: that, and each length is `longest`.
        """
        ends = lengths.cumsum(1)
        starts = torch.nn.functional.pad(ends, (1, 0))
        row = torch.arange(rows, device=lengths.device).expand(len(lengths), -1)
        sample = torch.searchsorted(ends, row.contiguous(), right=True)
        first = starts.gather(1, sample)
        position = row - first
        if padding is not None:
            position = (position - padding.gather(1, sample.clamp_max(lengths.shape[1] - 1))).clamp_min(0)
        position = position.masked_fill(sample == lengths.shape[1], 0)
        return cls(starts, sample, position, longest, is_full or is_uniform, is_uniform)

    @property
    def batch(self) -> int:
        """B."""
        return self.starts.shape[1] - 1

    @property
    def rows(self) -> int:
        """R."""
        return self.sample.shape[1]

    @property
    def lengths(self) -> torch.Tensor:
        """`[S, B]` int64."""
        return self.starts.diff(dim=1)

    @property
    def last(self) -> torch.Tensor:
        """`[S, B]` int64, each sample's last row."""
        return self.starts[:, 1:] - 1

    @property
    def is_last(self) -> torch.Tensor:
        """`[S, R]` bool, whether a row is its sample's last."""
        ends = torch.nn.functional.pad(self.starts[:, 1:], (0, 1), value=-1)
        return torch.arange(1, self.rows + 1, device=ends.device) == ends.gather(1, self.sample)

    def counted_from(self, frame: Positions) -> torch.Tensor:
        """`[S, R]` int64, `position`, or how many of its sample's rows come after a row; 0 in rows of nobody."""
        if frame == "first":
            return self.position
        ends = torch.nn.functional.pad(self.starts[:, 1:], (0, 1)).gather(1, self.sample)
        return (ends - torch.arange(1, self.rows + 1, device=ends.device)).clamp_min(0)

    @cached_property
    def is_somebodys(self) -> torch.Tensor:
        """`[S, R]` bool."""
        return self.sample < self.batch

    @cached_property
    def is_frame(self) -> torch.Tensor:
        """`[S, R]` bool, whether a row is a frame of somebody's and no padding before one.

        Whoever has no frame at all has one here, the last row.
        """
        whose = self.sample.clamp_max(self.batch - 1)
        before_end = self.starts.gather(1, whose + 1) - torch.arange(self.rows, device=whose.device)
        frames = self.position.gather(1, self.last) + 1
        return (before_end <= frames.gather(1, whose)) & self.is_somebodys

    def factor(self, dtype: torch.dtype) -> torch.Tensor:
        """`[S, R]`, 1 for rows that are somebody's and 0 for others."""
        if dtype not in self._factors:
            self._factors[dtype] = self.is_somebodys.to(dtype)
        return self._factors[dtype]

    @cached_property
    def neighbours(self) -> tuple[torch.Tensor, torch.Tensor]:
        """`[S, R, 3]` int64: the row before each, itself and the row after it, counted over all models; and whether it
        is one of the same sample's."""
        models, rows = self.sample.shape
        follows = self.sample[:, 1:] == self.sample[:, :-1]
        pad = torch.nn.functional.pad
        is_row = torch.stack(
            (pad(follows, (1, 0)), torch.ones_like(self.sample, dtype=torch.bool), pad(follows, (0, 1))), -1
        )
        itself = torch.arange(models * rows, device=self.sample.device).view(models, rows, 1)
        shift = torch.arange(-1, 2, device=self.sample.device)
        return (itself + shift).clamp(0, max(models * rows - 1, 0)), is_row

    @cached_property
    def _padded_from_rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        frame = torch.arange(self.longest, device=self.starts.device)
        index = (self.starts[:, :-1, None] + frame).clamp_max(max(self.rows - 1, 0))  # [S, B, T]
        return index.flatten(1), self.frame_mask.flatten(1)

    @cached_property
    def _rows_from_padded(self) -> tuple[torch.Tensor, torch.Tensor]:
        whose = self.sample.clamp_max(self.batch - 1)
        frame = torch.arange(self.rows, device=whose.device) - self.starts.gather(1, whose)
        return (whose * self.longest + frame) * self.is_somebodys, self.is_somebodys

    @property
    def frame_mask(self) -> torch.Tensor:
        """`[S, B, T]` bool, True where a padded batch holds a row; rows come first, padding after them."""
        return torch.arange(self.longest, device=self.starts.device) < self.lengths.unsqueeze(-1)


def unpack(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Rows as a padded batch: `[G, R, ...]` -> `[G, B, T, ...]`, padding after a sample's rows and 0. See `pack`."""
    if layout.is_uniform:
        return x.unflatten(1, (layout.batch, layout.longest))
    return move(x, Places(*layout._padded_from_rows, *layout._rows_from_padded)).unflatten(1, (layout.batch, -1))


def pack(x: torch.Tensor, layout: Layout) -> torch.Tensor:
    """The rows of a padded batch: `[G, B, T, ...]` -> `[G, R, ...]`, 0 where they are nobody's."""
    if layout.is_uniform:
        return x.flatten(1, 2)
    return move(x.flatten(1, 2), Places(*layout._rows_from_padded, *layout._padded_from_rows))


def take(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Some rows of each model: `[G, R, ...]` and `[S, n]` int64, no row twice -> `[G, n, ...]`."""
    taken = torch.arange(rows.shape[1], device=rows.device).expand_as(rows)
    back = rows.new_full((len(rows), x.shape[1]), -1).scatter(1, rows, taken)
    return move(x, Places(rows, torch.ones_like(rows, dtype=torch.bool), back.clamp_min(0), back >= 0))


def split_versions(x: torch.Tensor, layout: Layout, one: Layout) -> list[torch.Tensor]:
    """The rows of each version of the samples: `[G, V * R, ...]` -> V times `[G, R, ...]`, those of `one`.

    Args:
        x: rows of `layout`, which holds the samples of `one` V times, version-major.
    """
    versions = layout.batch // one.batch
    if versions == 1:
        return [x]
    if one.is_uniform or (len(one.starts) == 1 and one.is_full):
        return list(x.chunk(versions, dim=1))
    total = one.starts[:, -1:]
    version = torch.arange(versions * one.rows, device=x.device) // max(one.rows, 1)
    row = torch.arange(versions * one.rows, device=x.device) % max(one.rows, 1)
    places = version * total + row, row < total
    at = torch.arange(layout.rows, device=x.device)
    back = at // total.clamp_min(1) * one.rows + at % total.clamp_min(1), at < versions * total
    moved = move(x, Places(places[0].clamp_max(max(layout.rows - 1, 0)), places[1], back[0] * back[1], back[1]))
    return list(moved.chunk(versions, dim=1))


class Places(NamedTuple):
    """Where rows go: each to one place at most, and back."""

    source: torch.Tensor
    """`[S, n]` int64, which row each of the new ones is; anything in range where it is none."""
    is_row: torch.Tensor
    """`[S, n]` bool; the others become 0."""
    back: torch.Tensor
    """`[S, R]` int64, the same of the old ones in the new."""
    is_kept: torch.Tensor
    """`[S, R]` bool."""


def move(x: torch.Tensor, places: Places) -> torch.Tensor:
    """Rows to their places: `[G, R, ...]` -> `[G, n, ...]`.

    The gradient goes the way back: nothing is added up, in whatever order.
    """
    moved: torch.Tensor = _Move.apply(x, *places)
    return moved


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        index: torch.Tensor,
        is_row: torch.Tensor,
        back: torch.Tensor,
        is_kept: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(index, is_row, back, is_kept)
        models, rows = index.shape
        if models == 1:
            moved = x.index_select(1, index[0])
        else:
            first = torch.arange(0, x.shape[0] * x.shape[1], max(x.shape[1], 1), device=x.device).view(models, -1, 1)
            moved = x.flatten(0, 1).index_select(0, (first + index.unsqueeze(1)).flatten()).unflatten(0, (len(x), rows))
        of_models = moved.unflatten(0, (models, -1))
        of_models.masked_fill_(~is_row.view(models, 1, rows, *(1,) * (x.dim() - 2)), 0)
        return moved

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        index, is_row, back, is_kept = ctx.saved_tensors
        return move(grad, Places(back, is_kept, index, is_row)), None, None, None, None
