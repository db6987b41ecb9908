"""Statistics networks: lower bounds of mutual information that are trained along with what they measure."""

from __future__ import annotations

import torch
from torch import nn

from fastmmkd.nn.grouped import linear, uniform_parameter
from fastmmkd.ops import jsd_mutual_information


class StatisticsNetwork(nn.Module):
    """`F(q, u) = w relu(W [q, u] + c) + b` and its Jensen-Shannon bound (CorrKD eq. 6, HRLF's MI; decision: one hidden
    layer). W acts on q and u apart, so that all pairs of a batch cost no more than its rows."""

    def __init__(self, groups: tuple[int, ...], d_q: int, d_u: int, hidden: int) -> None:
        super().__init__()
        first, second = (d_q + d_u) ** -0.5, hidden**-0.5
        self.weight_q = uniform_parameter((*groups, d_q, hidden), first)
        self.weight_u = uniform_parameter((*groups, d_u, hidden), first)
        self.hidden_bias = uniform_parameter((*groups, hidden), first)
        self.weight = uniform_parameter((*groups, hidden), second)
        self.bias = uniform_parameter(groups, second)

    def forward(self, q: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """`I(q, u)` per group: `[G, N, d_q]` and `[G, N, d_u]` -> `[G]`; row i of q belongs to row i of u."""
        left = linear(q, self.weight_q.flatten(0, -3), self.hidden_bias.flatten(0, -2))
        right = linear(u, self.weight_u.flatten(0, -3))
        return jsd_mutual_information(left, right, self.weight.flatten(0, -2), self.bias.flatten())
