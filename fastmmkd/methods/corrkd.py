"""CorrKD: correlation-decoupled knowledge distillation with incomplete modalities (Li et al., CVPR 2024).

A teacher that was trained on complete samples and a student that sees missing versions of them share one architecture.
Three distillation losses tie the student to the teacher: across samples (SCD), across categories (CPD), and between
responses (RCD). Equation numbers are the paper's.

Shape legend: S models, B samples, N samples over all processes, T_m frames and d_m features of modality m, d width,
O outputs, P problems (4 for the binary IEMOCAP emotions, else 1), C classes of a problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from typing_extensions import Self

from fastmmkd.blocks import LARGEST_WIDTH, MOST_LAYERS, AttentionModel, Block, Config
from fastmmkd.data.batches import Batch, Inputs, Kept
from fastmmkd.distributed import gather_rows, rank, world_size
from fastmmkd.methods.method import Earlier, FeatureDims, Method, Network, Trainable, distillation
from fastmmkd.methods.objective import Losses, weighted
from fastmmkd.nn.dropout import number_dropouts
from fastmmkd.nn.embedding import TemporalEmbedding
from fastmmkd.nn.encoder import ModalityEncoders, chosen
from fastmmkd.nn.grouped import GroupedLinear
from fastmmkd.nn.pooling import masked_mean
from fastmmkd.nn.scaling import unit_length
from fastmmkd.nn.statistics import StatisticsNetwork
from fastmmkd.ops import pairwise_contrastive, prototype_similarity
from fastmmkd.ops.philox import DrawKeys
from fastmmkd.ops.precision import accumulation
from fastmmkd.tasks import Task


class CorrkdModel(AttentionModel):
    """CorrKD's network, teacher and student alike."""

    encoder_layers: int = Field(default=4, gt=0, le=MOST_LAYERS)
    """Layers of each modality's transformer encoder (decision; the paper leaves it open)."""


class CorrkdLoss(Block):
    """`L = L_task + lambda_scd L_SCD + lambda_cpd L_CPD + lambda_rcd L_RCD`; 0 leaves a loss out ("w/o")."""

    lambda_scd: float = Field(default=1.0, ge=0)
    lambda_cpd: float = Field(default=1.0, ge=0)
    lambda_rcd: float = Field(default=1.0, ge=0)
    eta: float = Field(default=1.2, gt=0)
    """Distance beyond which SCD no longer pushes different samples apart; unit vectors are at most 2 apart."""
    normalise: bool = True
    """SCD measures distances of H scaled to unit length (decision: raw H is about 10 long, no pair ever is below eta,
    and SCD's gradient drowns the task's); false: of H as it is (the paper read literally)."""
    reduction: Literal["mean", "sum"] = "mean"
    """SCD over pairs of samples: mean (decision), or the paper's sum, which grows with the square of the batch."""
    rcd: Literal["mutual-information", "kl"] = "mutual-information"
    """kl: "w/o RCD", KL divergence of the responses in its place (MSE for regression)."""
    statistics_width: int = Field(default=64, gt=0, le=LARGEST_WIDTH)
    """Hidden units of RCD's statistics networks (decision)."""
    prototypes: Literal[2, 3, 7] = 3
    """Regression only: classes that CPD bins the scores into."""
    global_batch: bool = True
    """SCD, CPD and RCD see the rows of all processes; false: those of their own only."""

    @model_validator(mode="after")
    def _eta_can_be_passed(self) -> Self:
        if self.normalise and self.eta > 2:
            raise ValueError(
                f"eta: {self.eta:g}, but unit vectors are at most 2 apart; expected at most 2, or normalise=false"
            )
        return self


class CorrkdConfig(Config):
    method: Literal["corrkd"]
    model: CorrkdModel = CorrkdModel()
    loss: CorrkdLoss = CorrkdLoss()


class Representation(NamedTuple):
    """What one network makes of a batch."""

    joint: torch.Tensor
    """H `[S, B, 3 d]`."""
    logits: torch.Tensor
    """`[S, B, O]`; R is their softmax."""


