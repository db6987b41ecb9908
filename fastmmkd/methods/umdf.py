"""UMDF: unified self-distillation under uncertain missing modalities (Li et al., AAAI 2024).

Two missing versions a, b of each sample pass through one network, stacked on the batch axis; consistency between them
is the distillation. Equation numbers are the paper's.

Shape legend: S models, B samples, R_m rows and d_m features of modality m, d width, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from fastmmkd.blocks import MOST_LAYERS, AttentionModel, Block, Config
from fastmmkd.data.batches import Batch, Inputs, Kept, View, by_layer
from fastmmkd.distributed import gather_rows
from fastmmkd.methods.method import Method, Network, PhaseSpec
from fastmmkd.methods.objective import Losses, weighted
from fastmmkd.nn.crossmodal import CrossmodalInteraction
from fastmmkd.nn.dropout import number_dropouts
from fastmmkd.nn.embedding import TemporalEmbedding
from fastmmkd.nn.encoder import TransformerEncoder
from fastmmkd.nn.grouped import GroupedLinear
from fastmmkd.nn.integration import DynamicFeatureIntegration
from fastmmkd.nn.pooling import masked_adaptive_mean
from fastmmkd.ops import gaussian_mmd, js_divergence
from fastmmkd.ops.layout import Layout, take
from fastmmkd.ops.philox import DrawKeys
from fastmmkd.ops.precision import accumulation
from fastmmkd.tasks import Task


class UmdfModel(AttentionModel):
    """UMDF's network."""

    mcim_layers: int = Field(default=4, gt=0, le=MOST_LAYERS)
    encoder_layers: int = Field(default=2, gt=0, le=MOST_LAYERS)
    """Layers of the transformer encoder after MCIM (decision; the paper leaves it open)."""
    mcim: bool = True
    """False: "w/o MCIM", self-attention in place of every crossmodal attention."""
    dfim: bool = True
    """False: "w/o DFIM", plain concatenation of the two streams."""


class UmdfLoss(Block):
    """Weights of `L_total = L_task + lambda_fea L_fea + lambda_logits L_logits`; 0 leaves a loss out ("w/o")."""

    lambda_fea: float = Field(default=1.0, ge=0)
    lambda_logits: float = Field(default=1.0, ge=0)


class UmdfConfig(Config):
    """Self-distillation: there is no teacher."""

    method: Literal["umdf"]
    model: UmdfModel = UmdfModel()
    teacher: None = None
    loss: UmdfLoss = UmdfLoss()


