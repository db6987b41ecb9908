"""DMD: decoupled multimodal distillation (Li et al., CVPR 2023).

Each modality is decoupled into a private and a shared part. Shared parts go through a self-attention transformer each,
private ones through crossmodal transformers; in each branch, modalities distil into each other along the edges of a
graph, whose weights a network learns (graph distillation, GD).

What is computed is that of the public code, `mdswyz/DMD` at 516d4e1. Decisions: the common embedding (a convolution
over three frames, and positions); masked means over time in place of the flattened sequences, which would tie the
network to one length; cosines between features; the project's transformers, post-norm and without a causal mask; the
margin and the edges of all processes' rows. "Alike" are samples all of whose labels agree, and what a margin is
proportional to is the difference of their scores, or the number of labels that differ. Rows that lack a modality leave
the losses of decoupling, the margin and the edges.

Shape legend: S models, B samples, N samples over all processes, R_m rows of modality m, d width, O outputs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn

from fastmmkd.blocks import MOST_LAYERS, AttentionModel, Config
from fastmmkd.data.batches import Batch, Inputs, View, by_layer
from fastmmkd.distributed import gather_rows
from fastmmkd.methods.baselines import BaselineLoss, mean_where, of_rows, task_errors
from fastmmkd.methods.method import FeatureDims, Method, Network, PhaseSpec, Trainable
from fastmmkd.methods.objective import Losses, weighted
from fastmmkd.nn.dropout import Dropout, number_dropouts, of_samples
from fastmmkd.nn.embedding import TemporalEmbedding
from fastmmkd.nn.encoder import ModalityEncoders
from fastmmkd.nn.grouped import GroupedLinear, uniform_parameter
from fastmmkd.nn.pooling import masked_mean
from fastmmkd.nn.scaling import unit_length
from fastmmkd.nn.transformers import PAIRS, CrossmodalTransformers
from fastmmkd.ops import grouped_linear
from fastmmkd.ops.constants import constant
from fastmmkd.ops.layout import Layout, take
from fastmmkd.ops.philox import DrawKeys
from fastmmkd.ops.precision import accumulation
from fastmmkd.tasks import Task

MARGIN = 0.15
"""Cosine that samples are kept apart by, per unit of difference of their labels."""
EDGE_SCALE, PRIOR_SCALE = 1 / 8, 1 / 0.25
"""What the edges and their prior are multiplied by in the softmax."""
REGULARISED, APART = 10.0, 10.0
"""Weights of L_reg and L_repr within a graph distillation."""
TEACHERS = {"shared": ((1, 0), (2, 0)), "private": ((1, 0), (2, 0), (1, 2))}
"""Pairs that the prior favours, as (student, teacher): language teaches, and in the private branch visual audio."""


class DmdModel(AttentionModel):
    """DMD's network."""

    encoder_layers: int = Field(default=4, gt=0, le=MOST_LAYERS)
    """Layers of each of its twelve transformers."""
    causal: bool = False
    """True: no frame attends to later ones, as the public code has it."""


class DmdLoss(BaselineLoss):
    """`L = L_task + lambda_homo GD_shared + lambda_hetero GD_private + lambda_decoupling (L_rec + L_cyc + 0.1 L_ort) +
    lambda_margin L_mar`; 0 leaves a part out. L_task is the sum of eight."""

    lambda_homo: float = Field(default=0.05, ge=0)
    lambda_hetero: float = Field(default=0.05, ge=0)
    lambda_decoupling: float = Field(default=0.1, ge=0)
    lambda_margin: float = Field(default=0.01, ge=0)


class DmdConfig(Config):
    """One phase, on complete samples where `missing.enabled` is false."""

    method: Literal["dmd"]
    model: DmdModel = DmdModel()
    teacher: None = None
    loss: DmdLoss = DmdLoss()


