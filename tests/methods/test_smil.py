"""SMIL against its literal twin in both orders, its centroids, what it refuses, and what it does not depend on."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from literal_smil import forward, step

from fastmmkd.config import parse_config
from fastmmkd.data.batches import View
from fastmmkd.engine.step import Objective
from fastmmkd.errors import UserError
from fastmmkd.methods import smil
from fastmmkd.methods.smil import HIDDEN_NOISE, JOINT_NOISE, METHOD, SMIL, SmilTeacher, paired_rows
from fastmmkd.nn.noise import normal_noise
from fastmmkd.ops import use_provider
from tests.handmade import small_config_of
from tests.methods.ragged_samples import batch_of_rows, config_of, objective_of, samples

HEADS, ROWS = 2, [0, 1, 2, 5, 9]
"""The longest sample, the shortest, one that lacks everything, and two more."""
CASES: list[dict[str, Any]] = [
    {},
    {"task": "classification-3"},
    {"task": "emotions-binary"},
    {"model": {"prior": False}},
    {"model": {"noise": False}},
    {"model": {"attention_mask": "missing", "masked_layers": "first"}},
    {"teacher": {"incomplete_samples": True}},
    {"loss": {"inner_lr": 0.0}},
    {"loss": {"lambda_joint": 0.0}},
]
PLAIN = {"head_dropout": 0.0, "hidden": 7, "centroids": 4}


def build(alignment: str = "aligned", *seeds: int, **case: Any) -> Objective:
    blocks = {"model": {}, "loss": {"lambda_joint": 0.5, "lambda_hidden": 2.0, "inner_lr": 0.3}, "teacher": {}}
    merged = {name: block | case.get(name, {}) for name, block in blocks.items()}
    merged["model"] = PLAIN | merged["model"]
    return objective_of(config_of("smil", len(ROWS), case.get("task", "regression"), **merged), alignment, *seeds)


def module_of(objective: Objective) -> SMIL:
    assert isinstance(objective.module, SMIL)
    return objective.module


def views(batch: Any) -> list[list[Any]]:
    """Of the three views, the samples as the literal twin takes them."""
    made = []
    for view in (View.MISSING, View.MISSING_2, View.COMPLETE):
        pairs = zip(samples(batch.view(view)), samples(batch.view(view), True), strict=True)
        made.append([(features, present, usable) for (features, usable), (_, present) in pairs])
    return made


def noises_of(batch: Any, module: SMIL) -> list[tuple[torch.Tensor, torch.Tensor]]:
    body = module.network.body
    sizes = ((JOINT_NOISE, body.hidden.weight.shape[1]), (HIDDEN_NOISE, body.hidden.weight.shape[2]))
    noise = [normal_noise(batch.draw, place, n, torch.float64)[0] for place, n in sizes]
    return list(zip(*noise, strict=True))


@pytest.mark.parametrize("alignment", ["aligned", "unaligned"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_and_first_order_gradients_equal_the_literal_twin(case: dict[str, Any], alignment: str) -> None:
    objective = build(alignment, **case)
    module, batch = module_of(objective), batch_of_rows(objective, ROWS)
    total, parts = objective.loss(batch)
    total.backward()
    paired, targets = module.is_paired[batch.rows][0].tolist(), batch.targets[0].tolist()
    assert any(paired)
    made = views(batch), paired, noises_of(batch, module), targets, module.task, HEADS, module.weights
    (views_of, *rest) = made
    expected, whole, gradients = step(module.network, *views_of, *rest, module.weights.inner_lr)
    if not module.weights.lambda_joint:
        del expected["joint"]
    assert set(parts) == {"loss", *expected}
    for name, part in expected.items():
        torch.testing.assert_close(parts[name], part.detach().view(1))
    torch.testing.assert_close(total, whole)
    found = {name: p.grad for name, p in module.network.named_parameters()}
    torch.testing.assert_close(found, gradients, rtol=1e-5, atol=1e-6)


def test_predictions_equal_the_literal_twin() -> None:
    objective = build("unaligned")
    module, inputs = module_of(objective), batch_of_rows(objective, ROWS).view(View.MISSING)
    logits, hidden = module.network.eval().predict(inputs)
    pairs = zip(samples(inputs), samples(inputs, True), strict=True)
    made = [forward(module.network, (x, present, usable), HEADS, True) for (x, usable), (_, present) in pairs]
    torch.testing.assert_close(logits[0], torch.stack([of[2] for of in made]))
    torch.testing.assert_close(hidden[0], torch.stack([of[1] for of in made]))


def gradient(objective: Objective, batch: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    total, _ = objective.loss(batch)
    return total.detach(), list(torch.autograd.grad(total, list(objective.module.parameters())))


def test_the_second_order_gradient_is_that_of_the_value() -> None:
    """Along any direction it is what the value changes by; the first-order gradient is not. Both have one value."""
    cases = {order: build(loss={"order": order}) for order in (1, 2)}
    batches = {order: batch_of_rows(objective, ROWS) for order, objective in cases.items()}
    made = {order: gradient(objective, batches[order]) for order, objective in cases.items()}
    torch.testing.assert_close(made[1][0], made[2][0])
    parameters = list(cases[2].module.parameters())
    generator = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    h, values = 1e-5, []
    for sign in (1, -2):  # to one side, and from there to the other
        with torch.no_grad():
            for p, v in zip(parameters, direction, strict=True):
                p += sign * h * v
        values.append(cases[2].loss(batches[2])[0].item())
    slope = (values[0] - values[1]) / (2 * h)
    along = {order: sum((g * v).sum().item() for g, v in zip(made[order][1], direction, strict=True)) for order in made}
    assert along[2] == pytest.approx(slope, rel=1e-5)
    assert abs(along[1] - slope) > 1e-3 * abs(slope)


@pytest.mark.parametrize("order", [1, 2])
def test_both_orders_run_on_compiled_kernels(order: int) -> None:
    """In second order their gradients are those of the definitions."""
    config = config_of("smil", len(ROWS), model=PLAIN, loss={"order": order, "inner_lr": 0.01})
    found = []
    for provider in (nullcontext(), use_provider("reference")):
        objective = objective_of(config, "aligned", dtype=torch.float32)
        with provider:
            found.append(gradient(objective, batch_of_rows(objective, ROWS)))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_what_is_missing_is_not_looked_at() -> None:
    """Of a modality without a frame, not even the encoder of zeros matters; its centroids do."""
    objective = build()
    network = module_of(objective).network.eval()
    inputs = batch_of_rows(objective, [0, 5]).complete.only((True, False, True))
    logits, _ = network.predict(inputs)
    with torch.no_grad():
        network.body.embedding.convolutions[1].bias.add_(3)
        torch.testing.assert_close(network.predict(inputs)[0], logits)
        network.imputation.centroids[:, 1] += 1
    assert not torch.allclose(network.predict(inputs)[0], logits)


def test_encoders_of_absent_modalities_take_no_inner_step(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: dict[str, torch.Tensor] = {}

    def noting(*arguments: Any) -> Any:
        made = inner_step(*arguments)
        taken.update({name: (x - arguments[1][name]).detach() for name, x in made.adapted.items()})
        return made

    inner_step = smil.inner_step
    monkeypatch.setattr(smil, "inner_step", noting)
    objective = build()
    batch = batch_of_rows(objective, ROWS)
    assert batch.missing is not None
    batch.missing = batch.missing.only((True, True, False))
    objective.loss(batch)
    visual = "embedding.convolutions.2.weight"
    assert not taken[visual].any()
    assert taken["embedding.convolutions.0.weight"].any()
    assert all(not x[:, 2].any() for name, x in taken.items() if name.startswith("encoders."))


def test_the_rate_of_the_inner_step_falls() -> None:
    objective = build(loss={"inner_lr": 0.5, "inner_decay": 2})
    module, batch = module_of(objective), batch_of_rows(objective, ROWS)
    rates = []
    for _ in range(5):
        rates.append(module.rate.item())
        module.after_step(batch)
    assert rates == pytest.approx([0.5, 0.5, 0.05, 0.05, 0.005])
    forever = module_of(build(loss={"inner_decay": None}))
    forever.steps.values += 10**6
    assert forever.rate.item() == pytest.approx(0.3)


def test_training_starts_from_what_was_pretrained() -> None:
    """Encoders, classifier, and centroids of the pretrained features of those that are seen complete."""
    module = module_of(build())
    (pretrained,) = module.pretrained
    fresh = SMIL(module.network, module.weights, pretrained, SmilTeacher()).double()
    fresh.start()
    for name, p in pretrained.body.named_parameters():
        assert torch.equal(p, fresh.network.body.get_parameter(name)), name


@pytest.mark.parametrize("incomplete", [False, True])
def test_centroids_are_means_of_the_features_nearest_to_them(incomplete: bool) -> None:
    objective = build(teacher={"incomplete_samples": incomplete})
    module, split = module_of(objective), objective.split
    (pretrained,) = module.pretrained
    rows = torch.arange(split.size) if incomplete else torch.nonzero(split.present.all(1))[:, 0]
    values, there, _ = pretrained.body.features(split.complete(rows[None]))
    for m in range(3):
        f, centroids = values[0, m][there[0, m]], module.network.imputation.centroids[0, m]
        assert len(f) > len(centroids)
        own = torch.cdist(f, centroids).argmin(1)
        for k in own.unique():
            torch.testing.assert_close(centroids[k], f[own == k].mean(0), rtol=1e-6, atol=1e-6)


def test_centroids_depend_on_the_seed_alone() -> None:
    made = [module_of(build("aligned", *seeds)).network.imputation.centroids for seeds in ((1,), (1,), (2,), (2, 1))]
    assert torch.equal(made[0], made[1])
    assert not torch.allclose(made[0], made[2])
    torch.testing.assert_close(made[3], torch.cat((made[2], made[0])))


def test_few_are_seen_complete() -> None:
    """A fixed share of the complete samples, in either phase; the outer loss is theirs alone."""
    present = np.ones((100, 3), bool)
    present[::2, 0] = False
    some = paired_rows(present, SmilTeacher(paired=0.2))
    assert len(some) == 10
    assert (some % 2 == 1).all()
    assert len(set(np.diff(some))) > 1
    more = paired_rows(present, SmilTeacher(paired=0.4))
    assert set(some) <= set(more)
    assert list(paired_rows(present, SmilTeacher())) == list(range(1, 100, 2))
    objective = build(teacher={"paired": 0.3})
    module = module_of(objective)
    paired = torch.nonzero(module.is_paired)[:, 0].tolist()
    assert list(METHOD.phases[0].rows(config_of("smil", 5, teacher={"paired": 0.3}), _train(objective))) == paired
    others = [row for row in range(objective.split.size) if row not in paired][:4]
    parts = objective.loss(batch_of_rows(objective, others))[1]
    assert parts["task"] == parts["joint"] == parts["hidden"] == 0
    assert parts["inner"] > 0


def _train(objective: Objective) -> Any:
    class Present:
        present = objective.split.present.numpy()

    return Present


def test_losses_do_not_depend_on_the_number_of_processes(in_two_processes: Any) -> None:
    """The inner step is that of all rows. Each process has a module of its own: a functional call changes it."""
    rows, objectives = [0, 1, 2, 5, 9, 11], [build("unaligned") for _ in range(2)]

    def step(rank: int, rows: list[int]) -> tuple[torch.Tensor, ...]:
        module = objectives[rank].module
        total, parts = module(batch_of_rows(objectives[rank], rows))
        return torch.stack(list(parts.values())), *torch.autograd.grad(total, list(module.parameters()))

    whole = step(0, rows)
    first, second = in_two_processes(lambda rank: step(rank, rows[3 * rank : 3 * rank + 3]))
    torch.testing.assert_close([(a + b) / 2 for a, b in zip(first, second, strict=True)], list(whole))


def test_second_order_has_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smil, "world_size", lambda: 2)
    with pytest.raises(UserError, match=r"^loss\.order: 2 trains in one process, there are 2; expected 1$"):
        build(loss={"order": 2})
    build(loss={"order": 2, "inner_lr": 0.0})


def test_somebody_is_complete() -> None:
    raw = config_of("smil", len(ROWS))
    module = module_of(build())

    class Nobody:
        present = torch.tensor([[True, False, True]])

    with pytest.raises(UserError, match=r"^teacher\.incomplete_samples: false, but no training sample has all modal"):
        module.prepare(Nobody())  # type: ignore[arg-type]
    assert raw.teacher is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"missing": {"enabled": False}}, "missing.enabled: false, but SMIL learns to fill in what is missing; expect"),
        ({"deepspeed": {"zero_optimization": {"stage": 2}}}, "deepspeed.zero_optimization.stage: 2 divides the gradi"),
        (
            {"deepspeed": {"bf16": {"enabled": True}}},
            "deepspeed.bf16.enabled: true, but an inner step of 0.001 is lost",
        ),
        ({"loss": {"order": 3}}, "loss.order: expected 1 or 2, got 3"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    raw = small_config_of("smil", "none.h5", 8)
    for block, of_block in changes.items():
        raw[block] |= of_block
    with pytest.raises(UserError) as caught:
        parse_config(raw)
    assert str(caught.value).startswith(f"config: {message}")
    if "deepspeed" in changes:
        parse_config(raw | {"loss": raw["loss"] | {"inner_lr": 0.0}})


def test_there_is_no_meta_learning_without_pretraining() -> None:
    with pytest.raises(UserError, match=r"^config: teacher: expected a block of keys, got null"):
        parse_config(small_config_of("smil", "none.h5", 8) | {"teacher": None})
