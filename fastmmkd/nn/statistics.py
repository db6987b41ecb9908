"""Statistics networks: lower bounds of mutual information that are trained along with what they measure."""

from __future__ import annotations

import math

import torch
from torch import nn

from fastmmkd.nn.grouped import uniform_parameter
from fastmmkd.ops import grouped_linear, jsd_mutual_information


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
        """`I(q, u)` per group; row i of q belongs to row i of u.

        Args:
            q, u: `[G, N, d_q]` and `[G, N, d_u]`, or `[G, P, N, d]`: P pools, unrelated pairs are of one pool.

        Returns:
            `[G]`, the mean over pools.
        """
        left = grouped_linear(q, self.weight_q, self.hidden_bias)
        right = grouped_linear(u, self.weight_u)
        groups, *pools, n, hidden = left.shape
        count = math.prod(pools)
        if not pools:
            return jsd_mutual_information(left, right, self.weight.view(-1, hidden), self.bias.view(-1))
        weight = self.weight.view(groups, 1, hidden).expand(-1, count, -1).flatten(0, 1)
        bias = self.bias.view(groups, 1).expand(-1, count).flatten()
        bounds = jsd_mutual_information(left.view(-1, n, hidden), right.view(-1, n, hidden), weight, bias)
        return bounds.view(groups, count).mean(1)