class Representation(NamedTuple):
    """What the network makes of a batch."""

    embedded: list[torch.Tensor]
    """x_m, `[S, R_m, d]` each."""
    private: list[torch.Tensor]
    """s_m."""
    shared: list[torch.Tensor]
    """c_m."""
    summed_up: torch.Tensor
    """Each c_m's mean over time, `[S, 3, B, d]`."""
    fused: torch.Tensor
    """C `[S, B, 3 d]`."""
    complemented: torch.Tensor
    """H_t `[S, 3, B, 2 d]`."""
    joint: torch.Tensor
    """`[sigmoid(W_t H_t), sigmoid(W_C C)]`, `[S, B, 9 d]`."""


class ResidualMLP(nn.Module):
    """`x + W_2 drop(ReLU(W_1 x))`."""

    def __init__(self, groups: tuple[int, ...], d: int, dropout: float) -> None:
        super().__init__()
        self.hidden, self.out, self.dropout = GroupedLinear(groups, d, d), GroupedLinear(groups, d, d), Dropout(dropout)

    def forward(self, x: torch.Tensor, one: Layout, draw: DrawKeys | None) -> tuple[torch.Tensor, torch.Tensor]:
        """`[G, B, d]` -> the same, and what is hidden; `one`: a layout of a row per sample."""
        hidden = self.hidden(x, relu=True)
        return x + self.out(self.dropout(hidden, one, draw)), hidden


