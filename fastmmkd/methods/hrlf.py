"""HRLF: hierarchical representation learning for incomplete multimodal sentiment analysis (Li et al., NeurIPS 2024).

Each modality is factorised into sentiment-relevant and modality-specific representations (FRF). A student that sees
missing versions is aligned with a teacher that sees the complete samples at three scales, in meaning (HMI) and in
distribution (HAL).

Shape legend: S models, B samples, T_m frames and d_m features of modality m, d width, O outputs.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import nn

from fastmmkd.config import HrlfLoss, HrlfModel
from fastmmkd.distributed import gather_rows
from fastmmkd.methods.objective import Losses, objective, weighted
from fastmmkd.nn.adversarial import Discriminator
from fastmmkd.nn.dropout import number_dropouts
from fastmmkd.nn.embedding import TemporalEmbedding
from fastmmkd.nn.encoder import ModalityEncoders
from fastmmkd.nn.factorization import RepresentationFactorization
from fastmmkd.nn.grouped import GroupedLinear
from fastmmkd.nn.statistics import StatisticsNetwork
from fastmmkd.ops.philox import DrawKeys
from fastmmkd.tasks import Task

SCALE_WIDTHS = (3, 2, 1)
"""Widths of `E_1, E_2, E_3` in units of d."""


class Representation(NamedTuple):
    """What one network makes of a batch."""

    scales: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    """`E_1 = {H, H~} [S, 2, B, 3 d]`, `E_2 = {I_1, I_3} [S, 2, B, 2 d]`, `E_3 = {I_2} [S, 1, B, d]`: decision, those of
    one scale are rows of one set, the only reading in which the paper's widths hold; the axis keeps layers apart."""
    logits: torch.Tensor
    """`[S, B, O]`."""
    refined: torch.Tensor
    """`H~ [S, B, 3 d]`."""
    last: torch.Tensor
    """Z `[S, 3, B, d]`, the last elements of the encoders' outputs."""
    factors: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    """Z `[S, 3, B, d]`, Q and U `[S, 3, B, d / 2]`; None without FRF."""


