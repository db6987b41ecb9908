"""MCTN: joint representations by cyclic translation between modalities (Pham et al., AAAI 2019).

A chain encodes its source modality, translates it into a second one and back by the same weights, and what it has
encoded once more into the third. The last encoding predicts the label, so that a chain needs its source alone.

What is computed is that of the public code, `hainow/MCTN` at 5c03e35. Decisions: three chains, one per source (L to A
to V, A to L to V, V to L to A), share nothing and are trained together; the prediction is the mean over those whose
source the sample has, over all three where it has none, and a sample without a chain's source is left out of the
chain's losses. Adapters and readouts of each modality's own width stand around recurrent cores of the common width, in
place of zeros up to one width. Targets are the standardised frames that are there, pooled to the source's frames where
streams are unaligned, and their errors are means over features. The decoder has input and forget gates of their own,
ordinary sigmoids and a linear readout; `model.literal_decoder` has the code's: one gate for both, hard sigmoids, and
tanh.

The decoder's attention scores are `w [H_t; c]`, with its own last cell state c. That part is the same for all t and
falls out of the softmax, so that every step attends alike: the context is computed once, and a decoder is an LSTM whose
input is constant.

Shape legend: S models (one), B samples, R rows of a chain's source, d width, O outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import nn

from fastmmkd.blocks import Config, MaskedOnceModel
from fastmmkd.data.batches import Batch, Inputs, Kept, View, by_layer
from fastmmkd.methods.baselines import BaselineLoss, mean_where, of_rows, task_errors
from fastmmkd.methods.method import FeatureDims, Method, Network, PhaseSpec
from fastmmkd.methods.objective import Losses, Parts, weighted
from fastmmkd.nn.dropout import Dropout, number_dropouts
from fastmmkd.nn.grouped import GroupedLinear, uniform_parameter
from fastmmkd.nn.pooling import attentive_mean, masked_adaptive_mean
from fastmmkd.nn.recurrent import Recurrence
from fastmmkd.ops import grouped_linear
from fastmmkd.ops.layout import Layout, pack
from fastmmkd.ops.philox import DrawKeys
from fastmmkd.ops.precision import accumulation
from fastmmkd.tasks import Task

CHAINS = ((0, 1, 2), (1, 0, 2), (2, 0, 1))
"""Source, first and second target of each chain: indices of language, audio, visual."""


class MctnModel(MaskedOnceModel):
    """MCTN's network; `dropout` is on what the input adapters make."""

    readout: Literal["attention", "last"] = "attention"
    """What the head reads. attention: `sum_t alpha_t R_t`, as in the code, whose sequences are the words of what is
    labelled. last: R at the last frame that counts, for data whose frames are utterances and whose label is the last
    one's; of twenty frames tanh lets it have 28 % of the weight at most (decision)."""
    second_level: bool = True
    """False: "w/o second level", the first encoding predicts, and the third modality is not translated into."""
    literal_decoder: bool = False
    """True: decoders as the public code computes them."""


class MctnLoss(BaselineLoss):
    """`L = L_task + lambda_forward L_forward + lambda_cycle L_cycle + lambda_second L_second + lambda_ridge |w|^2`,
    summed over chains; 0 leaves a loss out."""

    lambda_forward: float = Field(default=0.1, ge=0)
    """Of the source's translation into the first target."""
    lambda_cycle: float = Field(default=0.1, ge=0)
    """Of that translation's, back into the source."""
    lambda_second: float = Field(default=0.1, ge=0)
    """Of the encoding's, into the second target."""
    lambda_ridge: float = Field(default=0.01, ge=0)
    """Of the squares of the head's weights."""


class MctnConfig(Config):
    """One phase, on complete samples where `missing.enabled` is false."""

    method: Literal["mctn"]
    model: MctnModel = MctnModel()
    teacher: None = None
    loss: MctnLoss = MctnLoss()


class Decoder(nn.Module):
    """An LSTM that attends to the source's frames, and reads a frame out after each step."""

    def __init__(self, d: int, d_out: tuple[int, ...], literal: bool) -> None:
        super().__init__()
        self.score = uniform_parameter((1, d, 1), d**-0.5)
        self.core = LiteralLSTM(d) if literal else Recurrence("lstm", d, d)
        self.readouts = nn.ModuleList(GroupedLinear((1,), d, of_modality) for of_modality in d_out)
        self.literal = literal

    def forward(
        self, encoded: torch.Tensor, mask: torch.Tensor, real: torch.Tensor, layout: Layout, into: int = 0
    ) -> torch.Tensor:
        """`[S, R, d]` -> `[S, R, d_out]`.

        Args:
            mask: `[S, R]` bool, frames that are attended to.
            real: `[S, R]` bool, frames that are read out.
            into: which of the readouts.
        """
        context = attentive_mean(encoded, grouped_linear(encoded, self.score), mask, layout)
        if self.literal:
            translated: torch.Tensor = self.readouts[into](self.core(context, real, layout))
            return translated.tanh()
        constant = pack(context.unsqueeze(2).expand(-1, -1, layout.longest, -1), layout)
        translated = self.readouts[into](self.core(constant, real, layout).outputs[0])
        return translated


