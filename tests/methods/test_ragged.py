"""Padding, rows of nobody and whoever else is in a batch change nothing that is learnt or predicted."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest
import torch

from fastmmkd.blocks import Config
from fastmmkd.config import parse_config
from fastmmkd.data.batches import ResidentSplit
from fastmmkd.data.dataset import Dataset, Split
from fastmmkd.engine.phases import untrained
from fastmmkd.engine.step import Objective
from fastmmkd.methods import METHODS
from fastmmkd.modalities import CONDITIONS, condition_modalities
from fastmmkd.nn.models import models_of
from tests.handmade import network_of, small_config_of
from tests.methods.ragged_samples import CPU, DIMS, LONGEST, NORMALISATION, SAMPLES, make_split, resident

BATCH, STEPS = 6, 4
SEEDS = (1, 2)
SWITCHES = {
    "missing": {"attention_mask": "missing"},
    "missing in the first layer": {"attention_mask": "missing", "masked_layers": "first"},
    "padding": {"attention_mask": "padding"},
    "positions from the last frame": {"positions": "last"},
}


@pytest.fixture(scope="module", params=LONGEST)
def split(request: pytest.FixtureRequest) -> Split:
    return make_split(request.param)


def takes(method: str, model: dict[str, Any]) -> bool:
    """Whether a method's networks have such a switch."""
    fields = METHODS[method].config.model_fields["model"].annotation.model_fields  # type: ignore[union-attr]
    return all(value in get_args(fields[key].annotation) for key, value in model.items())


FORMS = [(method, name) for method in METHODS for name, model in SWITCHES.items() if takes(method, model)]


@pytest.fixture(params=FORMS, ids="-".join)
def form(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any]]:
    """A method, and one of the switches that it has."""
    method, name = request.param
    return method, SWITCHES[name]


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


def config_of(method: str, model: dict[str, Any], **blocks: Any) -> Config:
    raw = small_config_of(method, "none.h5", BATCH, layers=2)
    raw["model"] |= {"dropout": 0.2} | model
    raw["train"]["task"] = "regression"
    return parse_config(raw | blocks)


def seeds_of(config: Config) -> tuple[int, ...]:
    """Two models, where the method can train as many at once."""
    return SEEDS if METHODS[config.method].grouped else SEEDS[:1]


def rows_of(step: int, seeds: tuple[int, ...]) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(100 * seed + step) for seed in seeds]
    return torch.stack([torch.randperm(SAMPLES, generator=generator)[:BATCH] for generator in generators])


def objective_of(
    split: Split, config: Config, padded: bool = False, seeds: tuple[int, ...] = (), room: bool = False
) -> Objective:
    seeds = seeds or seeds_of(config)
    dataset = Dataset({"train": split}, "score", "random numbers", "synthetic", normalisation=NORMALISATION)
    spec, module = untrained(config, dataset, seeds, CPU, torch.float64)
    train = resident(split, config, padded)
    if room:
        train.make_room(rows_of(step, seeds).numpy() for step in range(STEPS))
    module.prepare(train)
    return Objective(module, train, spec.views, torch.tensor(seeds))


