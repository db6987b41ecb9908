"""GCNet: graph completion for incomplete conversations (Lian et al., TPAMI 2023; arXiv 2203.02177).

A recurrent net over the nodes of a sequence, two graph convolutions over their neighbourhoods, and from what these make
both a prediction and the features that are missing. It trains on missing versions. Read beside the paper: the public
code of `zeroQiaoba/GCNet` (8cce4a0).

There nodes are the utterances of a conversation. Here they are the frames of a sample (decision, `model.level`): there
is one speaker, so that all edges of the speaker graph are of one kind. Widths follow ours: 40 a direction for 200, a
graph of 40 for 100. The code's reconstruction loss masks the wrong nodes where conversations differ in length; here it
masks those that it is meant to.

Shape legend: S models (1), B samples, R_m rows and d_m features of modality m, R = R_L nodes, D = sum of d_m, d width,
O outputs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import nn
from typing_extensions import Self

from fastmmkd.blocks import MOST_LAYERS, Config, UnplacedModel
from fastmmkd.data.batches import Batch, Inputs, ResidentSplit, View, by_layer
from fastmmkd.errors import UserError
from fastmmkd.methods.baselines import BaselineLoss, mean_where, task_errors
from fastmmkd.methods.method import FeatureDims, Method, Network, PhaseSpec
from fastmmkd.methods.objective import Losses, weighted
from fastmmkd.nn.dropout import number_dropouts
from fastmmkd.nn.grouped import GroupedLinear
from fastmmkd.nn.neighbourhood import Band, NeighbourhoodConvolution, RelationalConvolution
from fastmmkd.nn.pooling import masked_adaptive_mean, masked_mean
from fastmmkd.nn.recurrent import Recurrence
from fastmmkd.ops.layout import Layout, take, unpack
from fastmmkd.ops.philox import DrawKeys
from fastmmkd.ops.precision import accumulation
from fastmmkd.tasks import Task

LANGUAGE = 0
"""The modality whose frames are the nodes."""


class GcnetModel(UnplacedModel):
    """GCNet's network. It has no positions, and no attention: what `attention_mask` masks are no nodes."""

    attention_mask: Literal["missing", "padding", "none"] = "padding"
    """padding (decision: the papers' tables give this system zeros, not a mask): every real frame is a node. missing: a
    frame that lacks all modalities is none."""
    dropout: float = Field(default=0.5, ge=0, lt=1)
    """Between the layers of the recurrent nets (as in the code)."""
    recurrent_layers: int = Field(default=2, gt=0, le=MOST_LAYERS)
    """Of both recurrent nets."""
    window: int = Field(default=2, gt=0, le=MOST_LAYERS)
    """How many nodes before and after a node are its neighbours."""
    level: Literal["frame", "context"] = "frame"
    """What nodes are. frame: frames of a sample, whose label is that of all (decision); unaligned streams are pooled to
    the frames of language. context: utterances, the last one's label being the sample's, as in the paper; then all
    modalities have one length, and the last node is read."""
    readout: Literal["last", "mean"] = "last"
    """What is predicted from (decision): the last node, or the mean of all."""
    temporal: bool = True
    """False: "w/o temporal graph", whose edges differ by past, now and future."""
    speaker: bool = True
    """False: "w/o speaker graph", whose edges differ by the two speakers; with one they are of one kind."""

    @model_validator(mode="after")
    def _something_to_read(self) -> Self:
        if not (self.temporal or self.speaker):
            raise ValueError("speaker: false, and so is temporal; expected at least one of the graphs")
        if self.level == "context" and self.readout != "last":
            raise ValueError('readout: "mean", but at level "context" the label is the last node\'s; expected "last"')
        return self


class GcnetLoss(BaselineLoss):
    """`L = L_task + lambda_rec L_rec`; 0 leaves it out ("w/o")."""

    lambda_rec: float = Field(default=1.0, ge=0)


