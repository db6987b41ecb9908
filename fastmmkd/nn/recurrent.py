"""LSTMs and GRUs over ragged rows, by torch's own.

A recurrence starts from zeros and takes the frames of a sample that count, one after the other; frames that do not
count, and rows of nobody, leave the state as it is, and their output is 0. So nothing depends on padding, on the batch,
or on T. A frame that counts and was dropped is a step with an input of zeros. With the masks that a network is given as
frames that count, `model.attention_mask` says which these are: "padding" all real ones, "missing" those with content.

The frames that count are put first, so that a net that only runs forwards meets padding after them; the backward
direction is another such net, on each sample's frames in reverse.

Shape legend: B samples, R rows, T frames of the longest sample, d_in and d features, n layers. There is one model.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import nn

from fastmmkd.nn.dropout import Dropout
from fastmmkd.nn.models import Alone
from fastmmkd.ops.layout import Layout, Places, move, take
from fastmmkd.ops.philox import DrawKeys

Cell = Literal["lstm", "gru"]


class States(NamedTuple):
    """What the last layer of a recurrence makes of a batch, per direction, forwards first."""

    outputs: list[torch.Tensor]
    """`[1, R, d]` each, 0 in rows that do not count."""
    last: list[torch.Tensor]
    """`[1, B, d]` each, what a direction outputs when it has seen all: forwards at the last frame that counts,
    backwards at the first; 0 where none counts."""


class Recurrence(nn.Module):
    """A stack of LSTM or GRU layers, as `torch.nn.LSTM` and `torch.nn.GRU` compute and initialise them.

    Where there are two directions, the next layer reads both, concatenated. A method that has one has `grouped=False`.

    Args:
        cell: "lstm" or "gru".
        d_in, d: features of a frame, and of a state of one direction.
        layers: n.
        backwards: whether there is a second direction.
        dropout: on what a layer hands to the next.
    """

    def __init__(
        self, cell: Cell, d_in: int, d: int, layers: int = 1, backwards: bool = False, dropout: float = 0.0
    ) -> None:
        super().__init__()
        make, directions = {"lstm": nn.LSTM, "gru": nn.GRU}[cell], 2 if backwards else 1
        self.layers = nn.ModuleList(
            nn.ModuleList(Alone(make(directions * d if i else d_in, d)) for _ in range(directions))
            for i in range(layers)
        )
        self.dropouts = nn.ModuleList(Dropout(dropout) for _ in range(layers - 1))

    def forward(self, x: torch.Tensor, counts: torch.Tensor, layout: Layout, draw: DrawKeys | None = None) -> States:
        """Run over every sample's frames.

        Args:
            x: `[1, R, d_in]`, rows of `layout`.
            counts: `[1, R]` bool, frames that are steps.
            layout: whose rows they are.
            draw: what dropout is drawn from; None = no dropout.
        """
        steps = _Steps.of(counts, layout)
        states = States([x], [])
        for i, directions in enumerate(self.layers):
            joined = torch.cat(states.outputs, dim=-1)
            if i:
                joined = self.dropouts[i - 1](joined, layout, draw)
            assert isinstance(directions, nn.ModuleList)
            of_directions = [steps.run(net, joined, way) for net, way in zip(directions, steps.ways, strict=False)]
            states = States(*map(list, zip(*of_directions, strict=True)))
        return states


class _Steps(NamedTuple):
    """The frames that count as time-major batches `[T, B]`, in order and in reverse."""

    ways: tuple[Places, Places]
    """Per direction, from rows to steps."""
    last: torch.Tensor
    """`[1, B]` int64, each sample's last step."""
    is_any: torch.Tensor
    """`[1, B]` bool, whether it has one."""
    shape: tuple[int, int]
    """T, B."""

    @classmethod
    def of(cls, counts: torch.Tensor, layout: Layout) -> _Steps:
        counts = counts & layout.is_somebodys
        frames, batch, rows = layout.longest, layout.batch, layout.rows
        whose = layout.sample.clamp_max(batch - 1)
        before = nn.functional.pad(counts.cumsum(1), (1, 0))  # how many rows that count lie before each
        of_start = before.gather(1, layout.starts)
        number = of_start.diff(dim=1)  # [1, B]
        rank = before[:, :-1] - of_start.gather(1, whose)
        is_step = (torch.arange(frames, device=counts.device)[:, None] < number.unsqueeze(1)).flatten(1)
        row = torch.arange(rows, device=counts.device).expand_as(rank)
        ways = []
        for step in (rank, number.gather(1, whose) - 1 - rank):
            place = (step * batch + whose).masked_fill(~counts, frames * batch)
            source = row.new_zeros(1, frames * batch + 1).scatter(1, place, row)[:, :-1]
            ways.append(Places(source, is_step, place * counts, counts))
        sample = torch.arange(batch, device=counts.device)
        # Where there is none, a step that no other sample has.
        last = (number - 1).clamp_min(0) * batch + sample
        return cls((ways[0], ways[1]), last, number > 0, (frames, batch))

    def run(self, net: nn.Module, x: torch.Tensor, way: Places) -> tuple[torch.Tensor, torch.Tensor]:
        """Outputs `[1, R, d]` and last states `[1, B, d]` of one direction of a layer, from `[1, R, d_in]`."""
        (steps,) = move(x, way).unflatten(1, self.shape)
        made = net(steps)[0].flatten(0, 1).unsqueeze(0)
        back = Places(way.back, way.is_kept, way.source, way.is_row)
        return move(made, back), take(made, self.last) * self.is_any.unsqueeze(-1)
