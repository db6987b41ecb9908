"""Fine-grained representation factorization, FRF (HRLF, section "Fine-grained Representation Factorization").

Shape legend: S models, B rows, d width; modality axes a (of the sentiment part) and b (of the modality part), 3 each.
"""

from __future__ import annotations

import torch
from torch import nn

from fastmmkd.nn.grouped import GroupedLinear
from fastmmkd.ops.constants import constant
from fastmmkd.ops.precision import accumulation

MODALITY_COUNT = 3


class Mlp(nn.Module):
    """Two fully-connected layers with ReLU between them (decision; the paper names feed-forward layers with ReLU)."""

    def __init__(self, groups: tuple[int, ...], d_in: int, d_hidden: int, d_out: int) -> None:
        super().__init__()
        self.hidden = GroupedLinear(groups, d_in, d_hidden)
        self.out = GroupedLinear(groups, d_hidden, d_out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[*groups, ..., d_in]` -> `[*groups, ..., d_out]`."""
        return self.out(self.hidden(x, relu=True))


class RepresentationFactorization(nn.Module):
    """`Q_m = E^S_m(Z_m)` (sentiment-relevant), `U_m = E^M_m(Z_m)` (modality-specific), `D_r: (Q, U) -> Z`.

    Decision: Q_m and U_m have d / 2 features, so that `[Q_m, U_m]` has d, as the paper's widths ask for.
    """

    def __init__(self, models: int, d: int) -> None:
        super().__init__()
        self.sentiment = Mlp((models, MODALITY_COUNT), d, d, d // 2)
        self.modality = Mlp((models, MODALITY_COUNT), d, d, d // 2)
        self.decoder = Mlp((models,), d, 2 * d, d)

    def forward(self, z: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`[S, 3, B, d]` -> Q and U, `[S, 3, B, d / 2]` each: `E^S_m(Z_m)` and `E^M_m(Z_m)`."""
        return self.sentiment(z), self.modality(z)

    def loss(self, z: torch.Tensor, q: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """`L_FRF = L_trans + L_recon`, batch means of Euclidean norms.

        It is 0 wherever z, q and u are constant, and the decoder finds their mean before anything else: what sends its
        gradient into the z that it is given, as source or as target, ends with all samples alike (see the config's
        `loss.frf_gradient`).

        Args:
            z: `[S, 3, B, d]`.
            q, u: `[S, 3, B, d / 2]`, factorised from z.

        Returns:
            `[S]`.
        """
        n = MODALITY_COUNT
        q_sabbd, u_sabbd = q.unsqueeze(2).expand(-1, -1, n, -1, -1), u.unsqueeze(1).expand(-1, n, -1, -1, -1)
        translated = self.decoder(torch.cat((q_sabbd, u_sabbd), dim=-1))  # [S, a, b, B, d], in the domain of b
        error_sab = _distance(translated, z.unsqueeze(1))
        trans = (error_sab * constant(_own_and_other, n, device=z.device, dtype=error_sab.dtype)).sum((1, 2))
        # The encoder of b reads every translation into b: what sentiment is left must be that of b itself.
        reread = self.sentiment(translated.transpose(1, 2))  # [S, b, a, B, d / 2]
        return trans + _distance(reread, q.unsqueeze(2)).mean((1, 2))


def _own_and_other(n: int, device: torch.device) -> torch.Tensor:
    """Weights `[a, b]` that give the mean over a = b plus the mean over the others."""
    own = torch.eye(n, device=device, dtype=torch.float64)
    return own / n + (1 - own) / (n * n - n)


def _distance(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`|x - y|_2` averaged over the batch: `[S, a, b, B, d]` -> `[S, a, b]`; its gradient at 0 is 0."""
    return torch.linalg.vector_norm(accumulation(x) - accumulation(y), dim=-1).mean(-1)
