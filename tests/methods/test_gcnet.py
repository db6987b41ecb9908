"""GCNet against its literal twin, its reconstruction loss, what it refuses, and what its losses do not depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from literal_gcnet import losses

from fastmmkd.config import load_config, parse_config
from fastmmkd.data.batches import Batch
from fastmmkd.errors import UserError
from fastmmkd.methods.gcnet import GCNet, nodes_of
from tests.handmade import CONFIGS, small_config_of
from tests.methods.ragged_samples import batch_of_rows, config_of, make_split, objective_of, resident, samples

ROWS = [0, 1, 2, 5, 9]
"""The longest sample, the shortest, one that lacks everything, and two more."""
CASES: list[dict[str, Any]] = [
    {},
    {"task": "classification-3"},
    {"task": "emotions-binary"},
    {"task": "emotions-binary", "loss": {"task": "project"}},
    {"model": {"temporal": False, "window": 1}},
    {"model": {"speaker": False, "window": 9}},
    {"model": {"readout": "mean"}},
    {"model": {"attention_mask": "missing"}},
    {"model": {"attention_mask": "missing", "masked_layers": "first", "readout": "mean"}},
    {"loss": {"lambda_rec": 0.0}},
]


def network_of(batch: Batch, objective: Any) -> GCNet:
    assert isinstance(objective.module, GCNet)
    return objective.module


@pytest.mark.parametrize("alignment", ["aligned", "unaligned"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_gradients_equal_the_literal_twin(case: dict[str, Any], alignment: str) -> None:
    config = config_of("gcnet", len(ROWS), **({"loss": {"lambda_rec": 0.5}} | case))
    objective = objective_of(config, alignment)
    batch = batch_of_rows(objective, ROWS)
    network = network_of(batch, objective)
    total, parts = objective.loss(batch)
    missing = [
        (features, present, usable)
        for (features, usable), (_, present) in zip(samples(batch.inputs), samples(batch.inputs, True), strict=True)
    ]
    frames = objective.split.frames[0][ROWS].tolist()
    complete = [(*sample, n) for sample, n in zip(samples(batch.complete, True), frames, strict=True)]
    masked = config.model.attention_mask == "missing"
    expected = losses(network, missing, complete, batch.targets[0].tolist(), config.model, masked)
    assert set(parts) == {"loss", *expected}
    for name, part in expected.items():
        torch.testing.assert_close(parts[name], part.detach().view(1))
    whole = expected["task"] + config.loss.lambda_rec * expected.get("rec", 0.0)
    torch.testing.assert_close(total, whole)
    names, parameters = zip(*network.named_parameters(), strict=True)
    made, wanted = (torch.autograd.grad(x, parameters) for x in (total, whole))
    torch.testing.assert_close(dict(zip(names, made, strict=True)), dict(zip(names, wanted, strict=True)))


@pytest.mark.parametrize("padded", [False, True])
def test_the_reconstruction_loss_is_of_what_is_missing_and_known(padded: bool) -> None:
    """By hand: a reconstruction is 1 off where the version lacks what the sample has, and far off elsewhere: in
    padding, in what is there, and in what the data lack."""
    config = config_of("gcnet", len(ROWS))
    objective = objective_of(config, "aligned")
    objective.split = resident(make_split("aligned"), config, padded)
    batch = batch_of_rows(objective, ROWS)
    network, lacking = network_of(batch, objective), 0
    with torch.no_grad():
        network.reconstruction.weight.zero_()
        network.reconstruction.bias.fill_(0.25)
    for x, there, kept in zip(batch.complete.features, batch.complete.present, batch.inputs.present, strict=True):
        assert not there.all()
        assert kept.any()
        x[there & kept] = 1e3
        x[there & ~kept] = 1.25
        lacking += int((there & ~kept).sum())
    real = int(objective.split.frames[0][ROWS].sum())
    assert lacking
    assert network.losses(batch).parts["rec"].item() == pytest.approx(lacking / real)


def test_unaligned_streams_are_pooled_to_the_frames_of_language() -> None:
    """A node has a modality where a frame of its bin is there."""
    objective = objective_of(config_of("gcnet", len(ROWS)), "unaligned")
    batch = batch_of_rows(objective, ROWS)
    nodes = nodes_of(batch.inputs)
    assert nodes.layout is batch.inputs.layouts[0]
    assert nodes.features.shape[-1] == sum(network_of(batch, objective).dims)
    start = 0
    for there, d in zip(nodes.present, network_of(batch, objective).dims, strict=True):
        part = nodes.features[..., start : start + d]
        assert torch.equal(part.abs().sum(-1) > 0, there)
        start += d


def test_losses_do_not_depend_on_the_number_of_processes(in_two_processes: Any) -> None:
    objective = objective_of(config_of("gcnet", 6), "unaligned")
    rows, network = [0, 1, 2, 5, 9, 11], objective.module
    parameters = list(network.parameters())

    def step(rows: list[int]) -> tuple[torch.Tensor, ...]:
        total, parts = network(batch_of_rows(objective, rows))
        return torch.stack(list(parts.values())), *torch.autograd.grad(total, parameters)

    whole = step(rows)
    first, second = in_two_processes(lambda rank: step(rows[3 * rank : 3 * rank + 3]))
    torch.testing.assert_close([(a + b) / 2 for a, b in zip(first, second, strict=True)], list(whole))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": {"temporal": False, "speaker": False}},
            "model.speaker: false, and so is temporal; expected at least one of the graphs",
        ),
        (
            {"model": {"level": "context", "readout": "mean"}},
            'model.readout: "mean", but at level "context" the label is the last node\'s; expected "last"',
        ),
        (
            {"missing": {"enabled": False}},
            "loss.lambda_rec: 1, but nothing is missing where missing.enabled is false; expected 0",
        ),
        ({"train": {"together": True}}, "train.together: GCNet trains one seed at a time; expected false"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    raw = small_config_of("gcnet", "none.h5", 8)
    for block, of_block in changes.items():
        raw[block] |= of_block
    with pytest.raises(UserError) as caught:
        parse_config(raw)
    assert str(caught.value) == f"config: {message}"


def test_complete_training_is_without_reconstruction() -> None:
    config = load_config(CONFIGS / "gcnet_mosi.json", ["missing.enabled=false", "loss.lambda_rec=0.0"])
    assert not config.missing.enabled


def test_utterances_are_of_one_number_in_all_modalities(tmp_path: Path) -> None:
    config = config_of("gcnet", len(ROWS), model={"level": "context"})
    objective_of(config, "aligned")
    with pytest.raises(UserError, match=r"^model\.level: .context., but a sample's modalities differ in length; exp"):
        objective_of(config, "unaligned")
