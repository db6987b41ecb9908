"""TransM: fusion by translation there and back (Wang et al., TransModality, WWW 2020; arXiv 2009.02902).

Language is translated into audio and into visual, and each translation back into language; what the encoders of these
translations make of a sample is what is predicted from. It trains on missing versions, and translates into what the
complete sample has. Read beside the paper: the public code of `hyeonJeongByeon/TransModality` (d4384fa), a mirror.

There utterances of a video are translated. Here it is frames (decision), and so a temporal embedding stands in for the
recurrent nets, 2 encoder and 1 decoder layers for 10 and 5, and neither attention nor translations have a ReLU.

Shape legend: S models, B samples, R_m rows and d_m features of modality m, d width, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn

from fastmmkd.blocks import MOST_LAYERS, AttentionModel, Config
from fastmmkd.data.batches import Batch, Inputs, View, by_layer
from fastmmkd.methods.baselines import BaselineLoss, mean_where, task_errors
from fastmmkd.methods.method import FeatureDims, Method, Network, PhaseSpec
from fastmmkd.methods.objective import Losses, weighted
from fastmmkd.nn.decoder import TransformerDecoder
from fastmmkd.nn.dropout import number_dropouts
from fastmmkd.nn.embedding import TemporalEmbedding, position_codes
from fastmmkd.nn.encoder import TransformerEncoder
from fastmmkd.nn.grouped import WHOLE, GroupedLinear, Part, join_groups
from fastmmkd.nn.pooling import masked_mean
from fastmmkd.ops.layout import Layout, take
from fastmmkd.ops.philox import DrawKeys
from fastmmkd.ops.precision import accumulation
from fastmmkd.tasks import Task

LANGUAGE, OTHERS = 0, (1, 2)
"""The modality that is translated, and those that it is translated into: a cell for each."""


class TransmModel(AttentionModel):
    """TransM's network."""

    attention_mask: Literal["missing", "padding", "none"] = "padding"
    """As for every method; missing frames are attended to as the zeros they are (decision: the papers' tables give this
    system zeros, not a mask)."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """The code has 0.5, at another depth (decision)."""
    encoder_layers: int = Field(default=2, gt=0, le=MOST_LAYERS)
    """Of each encoder; the code has 10 (decision)."""
    decoder_layers: int = Field(default=1, gt=0, le=MOST_LAYERS)
    """Of each decoder; the code has 5 (decision)."""
    readout: Literal["mean", "last"] = "mean"
    """What is classified of each stream. mean (decision): the mean over frames, whose label is that of all. last: the
    last frame, for data whose frames are utterances and whose label is the last one's; the code classifies each
    utterance by itself."""
    backward: bool = True
    """False: "w/o backward translation", nothing is translated back, and there is no second encoding."""
    query: Literal["input", "position"] = "input"
    """What decoders start from. input: the target as the sample has it, so that a missing frame is imagined from its
    position and a frame that is there can be copied (as in the code). position: positions alone, the target is hidden.
    """


class TransmLoss(BaselineLoss):
    """`L = L_task + lambda_translation L_translation`; 0 leaves the translations untrained for what they say."""

    lambda_translation: float = Field(default=1.0, ge=0)
    """Of each translation. The code has 10, for utterance features of another scale (decision)."""


class TransmConfig(Config):
    """Joint learning: there is no teacher."""

    method: Literal["transm"]
    model: TransmModel = TransmModel()
    teacher: None = None
    loss: TransmLoss = TransmLoss()


class Cell(NamedTuple):
    """Translation of language into another modality and back."""

    encoded: torch.Tensor
    """`e_1 [S, R_L, d]`."""
    translated: torch.Tensor | None
    """`u_1 [S, R_m, d]`; None where nobody asks for it."""
    encoded_again: torch.Tensor | None
    """`e_2 [S, R_m, d]`; None without the way back."""
    back: torch.Tensor | None
    """`u_2 [S, R_L, d]`; None without the way back, or where nobody asks for it."""


class TransM(Network):
    """The network and its training loss."""

    def __init__(
        self, model: TransmModel, loss: TransmLoss, task: Task, feature_dims: tuple[int, ...], models: int = 1
    ) -> None:
        super().__init__()
        self.weights = loss
        self.task = task
        self.has_backward, self.query, self.readout = model.backward, model.query, model.readout
        d, groups = model.width, (models, len(OTHERS))
        encoder, decoder = (model.heads, model.encoder_layers, model.dropout), (model.heads, model.decoder_layers)
        self.embedding = TemporalEmbedding(models, feature_dims, d, model.dropout, model.positions)
        self.encoder = TransformerEncoder(groups, d, *encoder)
        if model.backward or loss.lambda_translation:
            self.decoder = TransformerDecoder(groups, d, *decoder, model.dropout)
        if model.backward:
            self.back_encoder = TransformerEncoder(groups, d, *encoder)
        if loss.lambda_translation:
            self.readouts = nn.ModuleList(GroupedLinear((models,), d, feature_dims[m]) for m in OTHERS)
        if model.backward and loss.lambda_translation:
            self.back_decoder = TransformerDecoder(groups, d, *decoder, model.dropout)
            self.back_readouts = nn.ModuleList(GroupedLinear((models,), d, feature_dims[LANGUAGE]) for _ in OTHERS)
        streams = len(feature_dims) + len(OTHERS) * (2 if model.backward else 1)
        self.head = GroupedLinear((models,), streams * d, task.outputs)
        number_dropouts(self)

    def losses(self, batch: Batch) -> Losses:
        """`L_task + lambda L_translation` as functions of the embedding of language, `[S, R_L, d]`.

        Decision: of scores the squared error, as the code knows classes alone.
        """
        inputs = batch.inputs
        streams = self.embedding(inputs.features, inputs.layouts, batch.draw)
        cells = self._cells(streams, inputs, batch.draw, translations=bool(self.weights.lambda_translation))
        logits = self.head(self._joined(streams, cells, inputs))
        task = task_errors(self.task, logits, batch.targets, self.weights.task, own="MSE").mean(1)
        terms = (("translation", self.weights.lambda_translation, lambda: self.translation(cells, batch.complete)),)
        return Losses(*weighted(task, {"task": task}, terms), streams[LANGUAGE])

    def translation(self, cells: list[Cell], complete: Inputs) -> torch.Tensor:
        """`L_translation [S]`, the sum over the four translations of `mean |V^ - V|`.

        Decision: a mean over features, and over the frames that the complete samples have content of: what would be
        right elsewhere, nobody knows.
        """
        pairs = []
        for i, (m, cell) in enumerate(zip(OTHERS, cells, strict=True)):
            pairs.append((m, self.readouts[i](cell.translated)))
            if cell.back is not None:
                pairs.append((LANGUAGE, self.back_readouts[i](cell.back)))
        errors = []
        for target, translation in pairs:
            error = (accumulation(translation) - accumulation(complete.features[target])).abs().mean(-1)
            errors.append(mean_where(error, complete.present[target]))
        return torch.stack(errors).sum(0)

    def predict(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[S, B, O]` and what is read of the streams, `[S, B, 7 d]` (5 d without the way back)."""
        streams = self.embedding(inputs.features, inputs.layouts)
        joint = self._joined(streams, self._cells(streams, inputs), inputs)
        return self.head(joint), joint

    def _cells(
        self, streams: list[torch.Tensor], inputs: Inputs, draw: DrawKeys | None = None, translations: bool = False
    ) -> list[Cell]:
        """Those of `OTHERS`: at once where the streams share a layout.

        Args:
            translations: whether they are wanted where nothing is predicted from them.
        """
        if inputs.aligned:
            return self._cells_of(OTHERS, WHOLE, streams, inputs, draw, translations)
        made = []
        for i, m in enumerate(OTHERS):
            at = (slice(None), slice(i, i + 1))
            made += self._cells_of((m,), at, streams, inputs, draw, translations)
        return made

    def _cells_of(
        self,
        others: Sequence[int],
        at: Part,
        streams: list[torch.Tensor],
        inputs: Inputs,
        draw: DrawKeys | None,
        translations: bool,
    ) -> list[Cell]:
        """`e_1 = Enc_1(L)`, `u_1 = Dec_1(V; e_1)`, `e_2 = Enc_2(u_1)`, `u_2 = Dec_2(L; e_2)` of modalities V that share
        a layout.

        Decision: what is masked of a stream is masked where it is encoded, decoded from, or remembered; a translation
        has content in every real frame.
        """
        (first, later), n = by_layer(inputs.masks), len(others)
        own, other = inputs.layouts[LANGUAGE], inputs.layouts[others[0]]

        def queries(modalities: Sequence[int], layout: Layout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            """What is decoded from, and its masks in the first layer and in later ones."""
            of_modalities = [streams[m] for m in modalities]
            if self.query == "position":
                codes = position_codes(layout, self.embedding.positions, streams[0].shape[-1], streams[0].dtype)
                return join_groups([codes.expand_as(x) for x in of_modalities]), layout.is_frame, layout.is_frame
            of_first, of_later = (join_groups([mask[m] for m in modalities]) for mask in (first, later))
            return join_groups(of_modalities), of_first, of_later

        encoded = self.encoder(join_groups([streams[LANGUAGE]] * n), first[0], later[0], own, at, draw)
        translated = again = back = None
        if self.has_backward or translations:
            translated = self.decoder(*queries(others, other), other, encoded, later[0], own, at, draw)
        if self.has_backward:
            frames = other.is_frame
            again = self.back_encoder(translated, frames, frames, other, at, draw)
            if translations:
                back = self.back_decoder(*queries([LANGUAGE] * n, own), own, again, frames, other, at, draw)
        made = (
            [None] * n if x is None else x.unflatten(0, (-1, n)).unbind(1) for x in (encoded, translated, again, back)
        )
        return [Cell(*of_cell) for of_cell in zip(*made, strict=True)]

    def _joined(self, streams: list[torch.Tensor], cells: list[Cell], inputs: Inputs) -> torch.Tensor:
        """What is read of `e_1` and `e_2` of each cell, and of L, A and V: `[S, B, 7 d]`.

        Decision: a stream's mean is over what later layers may attend to, a translation's over all real frames.
        """
        (_, masks), layouts = by_layer(inputs.masks), inputs.layouts
        parts = []
        for m, cell in zip(OTHERS, cells, strict=True):
            parts.append((cell.encoded, masks[LANGUAGE], layouts[LANGUAGE]))
            if cell.encoded_again is not None:
                parts.append((cell.encoded_again, layouts[m].is_frame, layouts[m]))
        parts += zip(streams, masks, layouts, strict=True)
        last = self.readout == "last"
        return torch.cat([take(x, of.last) if last else masked_mean(x, mask, of) for x, mask, of in parts], dim=-1)


def network(config: Config, feature_dims: FeatureDims) -> TransM:
    """The network of a config."""
    assert isinstance(config, TransmConfig)
    return TransM(config.model, config.loss, config.task, feature_dims)


METHOD = Method(
    name="transm",
    title="TransM",
    published="2020-04",
    compared=True,
    config=TransmConfig,
    network=network,
    phases=(PhaseSpec("network", lambda config, dims, _: network(config, dims), (View.MISSING, View.COMPLETE)),),
    ablations={
        "TransM": [],
        "w/o backward translation": ["model.backward=false"],
        "queries of positions": ["model.query=position"],
        "w/o translation losses": ["loss.lambda_translation=0.0"],
        "masked": ["model.attention_mask=missing"],
    },
)
