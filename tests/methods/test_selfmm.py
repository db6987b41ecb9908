"""Self-MM against its literal twin; its labels after steps that are computed by hand, alone and in two processes."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from whole_batches import (
    BATCH,
    ROWS,
    Sample,
    assert_same_gradients,
    config_of,
    drawn,
    has,
    linear,
    literal_error,
    objective_of,
    samples,
    split_of,
    targets_of,
)

from fastmmkd.blocks import Config
from fastmmkd.config import parse_config
from fastmmkd.data.dataset import Split
from fastmmkd.engine import step, trainer
from fastmmkd.engine.step import Objective
from fastmmkd.errors import Interrupted, UserError
from fastmmkd.methods.selfmm import NEAR, Centres, SelfMM
from tests.engine.fake_capture import FakeCapture
from tests.handmade import small_config_of
from tests.literal_recurrence import literal

TASKS = ("regression", "classification-2", "emotions-binary")
MODEL = {"fusion_width": 5}
WORLD = 2


def literal_features(module: SelfMM, sample: Sample) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """G_f, the three G_m, and logits, of one sample."""
    network = module.network
    of_modalities = []
    for m, encoder in enumerate(network.encoders):
        _, (last,) = literal(encoder, sample.features[m], sample.counts[m])
        of_modalities.append(linear(network.encoded, last, m))
    fused = linear(network.fusion, torch.cat(of_modalities)).relu()
    logits = linear(network.head, linear(network.hidden, fused).relu())
    if not module.weights.lambda_unimodal:
        return fused, [], logits
    return fused, [linear(module.unimodal, f, m).relu() for m, f in enumerate(of_modalities)], logits


def sign(target: Any, config: Config) -> list[float]:
    return [target] if config.task.is_regression else [2.0 * c - 1 for c in target]


def literal_loss(config: Config, objective: Objective, batch: Any, labels: torch.Tensor) -> torch.Tensor:
    """`L` of a batch; `labels` `[N, 3, P]`."""
    module, weights = objective.module, config.loss
    assert isinstance(module, SelfMM)
    task, unimodal, number = torch.zeros(3, BATCH, dtype=torch.float64), [0.0] * 3, [0] * 3
    task = 0.0
    for sample, target, row in zip(samples(batch.inputs), targets_of(batch), batch.rows[0], strict=True):
        _, of_modalities, logits = literal_features(module, sample)
        task = task + literal_error(logits, target, config) / BATCH
        for m, g in enumerate(of_modalities):
            predicted = linear(module.unimodal_head, linear(module.unimodal_hidden, g, m).relu(), m)
            if not has(sample, m):
                continue
            number[m] += 1
            if not weights.ulgm:
                unimodal[m] = unimodal[m] + literal_error(predicted, target, config)
                continue
            for y, y_m, z in zip(sign(target, config), labels[row, m].double(), predicted, strict=True):
                error = (z - y_m).abs()
                if not config.task.is_regression:
                    p, q = z.sigmoid(), (y_m + 1) / 2
                    error = -q * p.log() - (1 - q) * (1 - p).log()
                unimodal[m] = unimodal[m] + (y_m - y).abs().tanh() * error
    of_modalities = sum(total / max(n, 1) for total, n in zip(unimodal, number, strict=True))
    return task + weights.lambda_unimodal * of_modalities


@pytest.mark.parametrize("alignment", ["aligned", "unaligned"])
@pytest.mark.parametrize("ulgm", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_loss_and_gradients_equal_the_literal_twin(task: str, ulgm: bool, alignment: str) -> None:
    config = config_of("selfmm", task, MODEL, ulgm=ulgm, lambda_unimodal=0.7)
    objective = objective_of(config, split_of(task, alignment))
    labels = torch.zeros(24, 3, 1)
    if ulgm:  # as they may have become
        bank = objective.module.labels.values
        bank += torch.randn(bank.shape, generator=torch.Generator().manual_seed(4)) / 3
        labels = bank[0]
    batch = drawn(objective)
    total, parts = objective.loss(batch)
    expected = literal_loss(config, objective, batch, labels)
    torch.testing.assert_close(total, expected)
    assert set(parts) == {"loss", "task", "unimodal"}
    assert_same_gradients(objective, total, expected)


def test_the_projects_task_loss_is_another() -> None:
    for task in ("regression", "emotions-binary"):
        objective = objective_of(config_of("selfmm", task, MODEL, task="project"), split_of(task))
        batch = drawn(objective)
        logits, _ = objective.module.network.predict(batch.inputs)
        _, parts = objective.loss(batch)
        torch.testing.assert_close(parts["task"], objective.module.task.loss(logits, batch.targets).detach())


class ByHand:
    """The labels and what they are made of, row by row, from the equations."""

    def __init__(self, config: Config, split: Split) -> None:
        self.config = config
        self.y = [sign(t, config) for t in config.task.targets(split.labels).tolist()]
        self.labels = [[list(y) for _ in range(3)] for y in self.y]
        self.stored: dict[int, list[torch.Tensor | None]] = {}

    def label(self, row: int, head: int, problem: int) -> float:
        return self.y[row][problem] if head == 0 else self.labels[row][head - 1][problem]

    def centre(self, head: int, problem: int, positive: bool) -> torch.Tensor | None:
        members = [
            features[head]
            for row, features in self.stored.items()
            if features[head] is not None and (self.label(row, head, problem) >= 0) == positive
        ]
        return sum(members) / len(members) if members else None

    def step(self, epoch: int, features: dict[int, list[torch.Tensor | None]]) -> None:
        """`features`: G_f, G_L, G_A, G_V of each row, None of what it lacks; the epoch counts from 1."""
        limit, problems = 3.0 if self.config.task.is_regression else 1.0, range(len(self.y[0]))
        centres = {(h, p, c): self.centre(h, p, c) for h in range(4) for p in problems for c in (False, True)}

        def delta(row: int, head: int, p: int) -> torch.Tensor | None:
            g, negative, positive = features[row][head], centres[head, p, False], centres[head, p, True]
            if g is None or negative is None or positive is None:
                return None
            to_negative, to_positive = ((g - c).square().sum().sqrt() for c in (negative, positive))
            return (to_negative - to_positive) / (to_positive + NEAR)

        moved = {}
        for row in features if epoch > 1 else ():
            for m in range(3):
                for p in problems:
                    d_f, d_m, y = delta(row, 0, p), delta(row, m + 1, p), self.y[row][p]
                    if d_f is not None and d_m is not None:
                        new = 0.5 * y * d_m / (d_f + NEAR) + 0.5 * (y + d_m - d_f)
                        share = 2 / (epoch + 1)
                        moved[row, m, p] = (1 - share) * self.labels[row][m][p] + share * min(limit, max(-limit, new))
        for (row, m, p), value in moved.items():
            self.labels[row][m][p] = float(value)
        for row, own in features.items():
            before = self.stored.get(row, [None] * 4)
            self.stored[row] = [new if new is not None else old for new, old in zip(own, before, strict=True)]


BATCHES = ((0, [3, 0, 2, 1, 7, 11]), (0, [4, 5, 6, 8, 9, 10]), (1, [0, 4, 7, 2, 12, 3]), (2, [1, 0, 13, 4, 8, 5]))
"""Epoch and rows of some steps: two of the first epoch, in which labels stay, one of the second, one of the third."""


def labels_after(config: Config, split: Split, steps: int = len(BATCHES), rank: int | None = None) -> Objective:
    objective = objective_of(config, split)
    for epoch, rows in BATCHES[:steps]:
        own = rows if rank is None else rows[rank * BATCH // WORLD : (rank + 1) * BATCH // WORLD]
        batch = drawn(objective, epoch, torch.tensor([own]))
        objective.module(batch)
        with torch.no_grad():
            objective.module.after_step(batch)
    return objective


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("task", TASKS)
def test_labels_are_those_computed_by_hand(task: str, missing: bool) -> None:
    config, split = config_of("selfmm", task, MODEL), split_of(task)
    config = config.model_copy(update={"missing": config.missing.model_copy(update={"enabled": missing})})
    expected, objective = ByHand(config, split), objective_of(config, split)
    for epoch, rows in BATCHES:
        batch = drawn(objective, epoch, torch.tensor([rows]))
        features = {}
        for row, sample in zip(rows, samples(batch.inputs), strict=True):
            fused, of_modalities, _ = literal_features(objective.module, sample)
            there = [any(has(sample, m) for m in range(3)), *(has(sample, m) for m in range(3))]
            made = (g.detach() for g in (fused, *of_modalities))
            features[row] = [g if is_there else None for g, is_there in zip(made, there, strict=True)]
        expected.step(epoch + 1, features)
        objective.module(batch)
        with torch.no_grad():
            objective.module.after_step(batch)
        labels = objective.module.labels.values[0].double()
        torch.testing.assert_close(labels, torch.tensor(expected.labels, dtype=torch.float64), rtol=1e-3, atol=1e-4)
        for head, centres in enumerate(objective.module.centres):
            for p in range(config.task.problems):
                for positive in (False, True):
                    centre = expected.centre(head, p, positive)
                    assert (centre is not None) == bool(centres.counts.values[0, p, int(positive)])
                    if centre is not None:
                        mean = centres.sums.values[0, p, int(positive)] / centres.counts.values[0, p, int(positive)]
                        torch.testing.assert_close(mean.double(), centre, rtol=1e-4, atol=1e-5)
    own = torch.tensor(expected.y)
    assert (labels != own.unsqueeze(1)).any(), "no label moved"


def test_labels_do_not_move_where_a_class_has_no_row() -> None:
    split = split_of()
    split.labels = abs(split.labels)
    objective = labels_after(config_of("selfmm", model=MODEL), split)
    assert torch.equal(objective.module.labels.values[0], torch.tensor(split.labels)[:, None, None].expand(-1, 3, 1))


def test_rebuilt_sums_are_those_that_were_kept() -> None:
    objective = labels_after(config_of("selfmm", "emotions-binary", MODEL), split_of("emotions-binary"))
    before = [(c.sums.values.clone(), c.counts.values.clone()) for c in objective.module.centres]
    objective.module.end_epoch(2)
    for centres, (sums, counts) in zip(objective.module.centres, before, strict=True):
        torch.testing.assert_close(centres.sums.values, sums, rtol=1e-4, atol=1e-5)
        assert torch.equal(centres.counts.values, counts)
        assert counts.sum()


def test_two_equal_distances_say_nothing() -> None:
    """`0 / 0` is no label."""
    module = objective_of(config_of("selfmm", model=MODEL), split_of()).module
    zero = torch.zeros(1, 1, 1)
    moved = module.moved(zero, zero + 2, zero, zero - NEAR, torch.tensor(3))
    assert moved.isnan().all() or (moved - 1).abs().max() < 1e-6
    centres = Centres(2, 1)
    centres.make_room(3)
    _, exist = centres.nearness(torch.zeros(1, 1, 2))
    assert not exist.any()


def test_classes_without_a_sign_are_refused() -> None:
    raw = small_config_of("selfmm", "none.h5", BATCH)
    raw["train"]["task"] = "classification-3"
    with pytest.raises(UserError, match=r"loss\.ulgm: true, but the classes of classification-3 have no sign"):
        parse_config(raw)
    raw["loss"]["ulgm"] = False
    assert parse_config(raw).task.outputs == 3


def work(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    found = {}
    for task in TASKS:
        objective = labels_after(config_of("selfmm", task, MODEL), split_of(task), rank=rank)
        half = ROWS.chunk(WORLD, dim=1)[rank]
        total, _ = objective.loss(drawn(objective, 3, half))
        total.backward()
        gradients = {}
        for name, p in objective.module.named_parameters():
            dist.all_reduce(p.grad)
            gradients[name] = p.grad / WORLD
        found[task] = dict(objective.module.named_buffers()), gradients
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_keep_the_tables_of_one(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, (port, tmp_path), WORLD)
    of_two = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    for task in TASKS:
        objective = labels_after(config_of("selfmm", task, MODEL), split_of(task))
        tables = dict(objective.module.named_buffers())
        objective.loss(drawn(objective, 3))[0].backward()
        for found, gradients in (of_rank[task] for of_rank in of_two):
            torch.testing.assert_close(found, tables, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(gradients, {n: p.grad for n, p in objective.module.named_parameters()})
        for name, table in of_two[0][task][0].items():
            assert torch.equal(table, of_two[1][task][0][name]), name


def test_a_run_that_is_resumed_has_the_tables_of_one_that_was_not(
    train_tiny: Callable[..., Path], tiny_store: Path, tmp_path: Path
) -> None:
    raw = small_config_of("selfmm", tiny_store, 8)
    raw["train"] |= {"epochs": 3, "seeds": [1], "log_every": 1}
    expected = train_tiny(raw, tmp_path / "expected")
    with pytest.raises(Interrupted):
        train_tiny(raw, tmp_path / "run", stop_after=8)  # within the second epoch
    resumed = train_tiny(raw, tmp_path / "run", resume=True)
    states = [saved_state(run) for run in (expected, resumed)]
    assert {"labels.values", "centres.0.features.values", "centres.3.sums.values"} <= states[0].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name
    assert (states[0]["labels.values"][:, :, :1] != states[0]["labels.values"]).any(), "no label moved"


def saved_state(run: Path) -> dict[str, torch.Tensor]:
    """The module's in the newest checkpoint."""
    (file,) = (run / "seed_1" / "checkpoints").glob("*_end/mp_rank_00_model_states.pt")
    state: dict[str, torch.Tensor] = torch.load(file, weights_only=False)["module"]
    return state


@pytest.mark.parametrize("mode", ["fwdbwd", "step"])
def test_a_replayed_step_moves_the_labels_alike(
    mode: str, train_tiny: Callable[..., Path], tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = small_config_of("selfmm", tiny_store, 8)
    raw["train"] |= {"epochs": 2, "seeds": [1], "log_every": 1}
    expected = saved_state(train_tiny(raw, tmp_path / "expected"))
    monkeypatch.setattr(step._Replayed, "capture", FakeCapture)
    monkeypatch.setattr(trainer, "graph_mode", lambda *_: (mode, None))
    replayed = saved_state(train_tiny(raw, tmp_path / mode))
    for name in ("labels.values", "centres.0.features.values", "centres.2.sums.values", "network.head.weight"):
        torch.testing.assert_close(replayed[name], expected[name], rtol=1e-4, atol=1e-5)
