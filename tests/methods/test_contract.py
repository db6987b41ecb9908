"""What every method owes the engine, under each of its ablations: nothing here knows a method's name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmmkd.blocks import Config
from fastmmkd.config import parse_config
from fastmmkd.data import store
from fastmmkd.data.dataset import Dataset
from fastmmkd.engine.step import Objective, untrained_objective
from fastmmkd.methods import METHODS
from fastmmkd.modalities import CONDITIONS, condition_modalities
from fastmmkd.nn.dropout import Dropout
from fastmmkd.nn.models import load_model, model_state, models_of
from fastmmkd.ops import use_provider
from tests.engine.fake_capture import NoHostSync
from tests.handmade import CONFIGS, small_config_of

CPU, BATCH = torch.device("cpu"), 8
CASES = [(name, row) for name, method in METHODS.items() for row in (method.ablations or [method.title])]


@pytest.fixture(scope="module")
def dataset(tiny_store: Path) -> Dataset:
    return store.read(tiny_store)


@pytest.fixture(params=CASES, ids=lambda case: " ".join(case))
def config(request: pytest.FixtureRequest, tiny_store: Path) -> Config:
    """A row of a method's ablation table, small: the shipped MOSI config with as little of everything as it takes."""
    name, row = request.param
    method = METHODS[name]
    raw = small_config_of(name, tiny_store, BATCH)
    for override in method.ablations.get(row, ()):
        key, value = override.split("=")
        *blocks, last = key.split(".")
        block = raw
        for part in blocks:
            block = block[part]
        try:
            block[last] = json.loads(value)
        except ValueError:
            block[last] = value
    return parse_config(raw)


def objective_of(config: Config, dataset: Dataset, *seeds: int) -> Objective:
    objective = untrained_objective(config, dataset, seeds, CPU, torch.float64)
    torch.manual_seed(5)
    with torch.no_grad():  # away from what initialisation makes special, such as biases of 0
        for p in objective.module.parameters():
            p.add_(0.01 * torch.randn(p.shape[1:], dtype=p.dtype))
    return objective


def rows_of(*seeds: int) -> torch.Tensor:
    return torch.stack([torch.randperm(40, generator=torch.Generator().manual_seed(seed))[:BATCH] for seed in seeds])


def losses_and_gradients(objective: Objective, rows: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    total, parts = objective.loss(objective.draw(rows, torch.tensor(2)))
    total.backward()
    return parts, {name: p.grad for name, p in objective.module.named_parameters()}


def test_it_trains_every_parameter_it_has(config: Config, dataset: Dataset) -> None:
    parts, gradients = losses_and_gradients(objective_of(config, dataset, 1), rows_of(1))
    assert [name for name, g in gradients.items() if g is None] == []
    assert all(g.isfinite().all() for g in gradients.values())
    assert all(part.shape == (1,) and part.isfinite() for part in parts.values())
    assert "loss" in parts


def test_a_sample_of_which_nothing_is_left_has_a_finite_loss_and_prediction(config: Config, dataset: Dataset) -> None:
    objective = objective_of(config, dataset, 1)
    batch = objective.draw(rows_of(1), torch.tensor(0))
    nothing = batch.inputs._replace(
        features=[torch.zeros_like(x) for x in batch.inputs.features],
        masks=[torch.zeros_like(mask) for mask in batch.inputs.masks],
    )
    total, _ = objective.loss(replace(batch, missing=nothing))
    total.backward()
    assert total.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in objective.module.parameters())
    logits, joint = objective.module.network.eval().predict(nothing)
    assert logits.isfinite().all()
    assert joint.isfinite().all()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_two_models_at_once_are_two_models(config: Config, dataset: Dataset, dropout: float) -> None:
    if not METHODS[config.method].grouped:
        pytest.skip("it trains one seed at a time")
    config = config.model_copy(update={"model": config.model.model_copy(update={"dropout": dropout})})
    together = objective_of(config, dataset, 1, 2)
    parts, gradients = losses_and_gradients(together, rows_of(1, 2))
    assert models_of(together.module) == 2
    for i, seed in enumerate((1, 2)):
        own_parts, own = losses_and_gradients(objective_of(config, dataset, seed), rows_of(seed))
        torch.testing.assert_close({name: x[i : i + 1] for name, x in parts.items()}, own_parts)
        torch.testing.assert_close({name: g[i : i + 1] for name, g in gradients.items()}, own)


def test_the_order_of_a_batch_does_not_matter(config: Config, dataset: Dataset) -> None:
    rows = rows_of(1)
    found = losses_and_gradients(objective_of(config, dataset, 1), rows)
    torch.testing.assert_close(losses_and_gradients(objective_of(config, dataset, 1), rows.flip(1)), found)


def test_a_step_never_waits_for_the_device(config: Config, dataset: Dataset) -> None:
    """So it can be captured: the draw, what the teacher makes of it, the loss, the way back, and what comes after."""
    objective = untrained_objective(config, dataset, (1,), CPU, torch.float32)
    rows, epoch = rows_of(1), torch.tensor(0)
    objective.split.make_room([rows.numpy()])
    with use_provider("reference"):
        objective.loss(objective.draw(rows, epoch))
        with NoHostSync():
            batch = objective.draw(rows, epoch)
            objective.loss(batch)[0].backward()
            with torch.no_grad():
                objective.module.after_step(batch)


def test_what_it_exports_predicts_the_same(config: Config, dataset: Dataset) -> None:
    objective = objective_of(config, dataset, 1)
    inputs = objective.draw(rows_of(1), torch.tensor(0)).inputs
    network = METHODS[config.method].network(config, dataset.feature_dims).double().eval()
    load_model(network, model_state(objective.module.network, 0))
    torch.testing.assert_close(network.predict(inputs), objective.module.network.eval().predict(inputs))


@torch.no_grad()
def test_it_predicts_several_subsets_as_it_predicts_each(config: Config, dataset: Dataset) -> None:
    objective = objective_of(config, dataset, *((1, 2) if METHODS[config.method].grouped else (1,)))
    network, sample = objective.module.network.eval(), torch.arange(BATCH)
    subsets, models = [condition_modalities(condition) for condition in CONDITIONS], models_of(objective.module)
    whole = objective.split.evaluation_batch(sample, (True, True, True)).of_models(models)
    for kept, predictions in zip(subsets, network.predict_subsets(whole, subsets), strict=True):
        alone = network.predict(objective.split.evaluation_batch(sample, kept).of_models(models))
        torch.testing.assert_close(predictions, alone)


@pytest.mark.parametrize("method", METHODS)
def test_every_dropout_is_in_use_and_has_a_place_of_its_own(method: str, tiny_store: Path, dataset: Dataset) -> None:
    raw = small_config_of(method, tiny_store, BATCH)
    raw["model"]["dropout"] = 0.3
    objective = untrained_objective(parse_config(raw), dataset, (1,), CPU, torch.float64)
    found = [module for module in objective.module.modules() if isinstance(module, Dropout)]
    assert [module.place for module in found] == list(range(len(found)))
    used = set()
    for module in found:
        module.register_forward_hook(lambda module, given, y: used.add(module.place) if y is not given[0] else None)
    objective.loss(objective.draw(rows_of(1), torch.tensor(0)))
    assert used == {module.place for module in found if module.dropped}


def test_names_are_those_of_files_and_configs() -> None:
    for name, method in METHODS.items():
        assert method.name == name
        assert (CONFIGS.parent / "fastmmkd" / "methods" / f"{name}.py").exists()
        assert method.config.model_fields["method"].annotation is not str