class GcnetConfig(Config):
    """A generative method: there is no teacher."""

    method: Literal["gcnet"]
    model: GcnetModel = GcnetModel()
    teacher: None = None
    loss: GcnetLoss = GcnetLoss()

    @model_validator(mode="after")
    def _something_to_reconstruct(self) -> Self:
        if self.loss.lambda_rec and not self.missing.enabled:
            raise ValueError(
                f"loss.lambda_rec: {self.loss.lambda_rec:g}, but nothing is missing where missing.enabled is false; "
                "expected 0"
            )
        return self


class Nodes(NamedTuple):
    """A batch as a graph's nodes: the rows of language."""

    features: torch.Tensor
    """x, `[S, R, D]`, 0 where missing."""
    present: list[torch.Tensor]
    """Per modality `[S, R]` bool, whether a node has it."""
    first: torch.Tensor
    """`[S, R]` bool, who is a node to the first recurrent net."""
    later: torch.Tensor
    """And to all that follows."""
    layout: Layout


def nodes_of(inputs: Inputs) -> Nodes:
    """Decision: an unaligned stream's part of a node is the mean of the frames that are there in its bin, and missing
    where none is."""
    to, (first, later) = inputs.layouts[LANGUAGE], by_layer(inputs.masks)
    streams = zip(inputs.features, inputs.present, inputs.layouts, strict=True)
    features, present = zip(*(masked_adaptive_mean(*stream, to) for stream in streams), strict=True)
    of_first = present[0] | present[1] | present[2] if inputs.masks_missing else first[LANGUAGE]
    return Nodes(
        torch.cat(features, dim=-1), list(present), of_first, of_first if later is first else later[LANGUAGE], to
    )


