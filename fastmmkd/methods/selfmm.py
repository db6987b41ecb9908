"""Self-MM: multi-task learning with labels of single modalities that the network makes itself (Yu et al., AAAI 2021).

Three LSTMs read language, audio and visual. A fusion head predicts the label of the sample; a head per modality, on the
same F_m, predicts a label of that modality, which a table holds for every training sample. The table starts as the
sample's labels and is moved after each step by how near the modality's features are to the centres of positive and of
negative samples, compared with the fused features (the unimodal label generation module, ULGM).

What is computed is that of the public code, `thuiar/Self-MM` at 1786283. Decisions: one LSTM layer of the common width
for each modality, no BERT; one rate for all parameters and one step per batch, where the code sums gradients over four;
centres from running sums over the rows that were stored so far, where the code counts rows it has not seen as zeros;
rows that lack a modality neither train its head, nor move its labels, nor count in its centres; where a class has no
row yet, no label moves. Classification has signed labels, -1 and +1, in each problem of two classes.

Shape legend: S models (one), B samples of a batch, N training samples, d width, P problems, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import nn
from typing_extensions import Self

from fastmmkd.blocks import LARGEST_WIDTH, Config, MaskedOnceModel
from fastmmkd.data.batches import Batch, Inputs, Kept, ResidentSplit, View, by_layer
from fastmmkd.distributed import gather_rows
from fastmmkd.labels import SCORE_LIMITS
from fastmmkd.methods.baselines import BaselineLoss, mean_where, task_errors
from fastmmkd.methods.method import FeatureDims, Method, Network, PhaseSpec, Trainable
from fastmmkd.methods.objective import Losses, Parts, objective, weighted
from fastmmkd.modalities import MODALITIES
from fastmmkd.nn.dropout import Dropout, number_dropouts, of_samples
from fastmmkd.nn.encoder import chosen
from fastmmkd.nn.grouped import GroupedLinear
from fastmmkd.nn.models import Bank
from fastmmkd.nn.recurrent import Recurrence
from fastmmkd.ops.layout import Layout
from fastmmkd.ops.philox import DrawKeys
from fastmmkd.ops.precision import accumulation
from fastmmkd.tasks import Task

NEAR = 1e-8
"""Added to what distances and their differences are divided by."""


class SelfmmModel(MaskedOnceModel):
    """Self-MM's network."""

    fusion_width: int = Field(default=128, gt=0, le=LARGEST_WIDTH)
    """Features of G_f."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """On the last state of each LSTM, and on what every head reads."""


class SelfmmLoss(BaselineLoss):
    """`L = L_task + lambda_unimodal sum_m L_m`; 0 leaves the unimodal heads out."""

    lambda_unimodal: float = Field(default=1.0, ge=0)
    ulgm: bool = True
    """Each modality has labels of its own, which the network makes; false: "w/o ULGM", it learns the sample's, with the
    task loss (decision), which is all that several classes of one problem allow."""


class SelfmmConfig(Config):
    """One phase, on complete samples where `missing.enabled` is false."""

    method: Literal["selfmm"]
    model: SelfmmModel = SelfmmModel()
    teacher: None = None
    loss: SelfmmLoss = SelfmmLoss()

    @model_validator(mode="after")
    def _labels_have_a_sign(self) -> Self:
        task = self.task
        if self.loss.ulgm and self.loss.lambda_unimodal and task.outputs > 2 * task.problems:
            raise ValueError(f"loss.ulgm: true, but the classes of {task.name} have no sign; expected false")
        return self


class Representation(NamedTuple):
    """What the network makes of a batch."""

    modalities: torch.Tensor
    """F_m `[S, 3, B, d]`."""
    fused: torch.Tensor
    """G_f `[S, B, fusion width]`."""
    logits: torch.Tensor
    """`[S, B, O]`."""


class SelfmmNetwork(Network):
    """Encoders and fusion head; the unimodal heads are needed in training alone."""

    def __init__(self, model: SelfmmModel, task: Task, feature_dims: FeatureDims) -> None:
        super().__init__()
        self.task = task
        d, fused = model.width, model.fusion_width
        self.encoders = nn.ModuleList(Recurrence("lstm", d_m, d) for d_m in feature_dims)
        self.encoded = GroupedLinear((1, 3), d, d)
        self.fusion = GroupedLinear((1,), 3 * d, fused)
        self.hidden = GroupedLinear((1,), fused, fused)
        self.head = GroupedLinear((1,), fused, task.outputs)
        self.state_dropout, self.fusion_dropout = Dropout(model.dropout), Dropout(model.dropout)
        number_dropouts(self)

    def represent(self, inputs: Inputs, draw: DrawKeys | None = None) -> Representation:
        """`F_m = Linear(drop(LSTM_m(X_m)))`, `G_f = ReLU(W_1 drop([F_L, F_A, F_V]))`, `y_f = W_3 ReLU(W_2 G_f)`."""
        return self._fused(self._last(inputs), inputs.layouts[0], draw)

    def _last(self, inputs: Inputs) -> torch.Tensor:
        """Each LSTM's last state, `[S, 3, B, d]`."""
        first, _ = by_layer(inputs.masks)
        of_modalities = zip(self.encoders, inputs.features, first, inputs.layouts, strict=True)
        return torch.stack([encoder(x, mask, layout).last[0] for encoder, x, mask, layout in of_modalities], dim=1)

    def _fused(self, last_s3bd: torch.Tensor, layout: Layout, draw: DrawKeys | None = None) -> Representation:
        one = of_samples(layout)
        encoded = self.encoded(self.state_dropout(last_s3bd.flatten(0, 1), one, draw)).view(last_s3bd.shape)
        joined = encoded.transpose(1, 2).flatten(2)
        fused = self.fusion(self.fusion_dropout(joined, one, draw), relu=True)
        return Representation(encoded, fused, self.head(self.hidden(fused, relu=True)))

    def predict(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[S, B, O]` and joint representations `G_f [S, B, fusion width]`."""
        made = self.represent(inputs)
        return made.logits, made.fused

    def predict_subsets(self, inputs: Inputs, subsets: Sequence[Kept]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Modalities meet after their LSTMs: these run once with all there is, and once with nothing."""
        whole, nothing = (self._last(of) for of in (inputs, inputs.only((False, False, False))))
        made = (self._fused(chosen(whole, nothing, kept), inputs.layouts[0]) for kept in subsets)
        return [(of_subset.logits, of_subset.fused) for of_subset in made]


class Centres(nn.Module):
    """The features G_s of every training sample as they were last stored, and the mean of each class of each problem.

    Args:
        d: features.
        problems: P.
    """

    def __init__(self, d: int, problems: int) -> None:
        super().__init__()
        self.features = Bank((0, d))
        self.is_stored = Bank((0,), torch.int64)
        self.sums = Bank((problems, 2, d))
        """`[S, P, 2, d]`, over the stored rows with a negative label, and with another."""
        self.counts = Bank((problems, 2), torch.int64)

    def make_room(self, samples: int) -> None:
        """For so many training samples, none of which is stored."""
        for bank in (self.features, self.is_stored):
            bank.values = bank.values.new_zeros(1, samples, *bank.values.shape[2:])

    def nearness(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`delta = (|G - c-| - |G - c+|) / (|G - c+| + 1e-8)` of rows `[S, n, d]`, and whether both classes have one.

        Returns:
            `[S, n, P]`, and `[S, 1, P]` bool.
        """
        counts = self.counts.values
        centres = self.sums.values / counts.clamp_min(1).unsqueeze(-1)
        negative, positive = torch.linalg.vector_norm(features[:, :, None, None] - centres[:, None], dim=-1).unbind(-1)
        return (negative - positive) / (positive + NEAR), (counts > 0).all(-1).unsqueeze(1)

    def store(
        self,
        rows: torch.Tensor,
        features: torch.Tensor,
        labels: torch.Tensor,
        new_labels: torch.Tensor,
        counts: torch.Tensor,
    ) -> None:
        """Put features in the place of those of some samples, and into the sums.

        Args:
            rows: `[S, n]` int64, no row twice.
            features: `[S, n, d]`.
            labels, new_labels: `[S, n, P]`, before the step and after it.
            counts: `[S, n]` bool; the others stay as they are.
        """
        index = rows.unsqueeze(-1).expand_as(features)
        old, was_stored = self.features.values.gather(1, index), self.is_stored.values.gather(1, rows)
        left = _sides(labels) * (was_stored * counts)[..., None, None]
        joined = _sides(new_labels) * counts[..., None, None]
        self._add(-left, old)
        self._add(joined, features)
        self.features.values.scatter_(1, index, torch.where(counts.unsqueeze(-1), features, old))
        self.is_stored.values.scatter_(1, rows, was_stored | counts)

    def rebuild(self, labels: torch.Tensor) -> None:
        """The sums anew, without what rounding has left in them: `[S, N, P]` labels."""
        self.sums.values.zero_()
        self.counts.values.zero_()
        self._add(_sides(labels) * self.is_stored.values[..., None, None], self.features.values)

    def _add(self, members_snp2: torch.Tensor, features: torch.Tensor) -> None:
        self.counts.values += members_snp2.sum(1)
        self.sums.values += torch.einsum("snpc,snd->spcd", members_snp2.to(features.dtype), features)


def _sides(labels: torch.Tensor) -> torch.Tensor:
    """`[...]` -> `[..., 2]` int64, 1 where a label is negative, and where it is not."""
    return torch.stack((labels < 0, labels >= 0), dim=-1).long()


class Stored(NamedTuple):
    """What the labels are made of, of a batch, detached."""

    features: list[torch.Tensor]
    """G_f and the three G_m, `[S, B, ...]` float32."""
    counts: list[torch.Tensor]
    """`[S, B]` bool each: whether the sample has it."""


class SelfMM(Trainable):
    """The network with its unimodal heads and their labels.

    Args:
        network: what is evaluated.
        model, loss: widths; weights and readings.
    """

    network: SelfmmNetwork
    stored: Stored
    """Of the last forward pass."""
    y: torch.Tensor
    """`[S, N, P]`, the labels of the training samples."""

    def __init__(self, network: SelfmmNetwork, model: SelfmmModel, loss: SelfmmLoss) -> None:
        super().__init__()
        self.network, self.weights, self.task = network, loss, network.task
        self.makes_labels = loss.ulgm and bool(loss.lambda_unimodal)
        if loss.lambda_unimodal:
            d, task = model.width, network.task
            outputs = task.problems if loss.ulgm else task.outputs
            self.unimodal = GroupedLinear((1, 3), d, d)
            self.unimodal_hidden = GroupedLinear((1, 3), d, d)
            self.unimodal_head = GroupedLinear((1, 3), d, outputs)
            self.unimodal_dropout = Dropout(model.dropout)
        if self.makes_labels:
            self.labels = Bank((0, 3, task.problems))
            """y_m, `[S, N, 3, P]`."""
            widths = (model.fusion_width, *[d] * len(MODALITIES))
            centres = nn.ModuleList(Centres(width, task.problems) for width in widths)
            self.centres: Sequence[Centres] = centres  # type: ignore[assignment]
        number_dropouts(self)

    def prepare(self, split: ResidentSplit) -> None:
        """Every label is the sample's own, and nothing is stored."""
        if self.makes_labels:
            self.y = self.signed(split.targets[None]).float()
            self.labels.values = self.y.unsqueeze(2).repeat(1, 1, 3, 1)
            for centres in self.centres:
                centres.make_room(split.size)

    def signed(self, targets: torch.Tensor) -> torch.Tensor:
        """Labels with a sign, `[S, B, P]` float: scores, or -1 and +1 for the classes of each problem."""
        return targets.unsqueeze(-1) if self.task.is_regression else 2.0 * targets - 1.0

    def forward(self, batch: Batch) -> tuple[torch.Tensor, Parts]:
        """As every phase's; remembers the features that `after_step` stores."""
        losses, stored = self._losses(batch)
        if stored is not None:
            self.stored = stored
        return objective(losses.total, losses.parts)

    def losses(self, batch: Batch) -> Losses:
        """`L = L_task + sum_m L_m`, each with its weight; functions of `F [S, 3, B, d]`."""
        return self._losses(batch)[0]

    def _losses(self, batch: Batch) -> tuple[Losses, Stored | None]:
        inputs, draw = batch.inputs, batch.draw
        made = self.network.represent(inputs, draw)
        task = task_errors(self.task, made.logits, batch.targets, self.weights.task, "L1").mean(1)
        parts = {"task": task}
        if not self.weights.lambda_unimodal:
            return Losses(task, parts, made.modalities), None
        one = of_samples(inputs.layouts[0])
        dropped = self.unimodal_dropout(made.modalities.flatten(0, 1), one, draw)
        unimodal = self.unimodal(dropped, relu=True)
        logits = self.unimodal_head(self.unimodal_hidden(unimodal, relu=True)).view(*made.modalities.shape[:3], -1)
        available = inputs.available
        terms = (("unimodal", self.weights.lambda_unimodal, lambda: self.unimodal_loss(logits, available, batch)),)
        losses = Losses(*weighted(task, parts, terms), made.modalities)
        features = [made.fused, *unimodal.view(made.modalities.shape).unbind(1)]
        counts = [torch.stack(available).any(0), *available]
        return losses, Stored([x.detach().float() for x in features], counts)

    def unimodal_loss(self, logits: torch.Tensor, available: list[torch.Tensor], batch: Batch) -> torch.Tensor:
        """`sum_m mean( tanh|y_m - y| |y^_m - y_m| )` over the samples that have m: `[S, 3, B, P or O]` -> `[S]`.

        Decision: a signed label is learnt by the binary cross-entropy of `(y_m + 1) / 2`, summed over problems; without
        ULGM the sample's label by the task loss.
        """
        if not self.makes_labels:
            errors = [
                task_errors(self.task, of_modality, batch.targets, self.weights.task, "L1")
                for of_modality in logits.unbind(1)
            ]
        else:
            y, logits = self.signed(batch.targets).unsqueeze(1), accumulation(logits)
            y_m = _rows(self.labels.values, batch.rows).transpose(1, 2).to(logits.dtype)
            if self.task.is_regression:
                error = (logits - y_m).abs()
            else:
                error = nn.functional.binary_cross_entropy_with_logits(logits, (y_m + 1) / 2, reduction="none")
            errors = list(((y_m - y).abs().tanh() * error).sum(-1).unbind(1))
        return torch.stack([mean_where(e, has) for e, has in zip(errors, available, strict=True)]).sum(0)

    def after_step(self, batch: Batch) -> None:
        """Move the labels of the batch's samples by the centres that the step before left, then store its features.

        In the first epoch labels stay what they are. Every process does what one would with the whole batch.
        """
        if not self.makes_labels:
            return
        rows, epoch = gather_rows(batch.rows), batch.draw.epoch + 1
        features, counts = (list(map(gather_rows, of)) for of in self.stored)
        y, labels = _rows(self.y, rows), _rows(self.labels.values, rows)
        made = [centres.nearness(of) for centres, of in zip(self.centres, features, strict=True)]
        new = labels.clone()
        for m in range(len(MODALITIES)):
            moved = self.moved(y, labels[:, :, m], made[m + 1][0], made[0][0], epoch)
            moves = made[0][1] & made[m + 1][1] & counts[m + 1].unsqueeze(-1) & (epoch > 1) & ~moved.isnan()
            new[:, :, m] = torch.where(moves, moved, labels[:, :, m])
        of_heads = [(y, y), *zip(labels.unbind(2), new.unbind(2), strict=True)]
        for centres, of, has, before_after in zip(self.centres, features, counts, of_heads, strict=True):
            centres.store(rows, of, *before_after, has)
        self.labels.values.scatter_(1, rows[..., None, None].expand_as(new), new)

    def moved(
        self, y: torch.Tensor, y_m: torch.Tensor, delta_m: torch.Tensor, delta_f: torch.Tensor, epoch: torch.Tensor
    ) -> torch.Tensor:
        """`y_m <- (e - 1) / (e + 1) y_m + 2 / (e + 1) clip(y delta_m / delta_f / 2 + (y + delta_m - delta_f) / 2)`,
        `[S, n, P]` each; the epoch counts from 1. NaN where `delta_f` says nothing."""
        limit = SCORE_LIMITS[self.task.label_kind] if self.task.is_regression else 1.0
        new = 0.5 * y * delta_m / (delta_f + NEAR) + 0.5 * (y + delta_m - delta_f)
        return ((epoch - 1) * y_m + 2 * new.clamp(-limit, limit)) / (epoch + 1)

    def end_epoch(self, epoch: int) -> None:
        """Rebuild the centres: sums that rows come into and leave drift."""
        if self.makes_labels:
            for centres, labels in zip(self.centres, [self.y, *self.labels.values.unbind(2)], strict=True):
                centres.rebuild(labels)


def _rows(table: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """`[S, N, ...]` and `[S, n]` -> `[S, n, ...]`."""
    return table.gather(1, rows[(..., *[None] * (table.dim() - 2))].expand(*rows.shape, *table.shape[2:]))


def network(config: Config, feature_dims: FeatureDims) -> SelfmmNetwork:
    """The network of a config."""
    assert isinstance(config, SelfmmConfig)
    return SelfmmNetwork(config.model, config.task, feature_dims)


def trainable(config: Config, feature_dims: FeatureDims) -> SelfMM:
    """The network with its unimodal heads."""
    assert isinstance(config, SelfmmConfig)
    return SelfMM(network(config, feature_dims), config.model, config.loss)


METHOD = Method(
    name="selfmm",
    title="Self-MM",
    published="2021-02",
    compared=True,
    config=SelfmmConfig,
    network=network,
    phases=(PhaseSpec("network", lambda config, dims, _: trainable(config, dims), (View.MISSING,)),),
    ablations={
        "Self-MM": [],
        "w/o ULGM": ["loss.ulgm=false", "loss.lambda_unimodal=0.5"],
        "w/o unimodal heads": ["loss.lambda_unimodal=0.0"],
        "+ missing training": ["missing.enabled=true"],
        "masked": ["model.attention_mask=missing"],
    },
    grouped=False,
)
