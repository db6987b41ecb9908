"""UMDF: unified self-distillation under uncertain missing modalities (Li et al., AAAI 2024).

Two missing versions a, b of each sample pass through one network, stacked on the batch axis; consistency between them
is the distillation. Equation numbers are the paper's.

Shape legend: S models, B samples, T_m frames and d_m features of modality m, d width, O outputs.
"""

from __future__ import annotations

import torch
from torch import nn

from fastmmkd.config import UmdfLoss, UmdfModel
from fastmmkd.data.batches import by_layer
from fastmmkd.distributed import gather_rows
from fastmmkd.methods.objective import Losses, objective, weighted
from fastmmkd.nn.crossmodal import CrossmodalInteraction
from fastmmkd.nn.dropout import number_dropouts
from fastmmkd.nn.embedding import TemporalEmbedding
from fastmmkd.nn.encoder import TransformerEncoder
from fastmmkd.nn.grouped import GroupedLinear
from fastmmkd.nn.integration import DynamicFeatureIntegration
from fastmmkd.nn.pooling import masked_adaptive_mean
from fastmmkd.ops import gaussian_mmd, js_divergence
from fastmmkd.ops.philox import DrawKeys
from fastmmkd.ops.precision import accumulation
from fastmmkd.tasks import Task


class UMDF(nn.Module):
    """The network and its training loss."""

    versions = 2
    """Missing versions of each sample that `forward` expects, version-major on the batch axis."""

    def __init__(
        self, model: UmdfModel, loss: UmdfLoss, task: Task, feature_dims: tuple[int, ...], models: int = 1
    ) -> None:
        super().__init__()
        self.weights = loss
        self.task = task
        d, joint = model.width, 3 * model.width
        self.embedding = TemporalEmbedding(models, feature_dims, d, model.dropout)
        self.mcim = nn.ModuleList(
            CrossmodalInteraction(models, d, model.heads, model.mcim, model.dropout) for _ in range(model.mcim_layers)
        )
        self.encoder = TransformerEncoder((models,), joint, model.heads, model.encoder_layers, model.dropout)
        self.f_y = GroupedLinear((models,), joint, task.outputs)
        if model.dfim:
            self.dfim = DynamicFeatureIntegration(models, joint, model.heads, model.dropout)
            self.hidden = GroupedLinear((models,), joint, joint)
            self.head = GroupedLinear((models,), joint, task.outputs)
        else:
            self.head = GroupedLinear((models,), 2 * joint, task.outputs)
        self.has_dfim = model.dfim
        number_dropouts(self)

    @property
    def network(self) -> UMDF:
        """What is evaluated and exported: everything."""
        return self

    def forward(
        self,
        features: list[torch.Tensor],
        masks: list[torch.Tensor],
        targets: torch.Tensor,
        draw: DrawKeys | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """`L_total = L_task + lambda_1 L_fea + lambda_2 L_logits`.

        Args:
            features: per modality `[S, 2 B, T_m, d_m]`, versions a then b; zero where missing.
            masks: `[S, 2 B, T_m]` bool, frames that may be attended to, as `Batch.masks` has them.
            targets: `[S, B]` or `[S, B, problems]`, see `Task.targets`.
            draw: what dropout is drawn from; None = no dropout.

        Returns:
            The scalar to minimise (summed over the S models, which share nothing) and its parts, detached, `[S]` each.
        """
        total, parts, _ = self.losses(features, masks, targets, draw)
        return objective(total, parts)

    def losses(
        self,
        features: list[torch.Tensor],
        masks: list[torch.Tensor],
        targets: torch.Tensor,
        draw: DrawKeys | None = None,
    ) -> Losses:
        """The losses as functions of `H [S, 2 B, T_L, 3 d]`; arguments as `forward` has them."""
        h, mask = self.encode(features, masks, draw)
        (h_a, h_b), (mask_a, mask_b) = h.chunk(2, dim=1), mask.chunk(2, dim=1)
        prediction, _ = self.integrate(h_a, h_b, mask_a, mask_b, draw)
        task = self.task.loss(prediction, targets)
        last_a, last_b = h_a[:, :, -1], h_b[:, :, -1]
        terms = (
            ("fea", self.weights.lambda_fea, lambda: gaussian_mmd(gather_rows(last_a), gather_rows(last_b))),  # eq. 3
            ("logits", self.weights.lambda_logits, lambda: self.logits_loss(self.f_y(last_a), self.f_y(last_b))),
        )
        return Losses(*weighted(task, {"task": task}, terms), h)

    def encode(
        self, features: list[torch.Tensor], masks: list[torch.Tensor], draw: DrawKeys | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedding, MCIM and encoder: the joint representation `H [S, B, T_L, 3 d]` and its frame mask `[S, B, T_L]`.

        A frame of H counts where any modality has it; what follows the first MCIM layer masks as later layers do.
        """
        first, later = by_layer(masks)
        streams = self.embedding(features, draw)
        for i, layer in enumerate(self.mcim):
            streams = layer(streams, later if i else first, draw)
        steps = streams[0].shape[2]
        resampled = [masked_adaptive_mean(z, mask, steps) for z, mask in zip(streams, later, strict=True)]
        mask = resampled[0][1] | resampled[1][1] | resampled[2][1]
        return self.encoder(torch.cat([z for z, _ in resampled], dim=-1), mask, mask, draw=draw), mask

    def integrate(
        self,
        h_a: torch.Tensor,
        h_b: torch.Tensor,
        mask_a: torch.Tensor,
        mask_b: torch.Tensor,
        draw: DrawKeys | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """DFIM and prediction: logits `[S, B, O]` and the representation they are read from `[S, B, 3 d or 6 d]`."""
        if not self.has_dfim:
            joint = torch.cat((h_a[:, :, -1], h_b[:, :, -1]), dim=-1)
            return self.head(joint), joint
        refined = self.dfim(h_a, h_b, mask_a, mask_b, draw)[:, :, -1]
        return self.head(self.hidden(refined).relu()), refined

    def logits_loss(self, logits_a: torch.Tensor, logits_b: torch.Tensor) -> torch.Tensor:
        """Eq. 5 (classification, averaged over problems) or eq. 6 (regression): `[S, B, O]` twice -> `[S]`."""
        if self.task.is_regression:
            return (accumulation(logits_a) - accumulation(logits_b)).square().mean((1, 2))
        a, b = (self.task.split_problems(x).flatten(1, 2) for x in (logits_a, logits_b))
        return js_divergence(a, b)

    def predict(self, features: list[torch.Tensor], masks: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Inference: both versions are the given, possibly incomplete, sample (so that one pass gives both).

        Args:
            features: per modality `[S, B, T_m, d_m]`.
            masks: `[S, B, T_m]` bool, as `Batch.masks` has them.

        Returns:
            Logits `[S, B, O]` and joint representations `[S, B, D]`.
        """
        h, mask = self.encode(features, masks)
        return self.integrate(h, h, mask, mask)
