"""HRLF: hierarchical representation learning for incomplete multimodal sentiment analysis (Li et al., NeurIPS 2024).

Each modality is factorised into sentiment-relevant and modality-specific representations (FRF). A student that sees
missing versions is aligned with a teacher that sees the complete samples at three scales, in meaning (HMI) and in
distribution (HAL).

Shape legend: S models, B samples, T_m frames and d_m features of modality m, d width, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import nn
from typing_extensions import Self

from fastmmkd.blocks import LARGEST_WIDTH, MOST_LAYERS, AttentionModel, Block, Config
from fastmmkd.data.batches import Batch, Inputs, Kept
from fastmmkd.distributed import gather_rows
from fastmmkd.methods.method import Earlier, FeatureDims, Method, Network, Trainable, distillation
from fastmmkd.methods.objective import Losses, weighted
from fastmmkd.nn.adversarial import Discriminator
from fastmmkd.nn.dropout import number_dropouts
from fastmmkd.nn.embedding import TemporalEmbedding
from fastmmkd.nn.encoder import ModalityEncoders, chosen
from fastmmkd.nn.factorization import RepresentationFactorization
from fastmmkd.nn.grouped import GroupedLinear
from fastmmkd.nn.statistics import StatisticsNetwork
from fastmmkd.ops.layout import take
from fastmmkd.ops.philox import DrawKeys
from fastmmkd.tasks import Task

SCALE_WIDTHS = (3, 2, 1)
"""Widths of `E_1, E_2, E_3` in units of d."""


class HrlfModel(AttentionModel):
    """HRLF's network, teacher and student alike."""

    encoder_layers: int = Field(default=4, gt=0, le=MOST_LAYERS)
    """Layers of each modality's transformer encoder (decision; the paper leaves it open)."""
    frf: bool = True
    """False: "w/o FRF", the joint representation is that of the modalities themselves, none is factorised."""

    @model_validator(mode="after")
    def _halves(self) -> Self:
        if self.width % 2:
            raise ValueError(f"width: {self.width}; expected an even number, Q_m and U_m have width / 2 each")
        return self


class HrlfLoss(Block):
    """`L = L_task + lambda_frf L_FRF + lambda_hmi L_HMI + lambda_hal L_HAL + lambda_kl L_KL`; 0 leaves a loss out."""

    lambda_frf: float = Field(default=1.0, ge=0)
    lambda_hmi: float = Field(default=1.0, ge=0)
    lambda_hal: float = Field(default=1.0, ge=0)
    lambda_kl: float = Field(default=1.0, ge=0)
    frf_gradient: Literal["factors", "everything"] = "factors"
    """What L_FRF trains. factors (deviation): FRF's own MLPs and decoder, on Z as it is. everything: the modalities'
    encoders too, as the paper has it; L_FRF is least where no Z depends on its sample, and weight 1 ends there."""
    hmi_negatives: Literal["layer", "joined"] = "layer"
    """What HMI's marginal pairs are taken from. layer (decision): rows of one layer, H with H, H~ with H~. joined: all
    rows of a scale; half of the pairs then tell layers apart, and the bound rises on nothing else."""
    statistics_width: int = Field(default=64, gt=0, le=LARGEST_WIDTH)
    """Hidden units of HMI's statistics networks and of HAL's discriminators (decision)."""
    global_batch: bool = True
    """HMI sees the rows of all processes; false: those of its own only."""


class HrlfConfig(Config):
    method: Literal["hrlf"]
    model: HrlfModel = HrlfModel()
    loss: HrlfLoss = HrlfLoss()

    @model_validator(mode="after")
    def _factorisation_is_trained(self) -> Self:
        if self.model.frf and not self.loss.lambda_frf:
            raise ValueError(
                "loss.lambda_frf: 0 leaves the decoder untrained; expected a positive weight, or model.frf=false"
            )
        return self


