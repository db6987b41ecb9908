"""SMIL: learning with severely missing modality by priors and meta-learning (Ma et al., AAAI 2021; arXiv 2103.05677).

What a sample lacks is filled in by a weighted mean of centroids, the weights being read off what it has; features are
perturbed by networks of what they are; and a step of descent on samples that lack something (inner) must help samples
that do not (outer). Read beside the paper: the public code of `mengmenm/SMIL` (0d0e827), which has two modalities.

Decision: what the code does for one modality that may be missing is done for all three. The networks that it asks for
weights and perturbations read the features of all modalities, 0 where missing, and three flags that say which are
there. Where the paper and its code differ (a multiplicative or a Gaussian perturbation, its variances), the code's form
is taken: an additive softplus, of unit noise in the inner pass and of none elsewhere.

Shape legend: S models, B samples, R_m rows and d_m features of modality m, d width, K centroids, w hidden width,
O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import nn
from torch.func import functional_call
from typing_extensions import Self

from fastmmkd.blocks import LARGEST_WIDTH, MOST_LAYERS, AttentionModel, Config, TeacherBlock
from fastmmkd.data.batches import Batch, Inputs, Kept, ResidentSplit, View
from fastmmkd.data.dataset import Split
from fastmmkd.distributed import world_size
from fastmmkd.errors import UserError
from fastmmkd.methods.baselines import BaselineLoss, TaskLoss, mean_where, task_errors
from fastmmkd.methods.meta import inner_step
from fastmmkd.methods.method import TEACHER_SEEDS, Earlier, FeatureDims, Method, Network, PhaseSpec, Trainable
from fastmmkd.methods.objective import Losses, weighted
from fastmmkd.nn.dropout import Dropout, number_dropouts, of_samples
from fastmmkd.nn.embedding import TemporalEmbedding
from fastmmkd.nn.encoder import ModalityEncoders
from fastmmkd.nn.grouped import GroupedLinear
from fastmmkd.nn.kmeans import kmeans
from fastmmkd.nn.models import Bank
from fastmmkd.nn.noise import normal_noise
from fastmmkd.ops.layout import Layout, take
from fastmmkd.ops.philox import DrawKeys, philox
from fastmmkd.ops.precision import accumulation
from fastmmkd.tasks import Task

MODALITY_COUNT = 3
ITERATIONS = 20
"""Of k-means."""
ASKED_AT_ONCE = 256
"""Samples whose features k-means is given at once."""
JOINT_NOISE, HIDDEN_NOISE = range(2)
"""Places of noise."""


class SmilModel(AttentionModel):
    """SMIL's network."""

    attention_mask: Literal["missing", "padding", "none"] = "padding"
    """As for every method; dropped frames are attended to as the zeros they are (decision: the papers' tables give this
    system zeros, not a mask). Which modalities are there, it is told in either case."""
    encoder_layers: int = Field(default=1, gt=0, le=MOST_LAYERS)
    """Of each modality's transformer encoder (decision; the code has convolutions of images and of sound)."""
    hidden: int = Field(default=64, gt=0, le=LARGEST_WIDTH)
    """w."""
    head_dropout: float = Field(default=0.5, ge=0, lt=1)
    """Before the last layer, in both passes (as in the code)."""
    centroids: int = Field(default=10, gt=0, le=LARGEST_WIDTH)
    """K, of each modality."""
    prior: bool = True
    """False: "w/o prior", what is missing is the mean of the centroids, whatever the sample has."""
    noise: bool = True
    """False: "w/o feature noise", features are not perturbed."""


class SmilTeacher(TeacherBlock):
    """The phase that pretrains encoders and classifier on complete samples."""

    paired: float = Field(default=1.0, gt=0, le=1)
    """The share of the complete training samples that are ever seen complete, in either phase: the severely missing
    regime of the paper, where 0.1 to 0.5 is a fixed subset, the same for all seeds (decision)."""


class SmilLoss(BaselineLoss):
    """`L = L_inner + L_task + lambda_joint |x - x_clean|^2 + lambda_hidden |x_1 - x_1,clean|^2`."""

    lambda_joint: float = Field(default=0.01, ge=0)
    lambda_hidden: float = Field(default=0.01, ge=0)
    inner_lr: float = Field(default=1e-3, ge=0, le=10)
    """alpha, the rate of the inner step. 0: there is none, and both passes have the same weights."""
    inner_decay: int | None = Field(default=1000, gt=0)
    """The rate falls to a tenth after so many steps, again and again (as in the code); null = never."""
    order: Literal[1, 2] = 1
    """1 (decision): the inner gradient is a constant to the outer loss; it costs two passes forward and back. 2: the
    outer loss is differentiated through it, as in the code."""