class UMDF(Network):
    """The network and its training loss."""

    def __init__(
        self, model: UmdfModel, loss: UmdfLoss, task: Task, feature_dims: tuple[int, ...], models: int = 1
    ) -> None:
        super().__init__()
        self.weights = loss
        self.task = task
        d, joint = model.width, 3 * model.width
        self.embedding = TemporalEmbedding(models, feature_dims, d, model.dropout, model.positions)
        self.mcim = nn.ModuleList(
            CrossmodalInteraction(models, d, model.heads, model.mcim, model.dropout) for _ in range(model.mcim_layers)
        )
        self.encoder = TransformerEncoder((models,), joint, model.heads, model.encoder_layers, model.dropout)
        if loss.lambda_logits:
            self.f_y = GroupedLinear((models,), joint, task.outputs)
        if model.dfim:
            self.dfim = DynamicFeatureIntegration(models, joint, model.heads, model.dropout)
            self.hidden = GroupedLinear((models,), joint, joint)
            self.head = GroupedLinear((models,), joint, task.outputs)
        else:
            self.head = GroupedLinear((models,), 2 * joint, task.outputs)
        self.has_dfim = model.dfim
        number_dropouts(self)

    def losses(self, batch: Batch) -> Losses:
        """`L_total = L_task + lambda_1 L_fea + lambda_2 L_logits` as functions of the rows of H, versions a then b."""
        h, mask = self.encode(batch.inputs, batch.draw)
        layout, one = batch.inputs.layouts[0], batch.layouts[0]
        prediction, _ = self.integrate(h, mask, layout, one, batch.draw)
        task = self.task.loss(prediction, batch.targets)
        last = take(h, layout.last)
        last_a, last_b = last.chunk(2, dim=1)
        terms = (
            ("fea", self.weights.lambda_fea, lambda: gaussian_mmd(gather_rows(last_a), gather_rows(last_b))),  # eq. 3
            ("logits", self.weights.lambda_logits, lambda: self.logits_loss(*self.f_y(last).chunk(2, dim=1))),
        )
        return Losses(*weighted(task, {"task": task}, terms), h)

    def encode(self, inputs: Inputs, draw: DrawKeys | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Embedding, MCIM and encoder: the joint representation `H [S, R_L, 3 d]` and its frame mask `[S, R_L]`.

        A frame of H counts where any modality has it; what follows the first MCIM layer masks as later layers do.
        """
        return self._joint(self.embedding(inputs.features, inputs.layouts, draw), inputs, draw)

    def _joint(
        self, streams: list[torch.Tensor], inputs: Inputs, draw: DrawKeys | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (first, later), layouts = by_layer(inputs.masks), inputs.layouts
        for i, layer in enumerate(self.mcim):
            streams = layer(streams, later if i else first, layouts, draw)
        resampled = [masked_adaptive_mean(*of, layouts[0]) for of in zip(streams, later, layouts, strict=True)]
        mask = resampled[0][1] | resampled[1][1] | resampled[2][1]
        joint = torch.cat([z for z, _ in resampled], dim=-1)
        return self.encoder(joint, mask, mask, layouts[0], draw=draw), mask

    def integrate(
        self, h: torch.Tensor, mask: torch.Tensor, layout: Layout, one: Layout, draw: DrawKeys | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """DFIM and prediction: logits `[S, B, O]` and the representation they are read from `[S, B, 3 d or 6 d]`.

        Args:
            h, mask: rows of `layout`: both versions, or one that stands for both.
            one: the layout of one version.
        """
        if not self.has_dfim:
            of_versions = take(h, layout.last).chunk(layout.batch // one.batch, dim=1)
            joint = torch.cat((of_versions[0], of_versions[-1]), dim=-1)
            return self.head(joint), joint
        refined = take(self.dfim(h, mask, layout, one, draw), one.last)
        return self.head(self.hidden(refined, relu=True)), refined

    def logits_loss(self, logits_a: torch.Tensor, logits_b: torch.Tensor) -> torch.Tensor:
        """Eq. 5 (classification, averaged over problems) or eq. 6 (regression): `[S, B, O]` twice -> `[S]`."""
        if self.task.is_regression:
            return (accumulation(logits_a) - accumulation(logits_b)).square().mean((1, 2))
        a, b = (self.task.split_problems(x).flatten(1, 2) for x in (logits_a, logits_b))
        return js_divergence(a, b)

    def predict(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and joint representations; both versions are the given, possibly incomplete, sample (so that one pass
        gives both)."""
        return self.integrate(*self.encode(inputs), inputs.layouts[0], inputs.layouts[0])

    def predict_subsets(self, inputs: Inputs, subsets: Sequence[Kept]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Modalities meet after the embedding, which runs once with all there is, and once with nothing."""
        nothing = inputs.only((False, False, False))
        embedded, empty = (self.embedding(of.features, of.layouts) for of in (inputs, nothing))
        predictions = []
        for kept in subsets:
            streams = [z if k else without for z, without, k in zip(embedded, empty, kept, strict=True)]
            joint = self._joint(streams, inputs.only(kept))
            predictions.append(self.integrate(*joint, inputs.layouts[0], inputs.layouts[0]))
        return predictions


def network(config: Config, feature_dims: tuple[int, ...]) -> UMDF:
    """The network of a config."""
    assert isinstance(config, UmdfConfig)
    return UMDF(config.model, config.loss, config.task, feature_dims)


METHOD = Method(
    name="umdf",
    title="UMDF",
    published="2024-03",
    config=UmdfConfig,
    network=network,
    phases=(PhaseSpec("network", lambda config, dims, _: network(config, dims), (View.MISSING, View.MISSING_2)),),
    ablations={
        "UMDF": [],
        "w/o L_fea": ["loss.lambda_fea=0.0"],
        "w/o L_logits": ["loss.lambda_logits=0.0"],
        "w/o MCIM": ["model.mcim=false"],
        "w/o DFIM": ["model.dfim=false"],
        # As a complete-modality method: it first meets missing data in testing, and attends to its zeros.
        "complete training": ["missing.enabled=false", "train.select_on=complete", "model.attention_mask=padding"],
        # The strongest form of that: missing frames masked, selected under missingness, only training complete.
        "complete training, masked, selected under missingness": ["missing.enabled=false"],
    },
)
