"""CubeMLP: an MLP that mixes along time, modality and channel in turn (Sun et al., ACM MM 2022).

Language goes through a linear layer, audio and visual each through a bidirectional GRU of two layers. The three streams
make a cube `[T, 3, d]`; two blocks mix it along each of its axes, and shrink it.

What is computed is that of the public code, `kiva12138/CubeMLP` at 49f75bd, with the settings of its README. Decisions:
the common width; blocks of (20, 3, d) and (10, 3, d / 2); frames lie at the end of the time axis, so that a sentence's
last word has one place, and padding before them is 0 after the encoders and mixed in like anything else; unaligned
streams are first pooled to language's frames. A mixer of the time axis has a fixed T, `model.frames`: what a sample is
predicted as does not depend on the batch's padding, because every sample is padded to T, but a longer one is refused.

Shape legend: S models (one), B samples, R_m rows of modality m, T frames of the cube, d width, O outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Literal

import torch
from pydantic import Field
from torch import nn

from fastmmkd.blocks import LARGEST_WIDTH, Config, MaskedOnceModel
from fastmmkd.data.batches import Batch, Inputs, Kept, View, by_layer
from fastmmkd.data.dataset import Split
from fastmmkd.errors import UserError
from fastmmkd.methods.baselines import BaselineLoss, task_errors
from fastmmkd.methods.method import FeatureDims, Method, Network, PhaseSpec
from fastmmkd.methods.objective import Losses
from fastmmkd.nn.dropout import Dropout, number_dropouts, of_samples
from fastmmkd.nn.grouped import GroupedLinear, uniform_parameter
from fastmmkd.nn.pooling import masked_adaptive_mean
from fastmmkd.nn.recurrent import Recurrence
from fastmmkd.ops import grouped_linear
from fastmmkd.ops.layout import Layout, Places, move
from fastmmkd.ops.philox import DrawKeys
from fastmmkd.tasks import Task

EPSILON = 1e-6
"""Of the layer norms."""
Axis = Literal["time", "modality", "channel"]
AXES: dict[Axis, int] = {"time": 2, "modality": 3, "channel": 4}
"""Where they are in a batch of cubes `[S, B, T, 3, d]`, in the order in which a block mixes them."""


class CubemlpModel(MaskedOnceModel):
    """CubeMLP's network."""

    width: int = Field(default=40, gt=1, le=LARGEST_WIDTH)
    frames: int = Field(default=50, gt=0, le=LARGEST_WIDTH)
    """T, frames of the cube; no sample may have more."""
    mixed_frames: tuple[int, int] = (20, 10)
    """T after the first block and after the second."""
    time: bool = True
    """False: "w/o time", no MLP along this axis; a linear layer still changes its length."""
    modality: bool = True
    channel: bool = True
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """After the encoders of audio and visual, and on what each MLP adds."""


class CubemlpConfig(Config):
    """One phase, on complete samples where `missing.enabled` is false."""

    method: Literal["cubemlp"]
    model: CubemlpModel = CubemlpModel()
    teacher: None = None
    loss: BaselineLoss = BaselineLoss()


class Mixing(nn.Module):
    """`X <- P X + drop(W_2 GELU(W_1 LN(X) + b_1) + b_2)` along an axis; P is a linear layer without bias.

    Args:
        axis: which.
        size, mixed: how long it is before and after; the MLP's hidden layer is as long as it is after.
        has_mlp: False: there is P alone, where the length changes.
    """

    def __init__(self, axis: Axis, size: int, mixed: int, has_mlp: bool, dropout: float) -> None:
        super().__init__()
        self.axis, self.has_mlp, self.is_there = AXES[axis], has_mlp, has_mlp or size != mixed
        if self.is_there:
            self.projection = uniform_parameter((1, size, mixed), size**-0.5)
        if has_mlp:
            self.weight, self.bias = nn.Parameter(torch.ones(1, size)), nn.Parameter(torch.zeros(1, size))
            self.expand, self.contract = GroupedLinear((1,), size, mixed), GroupedLinear((1,), mixed, mixed)
            self.dropout = Dropout(dropout)

    def forward(self, cube: torch.Tensor, one: Layout, draw: DrawKeys | None) -> torch.Tensor:
        """`[S, B, T, 3, d]` -> the same with another length of the axis; `one`: a layout of a row per sample."""
        if not self.is_there:
            return cube
        x = cube.movedim(self.axis, -1)
        mixed = grouped_linear(x, self.projection).movedim(-1, self.axis)
        if not self.has_mlp:
            return mixed
        normed = nn.functional.layer_norm(x, x.shape[-1:], self.weight[0], self.bias[0], EPSILON)
        added = self.contract(nn.functional.gelu(self.expand(normed))).movedim(-1, self.axis)
        return mixed + self.dropout(added.flatten(2), one, draw).view(added.shape)