class SmilConfig(Config):
    """Two phases: encoders and classifier on complete samples, then meta-learning."""

    method: Literal["smil"]
    model: SmilModel = SmilModel()
    teacher: SmilTeacher = SmilTeacher()
    loss: SmilLoss = SmilLoss()

    @model_validator(mode="after")
    def _something_is_missing(self) -> Self:
        if not self.missing.enabled:
            raise ValueError("missing.enabled: false, but SMIL learns to fill in what is missing; expected true")
        return self

    @model_validator(mode="after")
    def _an_inner_step_can_be_taken(self) -> Self:
        if not self.loss.inner_lr:
            return self
        stage = (self.deepspeed.get("zero_optimization") or {}).get("stage", 0)
        if stage >= 2:
            raise ValueError(
                f"deepspeed.zero_optimization.stage: {stage} divides the gradients among processes, and the inner step "
                "needs all of them; expected 0 or 1, or loss.inner_lr=0"
            )
        for precision in ("fp16", "bf16"):
            if (self.deepspeed.get(precision) or {}).get("enabled"):
                raise ValueError(
                    f"deepspeed.{precision}.enabled: true, but an inner step of {self.loss.inner_lr:g} is lost in its "
                    "rounding; expected false, or loss.inner_lr=0"
                )
        return self


class Pass(NamedTuple):
    """What a network makes of a batch."""

    joint: torch.Tensor
    """x `[S, B, 3 d]`."""
    hidden: torch.Tensor
    """`x_1 [S, B, w]`."""
    logits: torch.Tensor
    """`[S, B, O]`."""


class Features(NamedTuple):
    """Of each modality by itself."""

    values: torch.Tensor
    """f `[S, 3, B, d]`, 0 where the sample lacks the modality."""
    there: torch.Tensor
    """a `[S, 3, B]` bool."""
    layout: Layout
    """Whose rows `[S, B, ...]` are."""