class Taught(NamedTuple):
    """What a student learns from, samples before layers."""

    scales: tuple[torch.Tensor, ...]
    """`E_1 [S, B, 2, 3 d]`, `E_2 [S, B, 2, 2 d]`, `E_3 [S, B, 1, d]`."""
    logits: torch.Tensor
    """`[S, B, O]`."""


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

    def taught(self) -> Taught:
        """What a student is told of it."""
        return Taught(tuple(e.transpose(1, 2) for e in self.scales), self.logits)


class HrlfNetwork(Network):
    """FRF, the fully-connected stack and the prediction head, of teacher and student alike.

    Trained by itself it minimises `L_task + L_FRF`: that is the teacher, on complete samples, and the student without
    distillation, on missing versions.
    """

    def __init__(
        self, model: HrlfModel, loss: HrlfLoss, task: Task, feature_dims: tuple[int, ...], models: int = 1
    ) -> None:
        super().__init__()
        self.task = task
        self.lambda_frf, self.frf_gradient = loss.lambda_frf, loss.frf_gradient
        self.factorizes = model.frf
        d = model.width
        self.embedding = TemporalEmbedding(models, feature_dims, d, model.dropout, model.positions)
        self.encoders = ModalityEncoders(models, d, model.heads, model.encoder_layers, model.dropout)
        if model.frf:
            self.frf = RepresentationFactorization(models, d)
        widths = [3 * d, 2 * d, d, 2 * d, 3 * d]
        self.stack = nn.ModuleList(GroupedLinear((models,), a, b) for a, b in pairwise(widths))
        # Decision: the paper asks for a light head and leaves it open.
        self.head = GroupedLinear((models,), 3 * d, task.outputs)
        number_dropouts(self)

    def represent(self, inputs: Inputs, draw: DrawKeys | None = None) -> Representation:
        """`Z_m` = last element of the encoder's output, `C_m = [Q_m, U_m]`, `H = [C_L, C_A, C_V]`, then the stack.

        Decision: ReLU after each layer of the stack but the last.

        Args:
            draw: what dropout is drawn from; None = no dropout.
        """
        return self._refined(self._last(inputs, draw))

    def _last(self, inputs: Inputs, draw: DrawKeys | None = None) -> torch.Tensor:
        """Of each modality by itself: Z `[S, 3, B, d]`."""
        models = len(inputs.features[0])
        encoded = self.encoders(self.embedding(inputs.features, inputs.layouts, draw), inputs, draw)
        return torch.cat([take(z, layout.last).unflatten(0, (models, -1)) for z, _, layout in encoded], dim=1)

    def _refined(self, z_s3bd: torch.Tensor) -> Representation:
        joined, factors = z_s3bd, None
        if self.factorizes:
            q, u = self.frf(z_s3bd)
            joined, factors = torch.cat((q, u), dim=-1), (z_s3bd, q, u)
        h = joined.transpose(1, 2).flatten(2)
        to_i1, to_i2, to_i3, to_refined = self.stack
        i1 = to_i1(h, relu=True)
        i2 = to_i2(i1, relu=True)
        i3 = to_i3(i2, relu=True)
        refined = to_refined(i3)
        scales = (torch.stack((h, refined), dim=1), torch.stack((i1, i3), dim=1), i2.unsqueeze(1))
        return Representation(scales, self.head(refined), refined, z_s3bd, factors)

    def losses(self, batch: Batch) -> Losses:
        """`L_task + lambda_frf L_FRF` as functions of `Z [S, 3, B, d]`."""
        made = self.represent(batch.inputs, batch.draw)
        return Losses(*self.supervised(made, batch.targets), made.last)

    def supervised(self, made: Representation, targets: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The losses that need no teacher: their weighted sum `[S]` and the parts `[S]`."""
        task, factors = self.task.loss(made.logits, targets), made.factors
        if factors is None:
            return task, {"task": task}
        return weighted(task, {"task": task}, [("frf", self.lambda_frf, lambda: self.factorization(*factors))])

    def factorization(self, z: torch.Tensor, q: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """`L_FRF` `[S]` of the factors of a representation; deviation: Z is a constant to it (`loss.frf_gradient`)."""
        if self.frf_gradient == "factors":
            z = z.detach()
            q, u = self.frf(z)
        return self.frf.loss(z, q, u)

    def predict(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[S, B, O]` and joint representations `H~ [S, B, 3 d]`."""
        made = self.represent(inputs)
        return made.logits, made.refined

    def predict_subsets(self, inputs: Inputs, subsets: Sequence[Kept]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Modalities meet after their encoders: these run once with all there is, and once with nothing."""
        whole, nothing = (self._last(of) for of in (inputs, inputs.only((False, False, False))))
        made = (self._refined(chosen(whole, nothing, kept)) for kept in subsets)
        return [(of_subset.logits, of_subset.refined) for of_subset in made]


class HRLF(Trainable):
    """The student with its distillation losses.

    Args:
        network: the student's.
        loss: weights and readings.
        width: d.
        teacher: frozen; no part of this module.
        models: S.
    """

    network: HrlfNetwork
    frozen: tuple[HrlfNetwork]

    def __init__(self, network: HrlfNetwork, loss: HrlfLoss, width: int, teacher: HrlfNetwork, models: int = 1) -> None:
        super().__init__()
        self.network, self.frozen = network, (teacher,)
        self.weights = loss
        self.task = network.task
        hidden, widths = loss.statistics_width, [scale * width for scale in SCALE_WIDTHS]
        if loss.lambda_hmi:
            self.statistics = nn.ModuleList(StatisticsNetwork((models,), w, w, hidden) for w in widths)
        if loss.lambda_hal:
            self.discriminators = nn.ModuleList(Discriminator(models, w, hidden) for w in widths)

    def teach(self, complete: Inputs) -> Taught:
        """What the frozen teacher makes of complete samples."""
        (teacher,) = self.frozen
        return teacher.represent(complete).taught()

    def losses(self, batch: Batch) -> Losses:
        """`L = L_task + L_FRF + L_HMI + L_HAL + L_KL`, each with its weight; functions of `Z [S, 3, B, d]`.

        The part `hal` is the discriminators' cross-entropy, `-L_HAL`: gradient reversal turns it into the student's
        `L_HAL` on the way back (decision: one backward pass and one optimiser for both sides).
        """
        made, taught = self.network.represent(batch.inputs, batch.draw), batch.taught
        taught_scales = tuple(e.transpose(1, 2) for e in taught.scales)
        terms = (
            ("hmi", self.weights.lambda_hmi, lambda: self.mutual_information(made.scales, taught_scales)),
            ("hal", self.weights.lambda_hal, lambda: self.adversarial(made.scales, taught_scales)),
            ("kl", self.weights.lambda_kl, lambda: self.task.divergence(taught.logits, made.logits)),
        )
        return Losses(*weighted(*self.network.supervised(made, batch.targets), terms), made.last)

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


def network(config: Config, feature_dims: FeatureDims) -> HrlfNetwork:
    """The network of a config."""
    assert isinstance(config, HrlfConfig)
    return HrlfNetwork(config.model, config.loss, config.task, feature_dims)


def student(config: Config, feature_dims: FeatureDims, earlier: Earlier) -> HRLF:
    """The student of a config, with its frozen teacher."""
    assert isinstance(config, HrlfConfig)
    teacher = earlier["teacher"]
    assert isinstance(teacher, HrlfNetwork)
    return HRLF(network(config, feature_dims), config.loss, config.model.width, teacher)


METHOD = Method(
    name="hrlf",
    title="HRLF",
    published="2024-12",
    config=HrlfConfig,
    network=network,
    phases=distillation(network, student),
    ablations={
        "HRLF": [],
        "w/o FRF": ["model.frf=false"],
        "w/o HMI": ["loss.lambda_hmi=0.0"],
        "w/o HAL": ["loss.lambda_hal=0.0"],
        "without distillation": ["teacher=null"],
    },
)