class GraphNetwork(nn.Module):
    """`h^1 = RGCN(U)`, `h^2 = GraphConv(h^1)`, `Q = ReLU(W BiLSTM([U; h^2]))`; no activation between them.

    Args:
        d_in, d: of U, and of a node of the graph; Q has as many as both.
        relations: a band for each kind of edges.
        neighbours: the band of all of them.
    """

    def __init__(
        self,
        models: int,
        d_in: int,
        d: int,
        relations: tuple[Band, ...],
        neighbours: Band,
        layers: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.relational = RelationalConvolution(models, d_in, d, relations)
        self.neighbourhood = NeighbourhoodConvolution(models, d, neighbours)
        self.recurrence = Recurrence("lstm", d_in + d, d_in + d, layers, backwards=True, dropout=dropout)
        self.out = GroupedLinear((models,), 2 * (d_in + d), d_in + d)

    def forward(self, u: torch.Tensor, counts: torch.Tensor, layout: Layout, draw: DrawKeys | None) -> torch.Tensor:
        """`[S, R, d_in]` and who are nodes, `[S, R]` bool -> Q `[S, R, d_in + d]`."""
        h = self.neighbourhood(self.relational(u, counts, layout), counts, layout)
        states = self.recurrence(torch.cat((u, h), dim=-1), counts, layout, draw)
        return self.out(torch.cat(states.outputs, dim=-1), relu=True)


class GCNet(Network):
    """The network and its training loss."""

    def __init__(self, model: GcnetModel, loss: GcnetLoss, task: Task, feature_dims: tuple[int, ...]) -> None:
        super().__init__()
        self.weights, self.task, self.dims = loss, task, feature_dims
        self.level, self.readout = model.level, model.readout
        d, w, layers = model.width, model.window, model.recurrent_layers
        self.recurrence = Recurrence("lstm", sum(feature_dims), d, layers, backwards=True, dropout=model.dropout)
        kinds: list[tuple[Band, ...]] = []
        if model.temporal:
            kinds.append(((-w, -1), (0, 0), (1, w)))
        if model.speaker:
            kinds.append(((-w, w),))
        self.graphs = nn.ModuleList(
            GraphNetwork(1, 2 * d, d, relations, (-w, w), layers, model.dropout) for relations in kinds
        )
        self.head = GroupedLinear((1,), 3 * d, task.outputs)
        if loss.lambda_rec:
            self.reconstruction = GroupedLinear((1,), 3 * d, sum(feature_dims))
        number_dropouts(self)

    def prepare(self, split: ResidentSplit) -> None:
        """Refuse utterances that are not of one number in all modalities."""
        if self.level == "context" and not split.aligned:
            raise UserError(
                'model.level: "context", but a sample\'s modalities differ in length; expected "frame" for such data'
            )

    def represent(self, nodes: Nodes, draw: DrawKeys | None = None) -> torch.Tensor:
        """`U = BiLSTM(x)`, `Q = Q_temporal + Q_speaker`: `[S, R, 3 d]`."""
        states = self.recurrence(nodes.features, nodes.first, nodes.layout, draw)
        u = torch.cat(states.outputs, dim=-1)
        return torch.stack([graph(u, nodes.later, nodes.layout, draw) for graph in self.graphs]).sum(0)

    def losses(self, batch: Batch) -> Losses:
        """`L_task + lambda L_rec` as functions of `Q [S, R, 3 d]`."""
        nodes = nodes_of(batch.inputs)
        q = self.represent(nodes, batch.draw)
        logits = self.head(self._read(q, nodes))
        task = task_errors(self.task, logits, batch.targets, self.weights.task, own="MSE").mean(1)
        terms = (
            (
                "rec",
                self.weights.lambda_rec,
                lambda: self.reconstruction_error(q, nodes, nodes_of(batch.complete), batch.real[LANGUAGE]),
            ),
        )
        return Losses(*weighted(task, {"task": task}, terms), q)

    def reconstruction_error(self, q: torch.Tensor, nodes: Nodes, complete: Nodes, real: torch.Tensor) -> torch.Tensor:
        """`L_rec = sum_m sum |x^_m - x_m|^2 / d_m / number of real nodes` `[S]`, over the nodes whose modality m the
        version lacks and the complete sample has.

        Args:
            q: `[S, R, 3 d]`.
            real: `[S, R]` bool.
        """
        errors = (accumulation(self.reconstruction(q)) - accumulation(complete.features)).square().split(self.dims, -1)
        lacking = (there & ~kept for there, kept in zip(complete.present, nodes.present, strict=True))
        total = torch.stack([e.mean(-1) * of for e, of in zip(errors, lacking, strict=True)]).sum(0)
        return mean_where(total, real)

    def predict(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[S, B, O]` and what is read of Q, `[S, B, 3 d]`."""
        nodes = nodes_of(inputs)
        joint = self._read(self.represent(nodes), nodes)
        return self.head(joint), joint

    def _read(self, q: torch.Tensor, nodes: Nodes) -> torch.Tensor:
        """The mean of Q, or Q at the last row that is a node (the last of all where none is): `[S, B, 3 d]`."""
        counts, layout = nodes.later, nodes.layout
        if self.readout == "mean":
            return masked_mean(q, counts, layout)
        number = torch.arange(1, layout.longest + 1, device=q.device)
        last = (unpack(counts, layout) * number).amax(-1)
        return take(q, layout.starts[:, :-1] + torch.where(last > 0, last, layout.lengths) - 1)


def network(config: Config, feature_dims: FeatureDims) -> GCNet:
    """The network of a config."""
    assert isinstance(config, GcnetConfig)
    return GCNet(config.model, config.loss, config.task, feature_dims)


METHOD = Method(
    name="gcnet",
    title="GCNet",
    published="2023-07",
    compared=True,
    config=GcnetConfig,
    network=network,
    phases=(PhaseSpec("network", lambda config, dims, _: network(config, dims), (View.MISSING, View.COMPLETE)),),
    ablations={
        "GCNet": [],
        "w/o temporal graph": ["model.temporal=false"],
        "w/o speaker graph": ["model.speaker=false"],
        "w/o L_rec": ["loss.lambda_rec=0.0"],
        "mean of all nodes": ["model.readout=mean"],
        "masked": ["model.attention_mask=missing"],
    },
    grouped=False,
)