class Imputation(nn.Module):
    """What fills in missing features, and what perturbs features: the inner step leaves it as it is."""

    centroids: torch.Tensor
    """C `[S, 3, K, d]`."""

    def __init__(self, model: SmilModel, models: int = 1) -> None:
        super().__init__()
        d, w, k = model.width, model.hidden, model.centroids
        known = MODALITY_COUNT * (d + 1)
        self.register_buffer("centroids", torch.zeros(models, MODALITY_COUNT, k, d))
        self.has_prior, self.has_noise = model.prior, model.noise
        if model.prior:
            self.weights = GroupedLinear((models, MODALITY_COUNT), known, k)
        if model.noise:
            self.of_joint = GroupedLinear((models,), known, MODALITY_COUNT * d)
            self.of_hidden = GroupedLinear((models,), MODALITY_COUNT * d, w)

    def fill(self, features: Features) -> torch.Tensor:
        """f where it is there, else `g~ = sum_k omega_k C_k / sum_k omega_k`, `omega = softplus(n_0 f)`.

        Decision: so it is in the clean pass too, where the data themselves lack a modality of a sample.

        Returns:
            `[S, 3, B, d]`.
        """
        if self.has_prior:
            known = self.known(features).unsqueeze(1).expand(-1, MODALITY_COUNT, -1, -1)
            omega = F.softplus(self.weights(known.contiguous()))  # [S, 3, B, K]
            guess = omega @ self.centroids / omega.sum(-1, keepdim=True)
        else:
            guess = self.centroids.mean(2, keepdim=True)
        return torch.where(features.there.unsqueeze(-1), features.values, guess)

    def perturb_joint(self, x: torch.Tensor, features: Features, noise: torch.Tensor | None) -> torch.Tensor:
        """`x + softplus(n_1 f + eps)`; x without feature noise."""
        return x + F.softplus(_plus(self.of_joint(self.known(features)), noise)) if self.has_noise else x

    def perturb_hidden(self, x_1: torch.Tensor, x: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
        """`x_1 + softplus(n_2 x + eps)`; `x_1` without feature noise."""
        return x_1 + F.softplus(_plus(self.of_hidden(x), noise)) if self.has_noise else x_1

    @staticmethod
    def known(features: Features) -> torch.Tensor:
        """What the networks read: features of all modalities, and three flags, `[S, B, 3 d + 3]`."""
        values, there, _ = features
        flags = there.to(values.dtype).transpose(1, 2)
        return torch.cat((values.transpose(1, 2).flatten(2), flags), dim=-1)


def _plus(x: torch.Tensor, noise: torch.Tensor | None) -> torch.Tensor:
    return x if noise is None else x + noise


class SmilBody(nn.Module):
    """Encoders and classifier, theta: what is pretrained, and what the inner step adapts."""

    def __init__(self, model: SmilModel, task: Task, feature_dims: tuple[int, ...], models: int = 1) -> None:
        super().__init__()
        d = model.width
        self.embedding = TemporalEmbedding(models, feature_dims, d, model.dropout, model.positions)
        self.encoders = ModalityEncoders(models, d, model.heads, model.encoder_layers, model.dropout)
        self.hidden = GroupedLinear((models,), MODALITY_COUNT * d, model.hidden)
        self.dropout = Dropout(model.head_dropout)
        self.head = GroupedLinear((models,), model.hidden, task.outputs)

    def forward(
        self,
        inputs: Inputs,
        draw: DrawKeys | None = None,
        imputation: Imputation | None = None,
        perturbed: bool = False,
        noisy: bool = False,
    ) -> Pass:
        """A pass over samples.

        Args:
            draw: what dropout and noise are drawn from; None = neither. A sample's dropout is the same in every pass.
            imputation: what fills in what is missing; None = zeros do.
            perturbed: whether features are perturbed.
            noisy: by noise, too.
        """
        return self.fused(self.features(inputs, draw), draw, imputation, perturbed, noisy)

    def features(self, inputs: Inputs, draw: DrawKeys | None = None) -> Features:
        """`f_m`, the last element of the encoder's output, and which modalities a sample has a frame of."""
        models = len(inputs.features[0])
        encoded = self.encoders(self.embedding(inputs.features, inputs.layouts, draw), inputs, draw)
        values = torch.cat([take(z, layout.last).unflatten(0, (models, -1)) for z, _, layout in encoded], dim=1)
        there = torch.stack(inputs.available, dim=1)
        return Features(values * there.unsqueeze(-1), there, of_samples(inputs.layouts[0]))

    def fused(
        self,
        features: Features,
        draw: DrawKeys | None = None,
        imputation: Imputation | None = None,
        perturbed: bool = False,
        noisy: bool = False,
    ) -> Pass:
        """`x`, `x_1 = ReLU(W x)`, and `W' dropout(x_1)`; arguments as `forward` has them."""
        filled = features.values if imputation is None else imputation.fill(features)
        x = filled.transpose(1, 2).flatten(2)
        d, w, dtype = x.shape[-1], self.hidden.bias.shape[-1], x.dtype
        noises: list[torch.Tensor | None] = [None, None]
        if noisy and draw is not None:
            noises = [normal_noise(draw, place, n, dtype) for place, n in ((JOINT_NOISE, d), (HIDDEN_NOISE, w))]
        if perturbed and imputation is not None:
            x = imputation.perturb_joint(x, features, noises[JOINT_NOISE])
        x_1 = self.hidden(x, relu=True)
        if perturbed and imputation is not None:
            x_1 = imputation.perturb_hidden(x_1, x, noises[HIDDEN_NOISE])
        return Pass(x, x_1, self.head(self.dropout(x_1, features.layout, draw)))


class PretrainedNetwork(Network):
    """Encoders and classifier by themselves, trained on complete samples; what a sample lacks is 0 (decision)."""

    def __init__(
        self, model: SmilModel, reading: TaskLoss, task: Task, feature_dims: tuple[int, ...], models: int = 1
    ) -> None:
        super().__init__()
        self.task, self.reading = task, reading
        self.body = SmilBody(model, task, feature_dims, models)
        number_dropouts(self)

    def losses(self, batch: Batch) -> Losses:
        """`L_task` as a function of `x [S, B, 3 d]`."""
        made = self.body(batch.inputs, batch.draw)
        task = task_errors(self.task, made.logits, batch.targets, self.reading, own="MSE").mean(1)
        return Losses(task, {"task": task}, made.joint)

    def predict(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[S, B, O]` and `x_1 [S, B, w]`."""
        made = self.body(inputs)
        return made.logits, made.hidden


class SmilNetwork(Network):
    """Encoders, classifier, and what fills in and perturbs."""

    def __init__(self, model: SmilModel, task: Task, feature_dims: tuple[int, ...], models: int = 1) -> None:
        super().__init__()
        self.task = task
        self.body = SmilBody(model, task, feature_dims, models)
        self.imputation = Imputation(model, models)
        number_dropouts(self)

    def predict(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[S, B, O]` and `x_1 [S, B, w]`; features are perturbed without noise (as in the code)."""
        return self._predicted(self.body.features(inputs))

    def predict_subsets(self, inputs: Inputs, subsets: Sequence[Kept]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Modalities meet after their encoders, which run once with all there is."""
        values, there, layout = self.body.features(inputs)
        predictions = []
        for subset in subsets:
            of_modalities = zip(there.unbind(1), subset, strict=True)
            kept = torch.stack([x if k else torch.zeros_like(x) for x, k in of_modalities], dim=1)
            predictions.append(self._predicted(Features(values * kept.unsqueeze(-1), kept, layout)))
        return predictions

    def _predicted(self, features: Features) -> tuple[torch.Tensor, torch.Tensor]:
        made = self.body.fused(features, None, self.imputation, perturbed=True)
        return made.logits, made.hidden


class SMIL(Trainable):
    """Meta-learning, from what was pretrained.

    Args:
        network: what is trained.
        loss: weights and readings.
        pretrained: frozen; no part of this module.
        teacher: says which samples are ever seen complete.
        models: S.
    """

    network: SmilNetwork
    picks: torch.Tensor
    """`[S, 3, K]`, what k-means++ picks by; drawn with the initial weights, and like them from the seed alone."""
    is_paired: torch.Tensor
    """`[N]` bool, training samples that are ever seen complete; once it is prepared."""

    def __init__(
        self,
        network: SmilNetwork,
        loss: SmilLoss,
        pretrained: PretrainedNetwork,
        teacher: SmilTeacher,
        models: int = 1,
    ) -> None:
        super().__init__()
        self.network, self.pretrained = network, (pretrained,)
        self.task, self.weights, self.teacher = network.task, loss, teacher
        self.steps = Bank((1,), torch.int64, models)
        self.register_buffer("picks", torch.rand(models, *network.imputation.centroids.shape[1:3]), persistent=False)

    def start(self) -> None:
        """Take over the pretrained encoders and classifier."""
        (pretrained,) = self.pretrained
        self.network.body.load_state_dict(pretrained.body.state_dict())

    @torch.no_grad()
    def prepare(self, split: ResidentSplit) -> None:
        """Centroids: k-means on the pretrained features of the samples that are seen complete and have the modality."""
        if self.weights.order == 2 and self.weights.inner_lr and world_size() > 1:
            raise UserError(f"loss.order: 2 trains in one process, there are {world_size()}; expected 1")
        (pretrained,) = self.pretrained
        models, device = len(self.picks), split.present.device
        paired = paired_rows(split.present.cpu().numpy(), self.teacher)
        if not len(paired):
            raise UserError(
                "teacher.incomplete_samples: false, but no training sample has all modalities; expected true"
            )
        self.is_paired = torch.zeros(split.size, dtype=torch.bool, device=device)
        self.is_paired[torch.from_numpy(paired).to(device)] = True
        asked = torch.from_numpy(paired).to(device).split(ASKED_AT_ONCE)
        made = [pretrained.body.features(split.complete(rows[None]).of_models(models)) for rows in asked]
        values, there = (torch.cat(parts, dim=2) for parts in zip(*(of[:2] for of in made), strict=True))
        centroids = self.network.imputation.centroids
        found = kmeans(values.flatten(0, 1).double(), there.flatten(0, 1), self.picks.flatten(0, 1), ITERATIONS)
        centroids.copy_(found.view_as(centroids))

    def losses(self, batch: Batch) -> Losses:
        """`L_inner(theta) + L_outer(theta')`, functions of the inner and the outer pass' `x [S, B, 3 d]`.

        The inner pass sees the first missing version, with noise; the outer one the second, without, and the complete
        sample, not perturbed. Decision: so every sample is in both; the outer loss is that of those seen complete.
        """
        body, imputation, draw = self.network.body, self.network.imputation, batch.draw
        noised = body(batch.view(View.MISSING), draw, imputation, perturbed=True, noisy=True)
        inner = self._errors(noised, batch).mean(1)
        added, theta = inner, dict(body.named_parameters())
        adapted: dict[str, torch.Tensor] = dict(theta)
        if self.weights.inner_lr:
            others = list(imputation.parameters())
            adapted, added = inner_step(inner, theta, others, self.rate, self.weights.order)

        def outer_pass(inputs: Inputs, perturbed: bool) -> Pass:
            made: Pass = functional_call(body, adapted, (inputs, draw, imputation, perturbed))
            return made

        filled = outer_pass(batch.view(View.MISSING_2), perturbed=True)
        clean = outer_pass(batch.complete, perturbed=False)
        paired = self.is_paired[batch.rows]
        task = mean_where(self._errors(filled, batch), paired)
        terms = (
            ("joint", self.weights.lambda_joint, lambda: _distance(filled.joint, clean.joint, paired)),
            ("hidden", self.weights.lambda_hidden, lambda: _distance(filled.hidden, clean.hidden, paired)),
        )
        return Losses(*weighted(added + task, {"inner": inner, "task": task}, terms), filled.joint)

    @property
    def rate(self) -> torch.Tensor:
        """alpha `[S]`, at the step that is taken."""
        steps, every = self.steps.values[:, 0], self.weights.inner_decay
        tenths = torch.zeros_like(steps) if every is None else steps // every
        return self.weights.inner_lr * torch.pow(0.1, tenths.double())

    def after_step(self, batch: Batch) -> None:
        """Count it."""
        self.steps.values += 1

    def _errors(self, made: Pass, batch: Batch) -> torch.Tensor:
        """The task loss of each sample, `[S, B]`; of scores the squared error (decision, the code knows classes)."""
        return task_errors(self.task, made.logits, batch.targets, self.weights.task, own="MSE")


def _distance(x: torch.Tensor, clean: torch.Tensor, paired: torch.Tensor) -> torch.Tensor:
    """`|x - x_clean|^2`, a mean over features and the samples `[S, B]` that count: `[S, B, n]` twice -> `[S]`."""
    return mean_where((accumulation(x) - accumulation(clean)).square().mean(-1), paired)


def paired_rows(present: np.ndarray, teacher: SmilTeacher) -> np.ndarray:
    """`[n]` int64, the training samples that are ever seen complete: the same for every seed.

    Args:
        present: `[N, 3]` bool, the modalities that samples have.
    """
    rows = np.arange(len(present)) if teacher.incomplete_samples else np.flatnonzero(present.all(axis=1))
    if teacher.paired == 1:
        return rows
    zero, sample = torch.zeros((), dtype=torch.int64), torch.from_numpy(rows)
    order = np.argsort(philox((zero, sample, zero, zero), (zero, zero))[:, 0].numpy(), kind="stable")
    wanted = max(1, round(teacher.paired * len(rows))) if len(rows) else 0
    return np.sort(rows[order[:wanted]])


def pretrained_network(config: Config, feature_dims: FeatureDims, earlier: Earlier) -> PretrainedNetwork:
    """What the first phase trains."""
    assert isinstance(config, SmilConfig)
    return PretrainedNetwork(config.model, config.loss.task, config.task, feature_dims)


def network(config: Config, feature_dims: FeatureDims) -> SmilNetwork:
    """The network of a config."""
    assert isinstance(config, SmilConfig)
    return SmilNetwork(config.model, config.task, feature_dims)


def meta(config: Config, feature_dims: FeatureDims, earlier: Earlier) -> SMIL:
    """What the second phase trains."""
    assert isinstance(config, SmilConfig)
    pretrained = earlier["pretrain"]
    assert isinstance(pretrained, PretrainedNetwork)
    return SMIL(network(config, feature_dims), config.loss, pretrained, config.teacher)


def _teacher(config: Config) -> SmilTeacher:
    assert isinstance(config, SmilConfig)
    return config.teacher


def _rows(config: Config, train: Split) -> np.ndarray:
    return paired_rows(train.present, _teacher(config))


METHOD = Method(
    name="smil",
    title="SMIL",
    published="2021-05",
    compared=True,
    config=SmilConfig,
    network=network,
    phases=(
        PhaseSpec(
            "pretrain",
            pretrained_network,
            (View.COMPLETE,),
            rows=_rows,
            epochs=lambda config: _teacher(config).epochs or config.train.epochs,
            patience=lambda config: _teacher(config).patience,
            select_on=lambda config: "whole" if _teacher(config).incomplete_samples else "complete",
            seed_offset=TEACHER_SEEDS,
            accept_floor=lambda config: _teacher(config).accept_floor,
        ),
        PhaseSpec("meta", meta, (View.MISSING, View.MISSING_2, View.COMPLETE)),
    ),
    ablations={
        "SMIL": [],
        "w/o prior": ["model.prior=false"],
        "w/o feature noise": ["model.noise=false"],
        "w/o inner step": ["loss.inner_lr=0.0"],
        "second order": ["loss.order=2"],
        "masked": ["model.attention_mask=missing"],
    },
)