class HrlfNetwork(nn.Module):
    """FRF, the fully-connected stack and the prediction head, of teacher and student alike.

    Trained by itself it minimises `L_task + L_FRF`: that is the teacher, on complete samples, and the student without
    distillation, on missing versions.
    """

    versions = 1
    """Missing versions of each sample that `forward` expects."""

    def __init__(
        self, model: HrlfModel, loss: HrlfLoss, task: Task, feature_dims: tuple[int, ...], models: int = 1
    ) -> None:
        super().__init__()
        self.task = task
        self.lambda_frf, self.frf_gradient = loss.lambda_frf, loss.frf_gradient
        self.factorizes = model.frf
        d = model.width
        self.embedding = TemporalEmbedding(models, feature_dims, d, model.dropout)
        self.encoders = ModalityEncoders(models, d, model.heads, model.encoder_layers, model.dropout)
        if model.frf:
            self.frf = RepresentationFactorization(models, d)
        widths = [3 * d, 2 * d, d, 2 * d, 3 * d]
        self.stack = nn.ModuleList(GroupedLinear((models,), a, b) for a, b in pairwise(widths))
        # Decision: the paper asks for a light head and leaves it open.
        self.head = GroupedLinear((models,), 3 * d, task.outputs)
        number_dropouts(self)

    @property
    def network(self) -> HrlfNetwork:
        """What is evaluated and exported: everything."""
        return self

    def represent(
        self, features: list[torch.Tensor], masks: list[torch.Tensor], draw: DrawKeys | None = None
    ) -> Representation:
        """`Z_m` = last element of the encoder's output, `C_m = [Q_m, U_m]`, `H = [C_L, C_A, C_V]`, then the stack.

        Decision: ReLU after each layer of the stack but the last.

        Args:
            features: per modality `[S, B, T_m, d_m]`, zero where missing.
            masks: `[S, B, T_m]` bool, frames that may be attended to, as `Batch.masks` has them.
            draw: what dropout is drawn from; None = no dropout.
        """
        encoded = self.encoders(self.embedding(features, draw), masks, draw)
        z_s3bd = torch.stack([e[:, :, -1] for e in encoded], dim=1)
        joined, factors = z_s3bd, None
        if self.factorizes:
            q, u = self.frf(z_s3bd)
            joined, factors = torch.cat((q, u), dim=-1), (z_s3bd, q, u)
        h = joined.transpose(1, 2).flatten(2)
        to_i1, to_i2, to_i3, to_refined = self.stack
        i1 = to_i1(h).relu()
        i2 = to_i2(i1).relu()
        i3 = to_i3(i2).relu()
        refined = to_refined(i3)
        scales = (torch.stack((h, refined), dim=1), torch.stack((i1, i3), dim=1), i2.unsqueeze(1))
        return Representation(scales, self.head(refined), refined, z_s3bd, factors)

    def forward(
        self,
        features: list[torch.Tensor],
        masks: list[torch.Tensor],
        targets: torch.Tensor,
        draw: DrawKeys | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`L_task + lambda_frf L_FRF`; arguments and result as `HRLF.forward` has them."""
        total, parts, _ = self.losses(features, masks, targets, draw)
        return objective(total, parts)

    def losses(
        self,
        features: list[torch.Tensor],
        masks: list[torch.Tensor],
        targets: torch.Tensor,
        draw: DrawKeys | None = None,
    ) -> Losses:
        """The losses as functions of `Z [S, 3, B, d]`; arguments as `forward` has them."""
        found = self.represent(features, masks, draw)
        return Losses(*self.supervised(found, targets), found.last)

    def supervised(self, found: Representation, targets: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The losses that need no teacher: their weighted sum `[S]` and the parts `[S]`."""
        task, factors = self.task.loss(found.logits, targets), found.factors
        if factors is None:
            return task, {"task": task}
        return weighted(task, {"task": task}, [("frf", self.lambda_frf, lambda: self.factorization(*factors))])

    def factorization(self, z: torch.Tensor, q: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """`L_FRF` `[S]` of the factors of a representation; deviation: Z is a constant to it (`loss.frf_gradient`)."""
        if self.frf_gradient == "factors":
            z = z.detach()
            q, u = self.frf(z)
        return self.frf.loss(z, q, u)

    def predict(self, features: list[torch.Tensor], masks: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[S, B, O]` and joint representations `H~ [S, B, 3 d]`."""
        found = self.represent(features, masks)
        return found.logits, found.refined


class HRLF(nn.Module):
    """The student with its distillation losses."""

    versions = 1
    """Missing versions of each sample that `forward` expects."""

    def __init__(self, network: HrlfNetwork, loss: HrlfLoss, width: int, models: int = 1) -> None:
        super().__init__()
        self.network = network
        self.weights = loss
        self.task = network.task
        hidden, widths = loss.statistics_width, [scale * width for scale in SCALE_WIDTHS]
        if loss.lambda_hmi:
            self.statistics = nn.ModuleList(StatisticsNetwork((models,), w, w, hidden) for w in widths)
        if loss.lambda_hal:
            self.discriminators = nn.ModuleList(Discriminator(models, w, hidden) for w in widths)

    def forward(
        self,
        features: list[torch.Tensor],
        masks: list[torch.Tensor],
        targets: torch.Tensor,
        taught: Representation,
        draw: DrawKeys | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`L = L_task + L_FRF + L_HMI + L_HAL + L_KL`, each with its weight.

        Args:
            features: per modality `[S, B, T_m, d_m]`, the missing version; zero where missing.
            masks: `[S, B, T_m]` bool, frames that may be attended to, as `Batch.masks` has them.
            targets: `[S, B]` or `[S, B, problems]`, see `Task.targets`.
            taught: what the frozen teacher makes of the complete samples, without a graph.
            draw: what dropout is drawn from; None = no dropout.

        Returns:
            The scalar to minimise (summed over the S models, which share nothing) and its parts, detached, `[S]` each.
            The part `hal` is the discriminators' cross-entropy, `-L_HAL`: gradient reversal turns it into the student's
            `L_HAL` on the way back (decision: one backward pass and one optimiser for both sides).
        """
        total, parts, _ = self.losses(features, masks, targets, taught, draw)
        return objective(total, parts)

    def losses(
        self,
        features: list[torch.Tensor],
        masks: list[torch.Tensor],
        targets: torch.Tensor,
        taught: Representation,
        draw: DrawKeys | None = None,
    ) -> Losses:
        """The losses as functions of `Z [S, 3, B, d]`; arguments as `forward` has them."""
        found = self.network.represent(features, masks, draw)
        terms = (
            ("hmi", self.weights.lambda_hmi, lambda: self.mutual_information(found.scales, taught.scales)),
            ("hal", self.weights.lambda_hal, lambda: self.adversarial(found.scales, taught.scales)),
            ("kl", self.weights.lambda_kl, lambda: self.task.divergence(taught.logits, found.logits)),
        )
        return Losses(*weighted(*self.network.supervised(found, targets), terms), found.last)

    def mutual_information(self, student: tuple[torch.Tensor, ...], teacher: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """`L_HMI = - sum_i MI(E^t_i, E^s_i)`: three scales each, `[S, layers, B, width]` -> `[S]`.

        Decision: unrelated pairs are of one layer (`loss.hmi_negatives`). Among all rows of a scale, half of them tell
        layers apart, and the bound rises even where teacher and student are independent.
        """
        bounds = []
        for statistics, *pair in zip(self.statistics, teacher, student, strict=True):
            e_t, e_s = map(self._rows_of_layers, pair)
            bounds.append(statistics(e_t, e_s))
        return -torch.stack(bounds).sum(0)

    def _rows_of_layers(self, e: torch.Tensor) -> torch.Tensor:
        """What HMI draws pairs from: `[S, layers, N, width]`, or `[S, layers * N, width]` where they are joined."""
        if self.weights.global_batch:
            e = gather_rows(e.flatten(0, 1)).unflatten(0, e.shape[:2])
        return e.flatten(1, 2) if self.weights.hmi_negatives == "joined" else e

    def adversarial(self, student: tuple[torch.Tensor, ...], teacher: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """`-L_HAL`, summed over three scales: each discriminator against the student -> `[S]`."""
        scales = zip(self.discriminators, teacher, student, strict=True)
        return torch.stack([judge(e_t.flatten(1, 2), e_s.flatten(1, 2)) for judge, e_t, e_s in scales]).sum(0)