class LiteralLSTM(nn.Module):
    """The public code's cell: the input gate's slice serves as the forget gate too, and sigmoids are hard."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.input, self.recurrent = GroupedLinear((1,), d, 3 * d), uniform_parameter((1, d, 3 * d), d**-0.5)

    def forward(self, context: torch.Tensor, real: torch.Tensor, layout: Layout) -> torch.Tensor:
        """`[S, B, d]`, the input of every step, and `[S, R]` bool -> states of the real frames `[S, R, d]`."""
        of_input = self.input(context)
        h = c = torch.zeros_like(context)
        states = []
        for _ in range(layout.longest):
            gate, candidate, out = (of_input + grouped_linear(h, self.recurrent)).chunk(3, dim=-1)
            gate, out = ((0.2 * x + 0.5).clamp(0, 1) for x in (gate, out))
            c = gate * c + gate * candidate.tanh()
            h = out * c.tanh()
            states.append(h)
        of_step = torch.stack(states, dim=2).flatten(1, 2)  # [S, B * T, d]
        step = layout.sample.clamp_max(layout.batch - 1) * layout.longest + layout.position
        return of_step.gather(1, step.unsqueeze(-1).expand(-1, -1, h.shape[-1])) * real.unsqueeze(-1)


class Made(NamedTuple):
    """What a chain makes of its source."""

    encoded: torch.Tensor
    """H `[S, R, d]`, both directions summed."""
    second: torch.Tensor
    """Z `[S, R, d]`; H without a second level."""
    vector: torch.Tensor
    """`sum_t alpha_t R_t`, or the last R, `[S, B, d]`: what the head reads."""


class Chain(nn.Module):
    """Translations from one source, and the prediction from it."""

    def __init__(
        self, of: tuple[int, int, int], model: MctnModel, loss: MctnLoss, task: Task, feature_dims: FeatureDims
    ) -> None:
        super().__init__()
        self.source, self.target, self.last = of
        self.task, self.weights, self.has_second_level = task, loss, model.second_level
        self.readout = model.readout
        d, literal = model.width, model.literal_decoder
        d_source, d_target, d_last = (feature_dims[m] for m in of)
        self.adapter, self.dropout = GroupedLinear((1,), d_source, d), Dropout(model.dropout)
        self.encoder = Recurrence("lstm", d, d, backwards=True)
        if loss.lambda_forward or loss.lambda_cycle:
            self.decoder = Decoder(d, (d_target, d_source) if loss.lambda_cycle else (d_target,), literal)
        if loss.lambda_cycle:
            self.adapter_back = GroupedLinear((1,), d_target, d)
        if model.second_level:
            self.second_encoder = Recurrence("lstm", d, d, backwards=True)
            if loss.lambda_second:
                self.second_decoder = Decoder(d, (d_last,), literal)
        self.regressor = Recurrence("lstm", d, d)
        if model.readout == "attention":
            self.attention = GroupedLinear((1,), d, 1)
        self.head = GroupedLinear((1,), d, task.outputs)

    def forward(self, inputs: Inputs, draw: DrawKeys | None = None) -> Made:
        """`H = E_1(X)`, `Z = E_2(H)`, `R = LSTM(Z)`, `alpha = softmax_t tanh(v R_t)`, or 1 at the last frame."""
        layout, mask = inputs.layouts[self.source], by_layer(inputs.masks)[0][self.source]
        adapted = self.dropout(self.adapter(inputs.features[self.source]), layout, draw)
        encoded = _both(self.encoder, adapted, mask, layout)
        second = _both(self.second_encoder, encoded, mask, layout) if self.has_second_level else encoded
        read = self.regressor(second, mask, layout)
        (states,), (vector,) = read.outputs, read.last
        if self.readout == "attention":
            vector = attentive_mean(states, self.attention(states).tanh(), mask, layout)
        return Made(encoded, second, vector)

    def losses(self, made: Made, vector: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, Parts]:
        """The weighted sum of the chain's losses `[S]`, and its parts, over the samples that have the source."""
        inputs = batch.inputs
        layout, real = inputs.layouts[self.source], batch.real[self.source]
        mask, available = by_layer(inputs.masks)[0][self.source], inputs.available[self.source]
        has_source = of_rows(available, layout)
        present = inputs.present

        def error(translated: torch.Tensor, modality: int) -> torch.Tensor:
            of = inputs.features[modality], present[modality], inputs.layouts[modality]
            frames, is_there = masked_adaptive_mean(*of, layout)
            squares = (accumulation(translated) - accumulation(frames)).square().mean(-1)
            return mean_where(squares, is_there & has_source)

        errors = task_errors(self.task, self.head(vector), batch.targets, self.weights.task, "L1")
        task = mean_where(errors, available)
        weights, translated = self.weights, torch.empty(0)
        if weights.lambda_forward or weights.lambda_cycle:
            translated = self.decoder(made.encoded, mask, real, layout)

        def back() -> torch.Tensor:
            again = _both(self.encoder, self.adapter_back(translated), mask, layout)
            return error(self.decoder(again, mask, real, layout, into=1), self.source)

        terms = (
            ("forward", weights.lambda_forward, lambda: error(translated, self.target)),
            ("cycle", weights.lambda_cycle, back),
            (
                "second",
                weights.lambda_second * self.has_second_level,
                lambda: error(self.second_decoder(made.second, mask, real, layout), self.last),
            ),
            ("ridge", weights.lambda_ridge, lambda: accumulation(self.head.weight).square().sum((1, 2))),
        )
        return weighted(task, {"task": task}, terms)