class CubeMLP(Network):
    """Encoders, blocks and a linear head."""

    def __init__(self, model: CubemlpModel, loss: BaselineLoss, task: Task, feature_dims: FeatureDims) -> None:
        super().__init__()
        self.task, self.reading, self.frames = task, loss.task, model.frames
        d, (d_l, *others) = model.width, feature_dims
        self.language = uniform_parameter((1, d_l, d), d_l**-0.5)
        self.recurrences = nn.ModuleList(Recurrence("gru", d_m, d, layers=2, backwards=True) for d_m in others)
        for name, parameter in self.recurrences.named_parameters():
            if "weight_hh" in name:
                nn.init.orthogonal_(parameter)
        self.norm_weight, self.norm_bias = nn.Parameter(torch.ones(1, 2, d)), nn.Parameter(torch.zeros(1, 2, d))
        self.dropout = Dropout(model.dropout)
        first, last = model.mixed_frames
        shapes = [(model.frames, 3, d), (first, 3, d), (last, 3, d // 2)]
        self.mixings = nn.ModuleList(
            Mixing(axis, before[i], after[i], getattr(model, axis), model.dropout)
            for before, after in pairwise(shapes)
            for i, axis in enumerate(AXES)
        )
        self.head = GroupedLinear((1,), 3 * (d // 2), task.outputs)
        number_dropouts(self)

    def losses(self, batch: Batch) -> Losses:
        """The task loss as a function of the streams' means `[S, B, 3 d / 2]`."""
        joint = self._mixed(self.encode(batch.inputs, batch.draw), batch.inputs.layouts[0], batch.draw)
        task = task_errors(self.task, self.head(joint), batch.targets, self.reading, "L1").mean(1)
        return Losses(task, {"task": task}, joint)

    def encode(self, inputs: Inputs, draw: DrawKeys | None = None) -> list[torch.Tensor]:
        """Per modality `[S, R_L, d]`, 0 in frames that do not count."""
        first, later = by_layer(inputs.masks)
        streams = [grouped_linear(inputs.features[0], self.language)]
        for i, recurrence in enumerate(self.recurrences):
            states = recurrence(inputs.features[i + 1], first[i + 1], inputs.layouts[i + 1])
            forwards, backwards = states.outputs
            weight, bias = self.norm_weight[0, i], self.norm_bias[0, i]
            z = nn.functional.layer_norm(forwards + backwards, weight.shape, weight, bias, EPSILON).relu()
            streams.append(self.dropout(z, inputs.layouts[i + 1], draw, i))
        counted = [z * mask.unsqueeze(-1) for z, mask in zip(streams, later, strict=True)]
        of_modalities = zip(counted, later, inputs.layouts, strict=True)
        return [masked_adaptive_mean(*of, inputs.layouts[0])[0] for of in of_modalities]

    def _mixed(self, streams: list[torch.Tensor], layout: Layout, draw: DrawKeys | None = None) -> torch.Tensor:
        """From streams `[S, R_L, d]` to `[S, B, 3 d / 2]`."""
        refuse_longer(self.frames, layout.longest)
        cube = at_the_end(torch.stack(streams, dim=2), layout, self.frames)
        one = of_samples(layout)
        for mixing in self.mixings:
            cube = mixing(cube, one, draw)
        return cube.mean(2).flatten(2)

    def predict(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits `[S, B, O]` and joint representations `[S, B, 3 d / 2]`."""
        joint = self._mixed(self.encode(inputs), inputs.layouts[0])
        return self.head(joint), joint

    def predict_subsets(self, inputs: Inputs, subsets: Sequence[Kept]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Modalities meet after their encoders: these run once with all there is, and once with nothing."""
        whole, nothing = (self.encode(of) for of in (inputs, inputs.only((False, False, False))))
        predictions = []
        for kept in subsets:
            streams = [z if k else without for z, without, k in zip(whole, nothing, kept, strict=True)]
            joint = self._mixed(streams, inputs.layouts[0])
            predictions.append((self.head(joint), joint))
        return predictions


def at_the_end(x: torch.Tensor, layout: Layout, frames: int) -> torch.Tensor:
    """Rows as a batch padded to so many frames, the sample's own last: `[S, R, ...]` -> `[S, B, frames, ...]`."""
    device, ends = x.device, layout.starts[:, 1:]
    source = ends.unsqueeze(-1) - frames + torch.arange(frames, device=device)  # [S, B, frames]
    is_row = source >= layout.starts[:, :-1, None]
    whose = layout.sample.clamp_max(layout.batch - 1)
    before_end = ends.gather(1, whose) - torch.arange(layout.rows, device=device)
    back = (whose + 1) * frames - before_end
    places = Places(source.clamp_min(0).flatten(1), is_row.flatten(1), back * layout.is_somebodys, layout.is_somebodys)
    return move(x, places).unflatten(1, (layout.batch, frames))


def refuse_longer(frames: int, longest: int) -> None:
    """Refuse samples that are longer than the time axis."""
    if longest > frames:
        raise UserError(
            f"model.frames: {frames}, but there are samples of {longest} frames; expected at most {frames}, what the "
            "time axis of this network has"
        )


def check(config: Config, splits: Mapping[str, Split]) -> None:
    """Refuse splits with longer samples, by their language, whose frames are the time axis."""
    assert isinstance(config, CubemlpConfig)
    refuse_longer(config.model.frames, max(int(split.lengths[:, 0].max(initial=0)) for split in splits.values()))


def network(config: Config, feature_dims: FeatureDims) -> CubeMLP:
    """The network of a config."""
    assert isinstance(config, CubemlpConfig)
    return CubeMLP(config.model, config.loss, config.task, feature_dims)


METHOD = Method(
    name="cubemlp",
    title="CubeMLP",
    published="2022-10",
    compared=True,
    config=CubemlpConfig,
    network=network,
    phases=(PhaseSpec("network", lambda config, dims, _: network(config, dims), (View.MISSING,)),),
    ablations={
        "CubeMLP": [],
        "w/o time": ["model.time=false"],
        "w/o modality": ["model.modality=false"],
        "w/o channel": ["model.channel=false"],
        "+ missing training": ["missing.enabled=true"],
        "masked": ["model.attention_mask=missing"],
    },
    grouped=False,
    check=check,
)