class DmdNetwork(Network):
    """Decoupling, transformers and the head of what is predicted; the other heads are needed in training alone."""

    def __init__(self, model: DmdModel, task: Task, feature_dims: FeatureDims, models: int = 1) -> None:
        super().__init__()
        self.task = task
        d, settings = model.width, (model.heads, model.encoder_layers, model.dropout, model.causal)
        self.embedding = TemporalEmbedding(models, feature_dims, d, model.dropout, model.positions)
        self.private_weight = uniform_parameter((models, 3, d, d), d**-0.5)
        self.shared_weight = uniform_parameter((models, d, d), d**-0.5)
        self.shared_encoders = ModalityEncoders(models, d, *settings)
        self.crossmodal = CrossmodalTransformers(models, d, *settings)
        self.memory = ModalityEncoders(models, 2 * d, *settings)
        self.gate, self.fused_gate = GroupedLinear((models, 3), 2 * d, 2 * d), GroupedLinear((models,), 3 * d, 3 * d)
        self.refined = ResidualMLP((models,), 9 * d, model.dropout)
        self.head = GroupedLinear((models,), 9 * d, task.outputs)
        number_dropouts(self)

    def represent(self, inputs: Inputs, draw: DrawKeys | None = None) -> Representation:
        """`s_m = E_m x_m`, `c_m = E_c x_m`; each branch's transformers, and their last elements."""
        (first, later), layouts = by_layer(inputs.masks), inputs.layouts
        embedded = self.embedding(inputs.features, layouts, draw)
        private, shared = self.specific(embedded), [grouped_linear(x, self.shared_weight) for x in embedded]
        of_shared = zip(shared, first, layouts, strict=True)
        summed_up = torch.stack([masked_mean(*of_modality) for of_modality in of_shared], dim=1)
        fused = _last(self.shared_encoders(shared, inputs, draw), len(shared[0])).transpose(1, 2).flatten(2)
        pairs = self.crossmodal(private, first, layouts, draw)
        memories = [torch.cat(pairs[2 * t : 2 * t + 2], dim=-1) for t in range(3)]
        complemented = _last(self.memory(memories, inputs._replace(masks=later), draw), len(shared[0]))
        gates = self.gate(complemented.flatten(0, 1)).sigmoid().view(complemented.shape)
        joint = torch.cat((gates.transpose(1, 2).flatten(2), self.fused_gate(fused).sigmoid()), dim=-1)
        return Representation(embedded, private, shared, summed_up, fused, complemented, joint)

    def specific(self, streams: list[torch.Tensor]) -> list[torch.Tensor]:
        """`E_m x_m`: `[S, R_m, d]` each -> the same."""
        return [grouped_linear(x, weight) for x, weight in zip(streams, self.private_weight.unbind(1), strict=True)]

    def classify(self, joint: torch.Tensor, layout: Layout, draw: DrawKeys | None = None) -> torch.Tensor:
        """`[S, B, 9 d]` -> logits `[S, B, O]`."""
        logits: torch.Tensor = self.head(self.refined(joint, of_samples(layout), draw)[0])
        return logits

    def predict(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[S, B, O]` and joint representations `[S, B, 9 d]`."""
        joint = self.represent(inputs).joint
        return self.classify(joint, inputs.layouts[0]), joint


def _last(encoded: list[tuple[torch.Tensor, torch.Tensor, Layout]], models: int) -> torch.Tensor:
    """The last element of every modality, from what `ModalityEncoders` return: `[S, 3, B, d]`."""
    return torch.cat([take(z, layout.last).unflatten(0, (models, -1)) for z, _, layout in encoded], dim=1)


class GraphDistillation(nn.Module):
    """Modalities learn from each other along weighted edges: the pairs of `PAIRS`, as (student, teacher).

    Args:
        outputs, width: of a modality's logits z, and of its representation.
        size: features of a node, half of them of the logits.
        favoured: the pairs that the prior favours.
        apart: whether representations are pushed apart, too.
    """

    def __init__(
        self,
        models: int,
        outputs: int,
        width: int,
        size: int,
        favoured: tuple[tuple[int, int], ...],
        apart: bool,
    ) -> None:
        super().__init__()
        self.of_logits, self.of_representation = (GroupedLinear((models,), n, size) for n in (outputs, width))
        self.edge = GroupedLinear((models,), 4 * size, 1)
        self.favoured, self.apart = favoured, apart

    def edges(self, logits: torch.Tensor, representation: torch.Tensor, exists: torch.Tensor) -> torch.Tensor:
        """`q = softmax over pairs of w [v_j; v_i] / 8`, `v_m = [W_z z_m; W_r rep_m]`.

        Args:
            logits, representation: `[S, 3, B, O]` and `[S, 3, B, width]`.
            exists: `[S, B, 6]` bool, pairs both of whose modalities the sample has.

        Returns:
            `[S, B, 6]`, which sum to 1 where the sample has a pair.
        """
        nodes = torch.cat((self.of_logits(logits), self.of_representation(representation)), dim=-1)
        both = torch.cat([torch.stack([nodes[:, pair[i]] for pair in PAIRS], dim=2) for i in (0, 1)], dim=-1)
        scores = accumulation(self.edge(both)).squeeze(-1) * EDGE_SCALE
        return scores.masked_fill(~exists, torch.finfo(scores.dtype).min).softmax(-1) * exists

    def forward(self, logits: torch.Tensor, representation: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
        """`L_logit + L_reg (+ L_repr)`, `[S]`; see `edges`, `available` being `[S, 3, B]` bool."""
        exists = torch.stack([available[:, j] & available[:, i] for j, i in PAIRS], dim=-1)
        edges = self.edges(logits, representation, exists)
        prior = constant(_prior, self.favoured, device=edges.device, dtype=edges.dtype)
        weights = edges + prior
        z, rep = accumulation(logits), unit_length(accumulation(representation))
        distance = torch.stack([(z[:, j] - z[:, i].detach()).abs().sum(-1) for j, i in PAIRS], dim=-1)
        loss = mean_where(weights * distance, exists).sum(-1)
        # Products of means over the batch: of the means over all processes.
        counts, joined = gather_rows(exists), gather_rows(edges)
        number = counts.sum(1).clamp_min(1)
        mean = (joined * counts).sum(1) / number  # [S, 6]
        is_any = counts.any(1)
        loss = loss + REGULARISED * ((mean - prior).square() * is_any).sum(-1)
        if self.apart:
            cosines = torch.stack([(rep[:, j] * rep[:, i].detach()).sum(-1).relu() for j, i in PAIRS], dim=-1)
            apart = (gather_rows(cosines) * counts).sum(1) / number
            loss = loss + APART * ((mean + prior) * apart).sum(-1)
        return loss


def _prior(favoured: tuple[tuple[int, int], ...], device: torch.device) -> torch.Tensor:
    """`pi`, `[6]`."""
    scores = [PRIOR_SCALE * (pair in favoured) for pair in PAIRS]
    return torch.tensor(scores, device=device, dtype=torch.float64).softmax(0)


class DMD(Trainable):
    """The network with what it is trained by: decoders, heads of each modality and branch, graph distillation."""

    network: DmdNetwork

    def __init__(self, network: DmdNetwork, model: DmdModel, loss: DmdLoss, models: int = 1) -> None:
        super().__init__()
        self.network, self.weights, self.task = network, loss, network.task
        d, outputs, rate = model.width, network.task.outputs, model.dropout
        self.shared_mlp, self.shared_head = ResidualMLP((models, 3), d, rate), GroupedLinear((models, 3), d, outputs)
        self.private_mlp = ResidualMLP((models, 3), 2 * d, rate)
        self.private_head = GroupedLinear((models, 3), 2 * d, outputs)
        self.fused_mlp, self.fused_head = ResidualMLP((models,), 3 * d, rate), GroupedLinear((models,), 3 * d, outputs)
        if loss.lambda_decoupling:
            self.decoder = uniform_parameter((models, 3, 2 * d, d), (2 * d) ** -0.5)
        if loss.lambda_margin:
            self.aligned = GroupedLinear((models, 3), d, d)
        if loss.lambda_homo:
            self.homo = GraphDistillation(models, outputs, d, 64, TEACHERS["shared"], apart=False)
        if loss.lambda_hetero:
            self.hetero = GraphDistillation(models, outputs, 2 * d, 32, TEACHERS["private"], apart=True)
        number_dropouts(self)

    def losses(self, batch: Batch) -> Losses:
        """The weighted sum of all losses, as functions of `[S, B, 9 d]`, what the prediction is read from."""
        inputs, draw, targets = batch.inputs, batch.draw, batch.targets
        made, one = self.network.represent(inputs, draw), of_samples(inputs.layouts[0])
        models, available = len(made.fused), torch.stack(inputs.available, dim=1)
        u, r = self.shared_mlp(made.summed_up.flatten(0, 1), one, draw)
        refined = self.private_mlp(made.complemented.flatten(0, 1), one, draw)[0]
        z_shared, z_private, r, refined_3 = (
            x.unflatten(0, (models, 3)) for x in (self.shared_head(u), self.private_head(refined), r, refined)
        )
        of_fused = self.fused_head(self.fused_mlp(made.fused, one, draw)[0])
        final = self.network.classify(made.joint, inputs.layouts[0], draw)
        predictions = [final, of_fused, *z_shared.unbind(1), *z_private.unbind(1)]
        errors = [task_errors(self.task, z, targets, self.weights.task, "L1") for z in predictions]
        task = torch.stack(errors).sum(0).mean(1)
        terms = (
            ("homo", self.weights.lambda_homo, lambda: self.homo(z_shared, r, available)),
            ("hetero", self.weights.lambda_hetero, lambda: self.hetero(z_private, refined_3, available)),
            ("decoupling", self.weights.lambda_decoupling, lambda: self.decoupling(made, batch)),
            ("margin", self.weights.lambda_margin, lambda: self.margin(made.summed_up, targets, available)),
        )
        return Losses(*weighted(task, {"task": task}, terms), made.joint)

    def decoupling(self, made: Representation, batch: Batch) -> torch.Tensor:
        """`L_rec + L_cyc + 0.1 L_ort`, `[S]`, over the real frames of the modalities that samples have.

        `x^_m = D_m [s_m; c_m]`: `L_rec = sum_m mean (x^_m - x_m)^2`, `L_cyc = sum_m mean (E_m x^_m - s_m)^2`,
        `L_ort = sum_m mean max(0, cos(s_m, c_m))`.
        """
        pairs = zip(made.private, made.shared, self.decoder.unbind(1), strict=True)
        decoded = [grouped_linear(torch.cat((s, c), dim=-1), weight) for s, c, weight in pairs]
        again = self.network.specific(decoded)
        losses = []
        inputs = batch.inputs
        for m, (layout, real, has) in enumerate(zip(inputs.layouts, batch.real, inputs.available, strict=True)):
            x, s, c, x_hat, s_hat = (
                accumulation(of[m]) for of in (made.embedded, made.private, made.shared, decoded, again)
            )
            cosine = (unit_length(s) * unit_length(c)).sum(-1)
            error = (x_hat - x).square().mean(-1) + (s_hat - s).square().mean(-1) + 0.1 * cosine.relu()
            losses.append(mean_where(error, real & of_rows(has, layout)))
        return torch.stack(losses).sum(0)

    def margin(self, summed_up: torch.Tensor, targets: torch.Tensor, available: torch.Tensor) -> torch.Tensor:
        """`L_mar`: `mean_i mean_{j like i, k unlike i} max(0, 0.15 |y_i - y_k| - cos(g_i, g_j) + cos(g_i, g_k))`.

        i, j, k are the vectors `g_m = W_m c_m` of every sample of all processes that has m; a sample's own other
        modalities are like it. Rows without a like or without an unlike one are left out; 0 if none is left.

        Args:
            summed_up: `[S, 3, B, d]`.
            targets: as the task has them.
            available: `[S, 3, B]` bool.
        """
        g = unit_length(accumulation(self.aligned(summed_up.flatten(0, 1)))).unflatten(0, available.shape[:2])
        y = targets.unsqueeze(-1) if self.task.is_regression else targets
        g, is_there = (gather_rows(x.transpose(1, 2)).flatten(1, 2) for x in (g, available))  # [S, N * 3, ...]
        y = gather_rows(y).repeat_interleave(3, dim=1)
        difference = (y.unsqueeze(1) - y.unsqueeze(2)).abs()
        gap = (difference if self.task.is_regression else (difference > 0)).to(g.dtype).sum(-1)  # [S, M, M]
        pairs = is_there.unsqueeze(1) & is_there.unsqueeze(2)
        like = (gap == 0) & pairs & ~torch.eye(g.shape[1], dtype=torch.bool, device=g.device)
        unlike = (gap > 0) & pairs
        cosine = g @ g.transpose(1, 2)
        hinge = (MARGIN * gap + cosine).unsqueeze(2) - cosine.unsqueeze(3)  # [S, i, j, k]
        likes, unlikes = like.to(g.dtype), unlike.to(g.dtype)
        total = (likes.unsqueeze(2) @ hinge.relu() @ unlikes.unsqueeze(3)).flatten(2).squeeze(2)  # [S, M]
        number = likes.sum(2) * unlikes.sum(2)
        of_row = total / number.clamp_min(1)
        return of_row.sum(1) / (number > 0).sum(1).clamp_min(1)


def network(config: Config, feature_dims: FeatureDims) -> DmdNetwork:
    """The network of a config."""
    assert isinstance(config, DmdConfig)
    return DmdNetwork(config.model, config.task, feature_dims)


def trainable(config: Config, feature_dims: FeatureDims) -> DMD:
    """The network with what it is trained by."""
    assert isinstance(config, DmdConfig)
    return DMD(network(config, feature_dims), config.model, config.loss)


METHOD = Method(
    name="dmd",
    title="DMD",
    published="2023-06",
    compared=True,
    config=DmdConfig,
    network=network,
    phases=(PhaseSpec("network", lambda config, dims, _: trainable(config, dims), (View.MISSING,)),),
    ablations={
        "DMD": [],
        "w/o homo GD": ["loss.lambda_homo=0.0"],
        "w/o hetero GD": ["loss.lambda_hetero=0.0"],
        "w/o decoupling losses": ["loss.lambda_decoupling=0.0"],
        "w/o margin": ["loss.lambda_margin=0.0"],
        "+ missing training": ["missing.enabled=true"],
        "masked": ["model.attention_mask=missing"],
    },
)