def _both(net: nn.Module, x: torch.Tensor, mask: torch.Tensor, layout: Layout) -> torch.Tensor:
    """Both directions of a recurrence, summed: `[S, R, d]` -> `[S, R, d]`."""
    forwards, backwards = net(x, mask, layout).outputs
    return forwards + backwards  # type: ignore[no-any-return]


class MCTN(Network):
    """Three chains."""

    def __init__(self, model: MctnModel, loss: MctnLoss, task: Task, feature_dims: FeatureDims) -> None:
        super().__init__()
        chains = nn.ModuleList(Chain(of, model, loss, task, feature_dims) for of in CHAINS)
        self.chains: Sequence[Chain] = chains  # type: ignore[assignment]
        number_dropouts(self)

    def losses(self, batch: Batch) -> Losses:
        """The chains' losses, summed, as functions of the vectors that they predict from, `[S, 3, B, d]`."""
        made = [chain(batch.inputs, batch.draw) for chain in self.chains]
        joint = torch.stack([of_chain.vector for of_chain in made], dim=1)
        of_chains = zip(self.chains, made, joint.unbind(1), strict=True)
        totals, parts = zip(*(chain.losses(of, vector, batch) for chain, of, vector in of_chains), strict=True)
        summed = {name: torch.stack([of_chain[name] for of_chain in parts]).sum(0) for name in parts[0]}
        return Losses(torch.stack(totals).sum(0), summed, joint)

    def predict(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[S, B, O]` and the chains' vectors side by side `[S, B, 3 d]`, 0 of those that are not used."""
        return self._mean([chain(inputs).vector for chain in self.chains], inputs.available)

    def predict_subsets(self, inputs: Inputs, subsets: Sequence[Kept]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Chains meet in their mean: each runs once with its source, and once without."""
        nothing = inputs.only((False, False, False))
        with_source, without = ([chain(of).vector for chain in self.chains] for of in (inputs, nothing))
        available, predictions = inputs.available, []
        for kept in subsets:
            vectors = [v if k else absent for v, absent, k in zip(with_source, without, kept, strict=True)]
            predictions.append(self._mean(vectors, [has & k for has, k in zip(available, kept, strict=True)]))
        return predictions

    def _mean(self, vectors: list[torch.Tensor], available: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Over the chains whose source a sample has, over all where it has none."""
        has = torch.stack(available, dim=2)  # [S, B, 3]
        used = (has | ~has.any(2, keepdim=True)).unsqueeze(-1)
        logits = torch.stack([chain.head(v) for chain, v in zip(self.chains, vectors, strict=True)], dim=2)
        return (logits * used).sum(2) / used.sum(2), (torch.stack(vectors, dim=2) * used).flatten(2)


def network(config: Config, feature_dims: FeatureDims) -> MCTN:
    """The network of a config."""
    assert isinstance(config, MctnConfig)
    return MCTN(config.model, config.loss, config.task, feature_dims)


METHOD = Method(
    name="mctn",
    title="MCTN",
    published="2019-01",
    compared=True,
    config=MctnConfig,
    network=network,
    phases=(PhaseSpec("network", lambda config, dims, _: network(config, dims), (View.MISSING,)),),
    ablations={
        "MCTN": [],
        "w/o cycle": ["loss.lambda_cycle=0.0"],
        "w/o second level": ["model.second_level=false"],
        "literal decoder": ["model.literal_decoder=true"],
        "last frame": ["model.readout=last"],
        "+ missing training": ["missing.enabled=true"],
        "masked": ["model.attention_mask=missing"],
    },
    grouped=False,
)