class CorrkdNetwork(Network):
    """Modality representation fusion and classifier (section 3.3), of teacher and student alike.

    Trained by itself it minimises the task loss: that is the teacher, on complete samples, and the student without
    distillation, on missing versions.
    """

    def __init__(self, model: CorrkdModel, task: Task, feature_dims: tuple[int, ...], models: int = 1) -> None:
        super().__init__()
        self.task = task
        d, joint = model.width, 3 * model.width
        self.embedding = TemporalEmbedding(models, feature_dims, d, model.dropout, model.positions)
        self.encoders = ModalityEncoders(models, d, model.heads, model.encoder_layers, model.dropout)
        self.hidden = GroupedLinear((models,), joint, joint)
        self.head = GroupedLinear((models,), joint, task.outputs)
        number_dropouts(self)

    def represent(self, inputs: Inputs, draw: DrawKeys | None = None) -> Representation:
        """`F_m = Conv1d(X_m) + PE`, `E_m = encoder(F_m)`, `H = mean over time of [E_L, E_A, E_V]`, `R = MLP(H)`.

        Decision: each modality's mean is over its frames that the last layer may attend to, and 0 where it has none;
        this also serves streams of different lengths. `draw`: what dropout is drawn from; None = no dropout.
        """
        return self._fused(self._means(inputs, draw))

    def _means(self, inputs: Inputs, draw: DrawKeys | None = None) -> torch.Tensor:
        """Of each modality by itself: `[S, 3, B, d]`."""
        models = len(inputs.features[0])
        encoded = self.encoders(self.embedding(inputs.features, inputs.layouts, draw), inputs, draw)
        return torch.cat([masked_mean(*of_modalities).unflatten(0, (models, -1)) for of_modalities in encoded], dim=1)

    def _fused(self, means_s3bd: torch.Tensor) -> Representation:
        joint = means_s3bd.transpose(1, 2).flatten(2)
        return Representation(joint, self.head(self.hidden(joint, relu=True)))

    def losses(self, batch: Batch) -> Losses:
        """`L_task` as a function of `H [S, B, 3 d]`."""
        joint, logits = self.represent(batch.inputs, batch.draw)
        task = self.task.loss(logits, batch.targets)
        return Losses(task, {"task": task}, joint)

    def predict(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[S, B, O]` and joint representations `[S, B, 3 d]`."""
        joint, logits = self.represent(inputs)
        return logits, joint

    def predict_subsets(self, inputs: Inputs, subsets: Sequence[Kept]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Modalities meet after their encoders: these run once with all there is, and once with nothing."""
        whole, nothing = (self._means(of) for of in (inputs, inputs.only((False, False, False))))
        made = (self._fused(chosen(whole, nothing, kept)) for kept in subsets)
        return [(logits, joint) for joint, logits in made]


class CorrKD(Trainable):
    """The student with its distillation losses.

    Args:
        network: the student's.
        loss: weights and readings.
        teacher: frozen; no part of this module.
        models: S.
    """

    network: CorrkdNetwork
    frozen: tuple[CorrkdNetwork]

    def __init__(self, network: CorrkdNetwork, loss: CorrkdLoss, teacher: CorrkdNetwork, models: int = 1) -> None:
        super().__init__()
        self.network, self.frozen = network, (teacher,)
        self.weights = loss
        self.task = network.task
        self.has_response_bounds = bool(loss.lambda_rcd) and loss.rcd == "mutual-information"
        if self.has_response_bounds:
            task, hidden = self.task, loss.statistics_width
            others = 1 if task.is_regression else task.outputs // task.problems - 1
            groups = (models, task.problems)
            if not task.is_regression:
                self.target_statistics = StatisticsNetwork(groups, 1, 1, hidden)
            self.other_statistics = StatisticsNetwork(groups, others, others, hidden)

    def teach(self, complete: Inputs) -> Representation:
        """What the frozen teacher makes of complete samples."""
        (teacher,) = self.frozen
        return teacher.represent(complete)

    def losses(self, batch: Batch) -> Losses:
        """`L = L_task + L_SCD + L_CPD + L_RCD`, each with its weight; functions of `H [S, B, 3 d]`."""
        targets, taught = batch.targets, batch.taught
        joint, logits = self.network.represent(batch.inputs, batch.draw)
        task = self.task.loss(logits, targets)
        terms = (
            ("scd", self.weights.lambda_scd, lambda: self.contrastive(joint, taught.joint)),
            ("cpd", self.weights.lambda_cpd, lambda: self.prototypes(joint, taught.joint, targets)),
            ("rcd", self.weights.lambda_rcd, lambda: self.responses(logits, taught.logits, targets)),
        )
        return Losses(*weighted(task, {"task": task}, terms), joint)

    def contrastive(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """`L_SCD` (eq. 1): the own student rows against the teacher rows of every process, `[S, B, 3 d]` -> `[S]`.

        Decision: distances are those of unit vectors (`loss.normalise`), because eta means nothing on an unknown scale.
        """
        eta, reduction = self.weights.eta, self.weights.reduction
        if self.weights.normalise:
            student, teacher = unit_length(student), unit_length(teacher)
        if not self.weights.global_batch:
            return pairwise_contrastive(student, teacher, eta, reduction=reduction)
        offset = rank() * student.shape[1]
        loss = pairwise_contrastive(student, gather_rows(teacher), eta, offset, reduction)
        return loss * world_size() if reduction == "sum" else loss  # the engine averages over processes

    def prototypes(self, student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """`L_CPD` (eqs. 2 to 4): `[S, B, 3 d]` twice -> `[S]`.

        Decision: with several problems (the binary emotions) the classes are those of one emotion, "does not hold" and
        "holds", and the loss is averaged over the emotions. Regression bins its scores into `loss.prototypes` classes.
        """
        classes_sbp, count = self.task.classes(targets, self.weights.prototypes)
        student, teacher, classes_sbp = (self._joined(x) for x in (student, teacher, classes_sbp))
        problems = classes_sbp.shape[-1]
        if problems > 1:
            student, teacher = (x.repeat_interleave(problems, dim=0) for x in (student, teacher))
        loss = prototype_similarity(student, teacher, classes_sbp.transpose(1, 2).flatten(0, 1), count)
        return loss.view(-1, problems).mean(1)

    def responses(self, student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """`L_RCD = -I(Rt_T, Rs_T) - I(Rt_NT, Rs_NT)` (eq. 7): logits `[S, B, O]` twice -> `[S]`.

        Decision: with several problems the true class is that of each emotion ("does not hold" or "holds"), each
        emotion has statistics networks of its own, and the loss is averaged over the emotions. Regression has one
        response, the score: `-I(Rt, Rs)`.
        """
        if not self.has_response_bounds:
            return self.task.divergence(teacher, student)
        student, teacher = self._joined(student), self._joined(teacher)
        if self.task.is_regression:
            return -self.other_statistics(teacher, student)
        classes_snp = self._joined(targets)
        both = self.disentangle(torch.cat((teacher, student)), torch.cat((classes_snp, classes_snp)))
        (target_t, target_s), (other_t, other_s) = (x.chunk(2) for x in both)
        bound = self.target_statistics(target_t, target_s) + self.other_statistics(other_t, other_s)
        return -bound.view(-1, self.task.problems).mean(1)

    def disentangle(self, logits: torch.Tensor, classes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Target category response `R_T [S * P, N, 1]` and the others, `R_NT [S * P, N, C - 1]`, not renormalised.

        Args:
            logits: `[S, N, O]`.
            classes: int64 `[S, N, P]`, the true ones.
        """
        response_snpc = self.task.split_problems(accumulation(logits)).softmax(-1).to(logits.dtype)
        target = classes.unsqueeze(-1)
        column = torch.arange(response_snpc.shape[-1] - 1, device=logits.device)
        other = column + (column >= target).long()  # the columns in order, without the target's
        split = response_snpc.gather(-1, target), response_snpc.gather(-1, other)
        true, rest = (part.transpose(1, 2).flatten(0, 1) for part in split)
        return true, rest

    def _joined(self, x: torch.Tensor) -> torch.Tensor:
        return gather_rows(x) if self.weights.global_batch else x


def network(config: Config, feature_dims: FeatureDims) -> CorrkdNetwork:
    """The network of a config."""
    assert isinstance(config, CorrkdConfig)
    return CorrkdNetwork(config.model, config.task, feature_dims)


def student(config: Config, feature_dims: FeatureDims, earlier: Earlier) -> CorrKD:
    """The student of a config, with its frozen teacher."""
    assert isinstance(config, CorrkdConfig)
    teacher = earlier["teacher"]
    assert isinstance(teacher, CorrkdNetwork)
    return CorrKD(network(config, feature_dims), config.loss, teacher)


METHOD = Method(
    name="corrkd",
    title="CorrKD",
    published="2024-06",
    config=CorrkdConfig,
    network=network,
    phases=distillation(network, student),
    ablations={
        "CorrKD": [],
        "w/o SCD": ["loss.lambda_scd=0.0"],
        "w/o CPD": ["loss.lambda_cpd=0.0"],
        "w/o RCD": ["loss.rcd=kl"],  # the paper replaces it by the KL divergence
        "without distillation": ["teacher=null"],
    },
)
