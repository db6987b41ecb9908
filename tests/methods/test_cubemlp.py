"""CubeMLP against its literal twin, where its frames lie, and the fixed length of its time axis."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from whole_batches import (
    BATCH,
    Sample,
    assert_same_gradients,
    config_of,
    drawn,
    linear,
    literal_error,
    objective_of,
    samples,
    split_of,
    targets_of,
)

from fastmmkd.engine.step import Objective
from fastmmkd.errors import UserError
from fastmmkd.methods import METHODS
from fastmmkd.methods.cubemlp import AXES, CubeMLP, at_the_end
from tests.handmade import ragged_layout
from tests.literal_recurrence import literal

MODEL = {"frames": 9, "mixed_frames": [5, 3]}


def literal_streams(network: CubeMLP, sample: Sample) -> list[torch.Tensor]:
    """Three `[T_L, d]`."""
    streams = [sample.features[0] @ network.language[0]]
    for i, recurrence in enumerate(network.recurrences):
        (forwards, backwards), _ = literal(recurrence, sample.features[i + 1], sample.counts[i + 1])
        rows = []
        for row in forwards + backwards:
            centred = row - row.mean()
            normed = centred / (centred.square().mean() + 1e-6).sqrt()
            rows.append((normed * network.norm_weight[0, i] + network.norm_bias[0, i]).relu())
        streams.append(torch.stack(rows))
    frames = len(streams[0])
    pooled = []
    for z, counts in zip(streams, sample.counts, strict=True):
        bins = []
        for i in range(frames):
            first, last = i * len(z) // frames, -(-(i + 1) * len(z) // frames)
            own = [z[t] for t in range(first, last) if counts[t]]
            bins.append(sum(own) / len(own) if own else torch.zeros_like(z[0]))
        pooled.append(torch.stack(bins))
    return pooled


def literal_logits(network: CubeMLP, sample: Sample) -> torch.Tensor:
    streams = literal_streams(network, sample)
    cube = torch.zeros(network.frames, 3, streams[0].shape[1], dtype=torch.float64)
    cube[network.frames - len(streams[0]) :] = torch.stack(streams, dim=1)
    mixings = iter(network.mixings)
    for _ in range(2):
        for axis in AXES.values():
            mixing = next(mixings)
            if not mixing.is_there:
                continue
            lines = cube.movedim(axis - 2, -1)
            mixed = []
            for line in lines.flatten(0, 1):
                new = line @ mixing.projection[0]
                if mixing.has_mlp:
                    centred = line - line.mean()
                    normed = centred / (centred.square().mean() + 1e-6).sqrt() * mixing.weight[0] + mixing.bias[0]
                    hidden = linear(mixing.expand, normed)
                    new = new + linear(mixing.contract, 0.5 * hidden * (1 + torch.erf(hidden / 2**0.5)))
                mixed.append(new)
            cube = torch.stack(mixed).unflatten(0, lines.shape[:2]).movedim(-1, axis - 2)
    return linear(network.head, cube.mean(0).flatten())


def literal_loss(objective: Objective, batch, config) -> torch.Tensor:
    network = objective.module
    pairs = zip(samples(batch.inputs), targets_of(batch), strict=True)
    return sum(literal_error(literal_logits(network, sample), target, config) for sample, target in pairs) / BATCH


@pytest.mark.parametrize("off", [{}, {"time": False}, {"modality": False}, {"channel": False}], ids=str)
@pytest.mark.parametrize(("task", "alignment"), [("regression", "unaligned"), ("emotions-binary", "aligned")])
def test_loss_and_gradients_equal_the_literal_twin(task: str, alignment: str, off: dict[str, bool]) -> None:
    config = config_of("cubemlp", task, MODEL | off)
    objective = objective_of(config, split_of(task, alignment))
    batch = drawn(objective)
    total, parts = objective.loss(batch)
    expected = literal_loss(objective, batch, config)
    torch.testing.assert_close(total, expected)
    assert set(parts) == {"loss", "task"}
    assert_same_gradients(objective, total, expected)


def test_frames_lie_at_the_end_of_the_cube() -> None:
    layout = ragged_layout([[2, 4, 1]], spare=2)
    x = torch.arange(1.0, 10.0).view(1, 9, 1) * layout.factor(torch.float32).unsqueeze(-1)
    x.requires_grad_()
    cube = at_the_end(x, layout, 4)
    expected = torch.tensor([[0, 0, 1, 2], [3, 4, 5, 6], [0, 0, 0, 7]]).float()
    assert torch.equal(cube[0, ..., 0], expected)
    (gradient,) = torch.autograd.grad((cube * cube).sum(), x)
    assert torch.equal(gradient, 2 * x.detach())


def test_a_sample_that_is_longer_than_the_cube_is_refused_by_both_numbers() -> None:
    config, split = config_of("cubemlp", model=MODEL | {"frames": 6}), split_of()
    message = r"model\.frames: 6, but there are samples of 7 frames; expected at most 6"
    with pytest.raises(UserError, match=message):
        METHODS["cubemlp"].check(config, {"train": split.take(split.lengths.max(axis=1) < 7), "test": split})
    short = split.take(split.lengths.max(axis=1) < 7)
    objective = objective_of(config, short)
    batch = drawn(objective, rows=torch.tensor([[0, 1, 2, 3, 4, 5]]))
    objective.loss(batch)
    longer = dataclasses.replace(batch.inputs.layouts[0], longest=7)
    with pytest.raises(UserError, match=message):
        objective.module.predict(batch.inputs._replace(layouts=[longer] * 3))


def test_recurrent_weights_are_orthogonal() -> None:
    network = objective_of(config_of("cubemlp", model=MODEL), split_of()).module
    torch.manual_seed(1)
    fresh = type(network)(config_of("cubemlp", model=MODEL).model, config_of("cubemlp").loss, network.task, (5, 4, 3))
    weights = [p for name, p in fresh.named_parameters() if "weight_hh" in name]
    assert len(weights) == 2 * 2 * 2
    for weight in weights:
        torch.testing.assert_close(weight.T @ weight, torch.eye(len(weight.T)), rtol=0, atol=1e-5)
