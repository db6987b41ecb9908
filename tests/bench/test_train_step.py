"""The benchmark of whole steps: contenders agree, a wrong one is refused, every figure is there."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import contenders, observe, records, report, rounds, scaling, speed_plots, train_step
from bench.agreement import assert_agreement
from bench.workload import Shape, random_dataset, shape_of
from fastmmkd.blocks import Config
from fastmmkd.config import parse_config
from fastmmkd.errors import UserError
from tests.engine.fake_capture import FakeCapture

CPU, SHAPE = torch.device("cpu"), Shape(4, (5, 4, 3))
Raw = Callable[[str, Path], dict]

pytestmark = pytest.mark.usefixtures("process_state")


@pytest.fixture(params=["umdf", "corrkd", "hrlf"])
def config(request: pytest.FixtureRequest, tiny_config: dict, distilled_config_of: Raw, tiny_store: Path) -> Config:
    return parse_config(tiny_config if request.param == "umdf" else distilled_config_of(request.param, tiny_store))


def build(config: Config, *names: str, dtype: torch.dtype = torch.float32) -> dict[str, contenders.Contender]:
    dataset = random_dataset(config, SHAPE, 2 * config.train.batch_size)
    return {name: contenders.build(name, config, dataset, 2, CPU, dtype) for name in names}


def test_in_double_precision_the_fused_attention_is_the_reference(config: Config) -> None:
    reference, fused = build(config, contenders.REFERENCE, contenders.SDPA, dtype=torch.float64).values()
    (_, expected), (_, found) = reference.first(), fused.first()
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_all_contenders_agree(config: Config) -> None:
    names = [name for name in contenders.names(config, CPU) if name != contenders.COMPILED]
    found = assert_agreement(build(config, *names), torch.float32)
    assert set(found) == {*names} - {contenders.REFERENCE}
    assert max(found.values()) < 1e-3


def test_another_gradient_is_refused(config: Config) -> None:
    built = build(config, contenders.REFERENCE, contenders.OURS)
    parameter = next(built[contenders.OURS].module.parameters())
    parameter.register_hook(lambda grad: grad * 1.5)
    with pytest.raises(UserError, match="ours: its first gradients differ from those of reference"):
        assert_agreement(built, torch.float32)


def test_another_loss_is_refused(config: Config) -> None:
    built = build(config, contenders.REFERENCE, contenders.OURS)
    forward = built[contenders.OURS].forward
    built[contenders.OURS].forward = lambda drawn, taught: 1.01 * forward(drawn, taught)
    with pytest.raises(UserError, match="ours: its first loss is "):
        assert_agreement(built, torch.float32)


def test_a_replayed_step_is_the_eager_one(config: Config) -> None:
    (eager,) = build(config, contenders.OURS).values()
    step = build(config, contenders.OURS)[contenders.OURS].step
    replayed = contenders.Graphed(config, step, FakeCapture())
    before, _ = eager.first()
    for i in range(4):
        for contender in (eager, replayed):
            contender(i, rounds.Clock(CPU))
    (expected, _), (found, _) = eager.first(), replayed.first()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert abs(before - expected) > 100 * abs(found - expected)


def test_contenders_take_turns() -> None:
    taken = []

    def contender(name: str) -> rounds.Step:
        def step(i: int, clock: rounds.Clock) -> None:
            taken.append((i, name))
            clock.mark("a")
            clock.mark("b")

        return step

    found = rounds.time_all({name: contender(name) for name in "xy"}, 2, CPU, warm_up=1)
    assert taken == [(0, "x"), (0, "y"), (1, "y"), (1, "x"), (2, "x"), (2, "y")]
    for stages in found.values():
        assert [len(seconds) for seconds in stages.values()] == [2, 2, 2]
        np.testing.assert_allclose(stages["a"] + stages["b"], stages[rounds.WHOLE])


def test_operators_and_memory_are_counted() -> None:
    x = torch.ones(1000, requires_grad=True)

    def run() -> None:
        (x * 2).exp().sum().backward()
        x.grad = None

    with torch.no_grad():
        assert observe.operator_calls(lambda: (x * 2).exp().sum()) == 3
    assert observe.operator_calls(run) > 6
    assert 2 * 4000 < observe.peak_memory(run, CPU)["bytes"] < 5 * 4000


def test_shapes_come_from_the_name_of_the_data(config: Config) -> None:
    assert shape_of(config) == Shape(50, (300, 74, 35))
    assert shape_of(config, 7, "3,2,1") == Shape(7, (3, 2, 1))
    with pytest.raises(UserError, match="expected three widths"):
        shape_of(config, dims="3,2")


class TestCommands:
    @pytest.fixture(autouse=True)
    def elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(records, "FOLDER", tmp_path / "speed")
        monkeypatch.setattr(speed_plots, "FOLDER", tmp_path / "pictures")

    @pytest.fixture
    def arguments(self, tiny_store: Path, distilled_config_of: Raw, tmp_path: Path) -> list[str]:
        path = tmp_path / "tiny.json"
        path.write_text(json.dumps(distilled_config_of("corrkd", tiny_store)))
        return ["--config", str(path), "--frames", "4", "--dims", "5,4,3", "--threads", "1", "--record"]

    def test_a_step_is_recorded_and_shown(self, arguments: list[str], tmp_path: Path) -> None:
        assert train_step.main([*arguments, "--runs", "2", "--variants", "reference,ours,ours x seeds"]) == 0
        ((kind, _), record) = next(iter(records.newest().items()))
        assert kind == "train_step_tiny"
        assert [(v["name"], v["models"]) for v in record["variants"]] == [
            ("reference", 1),
            ("ours", 1),
            ("ours x seeds", 5),
        ]
        reference, ours, _ = record["variants"]
        assert list(ours["stages ms"]) == ["draw", "teacher", "forward", "backward", "optimiser"]
        assert ours["operator calls"] < reference["operator calls"]
        assert ours["energy"] == {"absent": "no NVIDIA device"}
        assert ours["launches"] is None
        names = [engine["name"] for engine in record["engine"]["engines"]]
        assert names[:3] == ["bare loop", "as configured", "ZeRO 0"]
        parts = report.parts()
        assert "| tiny (8 x 4) " in parts["speed"]
        assert "| no clipping " in parts["train_steps"]
        speed_plots.draw_all()
        (picture,) = (tmp_path / "pictures").iterdir()
        assert f"/{picture.name})" in parts["train_steps"]

    def test_growth_is_recorded_and_shown(self, arguments: list[str], tmp_path: Path) -> None:
        assert scaling.main([*arguments, "--runs", "1", "--axis", "seeds", "--values", "1,2"]) == 0
        (record,) = records.newest().values()
        assert record["kind"] == "scaling_seeds_tiny"
        assert [(point["value"], point["samples"]) for point in record["points"]] == [(1, 8), (2, 16)]
        speed_plots.draw_all()
        assert speed_plots.path_of(record).exists()
        assert f"/{speed_plots.path_of(record).name})" in report.parts()["scaling"]

    def test_unknown_contenders_are_refused(self, arguments: list[str]) -> None:
        with pytest.raises(UserError, match="--variants plain"):
            train_step.main([*arguments, "--variants", "plain"])