def trained(
    objective: Objective, optimizer: type[torch.optim.Optimizer], lr: float, steps: int = 2
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The parts of the loss over some steps `[steps, parts, S]`, and the first step's gradients."""
    seeds = tuple(objective.seeds.tolist())
    optimizer_of_it = optimizer(objective.module.parameters(), lr=lr)  # type: ignore[call-arg]
    losses, gradients = [], {}
    for step in range(steps):
        optimizer_of_it.zero_grad()
        total, parts = objective.loss(objective.draw(rows_of(step, seeds), torch.tensor(step)))
        total.backward()
        gradients = gradients or {name: p.grad.clone() for name, p in objective.module.named_parameters()}
        losses.append(torch.stack(list(parts.values())))
        optimizer_of_it.step()
    return torch.stack(losses), gradients


def assert_same_training(a: Any, b: Any) -> None:
    torch.testing.assert_close(a[1], b[1], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(a[0], b[0], rtol=1e-10, atol=1e-10)


def test_training_does_not_depend_on_padding_or_on_rows_of_nobody(form, split) -> None:
    method, model = form
    config, steps = config_of(method, model), STEPS if model == SWITCHES["missing"] else 2
    ragged, *others = (
        trained(objective_of(split, config, padded, room=room), torch.optim.SGD, 0.01, steps)
        for padded, room in ((False, False), (True, False), (False, True))
    )
    assert ragged[0].isfinite().all()
    for other in others:
        assert_same_training(other, ragged)


@pytest.mark.parametrize("room", [False, True])
def test_a_model_alone_trains_as_it_does_beside_another(method, split, room) -> None:
    """Whose batches have other lengths; under Adam, and with an exact number of frames dropped."""
    config = config_of(method, {}, missing={"ratio": "exact"})
    if seeds_of(config) != SEEDS:
        pytest.skip("it trains one seed at a time")
    together, gradients = trained(objective_of(split, config, room=room), torch.optim.Adam, 0.002)
    for i, seed in enumerate(SEEDS):
        for padded in (False, True):
            alone = trained(objective_of(split, config, padded, (seed,), room), torch.optim.Adam, 0.002)
            assert_same_training(alone, (together[..., i : i + 1], {n: g[i : i + 1] for n, g in gradients.items()}))


@pytest.mark.parametrize("model", [{"mcim": False}, {"dfim": False}], ids=["w/o MCIM", "w/o DFIM"])
def test_nor_do_umdfs_other_forms(split, model) -> None:
    config = config_of("umdf", model)
    ragged, *others = (
        trained(objective_of(split, config, padded, room=room), torch.optim.SGD, 0.01)
        for padded, room in ((False, False), (True, False), (False, True))
    )
    for other in others:
        assert_same_training(other, ragged)


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_prediction_depends_on_its_own_sample_alone(form, split, p) -> None:
    """Not on how long the others are, on their order or number, or on padding."""
    method, model = form
    config = config_of(method, model)
    network = network_of(config, DIMS, seed=1).double().eval()
    of_rows, of_padding = resident(split, config), resident(split, config, padded=True)

    def predictions(of: ResidentSplit, samples: list[int]) -> list[torch.Tensor]:
        with torch.no_grad():
            outputs = network.predict(of.evaluation_batch(torch.tensor(samples), (True, True, True), p, 2024, 3))
        return [x[0] for x in outputs]

    whole, order = predictions(of_rows, list(range(SAMPLES))), [7, 0, 2, 1]
    assert all(x.isfinite().all() for x in whole)
    close = {"rtol": 1e-10, "atol": 1e-10}
    for expected, padded, some in zip(
        whole, predictions(of_padding, list(range(SAMPLES))), predictions(of_rows, order), strict=True
    ):
        torch.testing.assert_close(padded, expected, **close)
        torch.testing.assert_close(some, expected[order], **close)
    for i in (0, 1, 2, 9):
        for of in (of_rows, of_padding):
            for expected, alone in zip(whole, predictions(of, [i]), strict=True):
                torch.testing.assert_close(alone[0], expected[i], **close)


@torch.no_grad()
def test_nor_on_the_other_subsets_of_modalities(form, split) -> None:
    """Those that a sample lacks a part of, too."""
    method, model = form
    config = config_of(method, model)
    network, of = network_of(config, DIMS, seed=1).double().eval(), resident(split, config)
    subsets = [condition_modalities(condition) for condition in CONDITIONS]
    together = network.predict_subsets(of.evaluation_batch(torch.arange(SAMPLES), (True, True, True)), subsets)
    for kept, predictions in zip(subsets, together, strict=True):
        alone = network.predict(of.evaluation_batch(torch.arange(SAMPLES), kept))
        torch.testing.assert_close(predictions, alone, rtol=1e-10, atol=1e-10)


def test_a_prediction_does_not_depend_on_the_samples_of_its_split(form, split) -> None:
    """Where the longest are left out, or come in."""
    method, model = form
    config = config_of(method, model)
    network = network_of(config, DIMS, seed=1).double().eval()
    short = np.flatnonzero(split.lengths.max(axis=1) <= 4)
    assert 1 < len(short) < SAMPLES

    def predictions(of: Split, samples: torch.Tensor, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
        with torch.no_grad():
            return network.predict(resident(of, config, padded).evaluation_batch(samples, (True, True, True)))

    expected = predictions(split, torch.from_numpy(short), padded=False)
    for padded in (False, True):
        alone = predictions(split.take(short), torch.arange(len(short)), padded)
        torch.testing.assert_close(alone, expected, rtol=1e-10, atol=1e-10)


def test_a_prediction_does_not_depend_on_rows_of_nobody(form, split) -> None:
    method, model = form
    config = config_of(method, model)
    network = network_of(config, DIMS, seed=1).double().eval()
    of, rows = resident(split, config), torch.arange(BATCH)[None]
    room = [sum(of.rows[:BATCH, m]) + 5 + m for m in range(3)]
    with torch.no_grad():
        expected = network.predict(of.complete(rows))
        spacious = network.predict(of.complete(rows, of.layouts(rows, room=room)))
    torch.testing.assert_close(spacious, expected, rtol=1e-10, atol=1e-10)


def test_models_read_the_same_samples_as_one(method, split) -> None:
    config = config_of(method, {})
    objective = objective_of(split, config)
    network, rows = objective.module.network.eval(), torch.arange(BATCH)[None]
    with torch.no_grad():
        inputs = objective.split.complete(rows)
        together = network.predict(inputs.of_models(models_of(network)))
        for s, seed in enumerate(seeds_of(config)):
            alone = objective_of(split, config, seeds=(seed,)).module.network.eval().predict(inputs)
            torch.testing.assert_close([x[s : s + 1] for x in together], list(alone), rtol=1e-10, atol=1e-10)


def test_padding_counts_as_frames_where_nothing_is_masked(method, split) -> None:
    """Which is why such a model pads: each sample to the longest, wherever it is predicted."""
    config = config_of(method, {"attention_mask": "none"})
    assert resident(split, config).is_padded
    plain, padded = (trained(objective_of(split, config, padded), torch.optim.SGD, 0.01) for padded in (False, True))
    assert_same_training(plain, padded)
    assert_same_training(trained(objective_of(split, config, room=True), torch.optim.SGD, 0.01), plain)
