"""The benchmark of whole steps: in turns, recorded as it goes, whatever ends it; every figure is there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench import epoch, heats, lineup, observe, records, report, rounds, scaling, speed, speed_plots, train_step
from bench.agreement import Agreement
from bench.contenders import Contender, Graphed
from bench.padding import PADDED, CroppedSplit
from bench.variants import AS_TRAINED, CROPPED, GRAPHED, JAGGED, OURS, OURS_COMPILED, REFERENCE, SDPA, SEEDS
from bench.workload import FULL, Shape, lengths_of, random_dataset, shape_of
from fastmmkd.blocks import Config
from fastmmkd.data.dataset import Dataset
from fastmmkd.engine.step import untrained_objective
from fastmmkd.errors import UserError
from tests.engine.fake_capture import FakeCapture

CPU = torch.device("cpu")
Raw = Callable[[str, Path], dict]
Build = Callable[..., dict[str, Contender]]

pytestmark = pytest.mark.usefixtures("process_state")


@pytest.mark.parametrize("compiled", [False, True])
def test_a_replayed_step_is_the_eager_one(
    compiled: bool, config: Config, build: Build, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lineup, "forget_compiled", lambda: None)  # it changes the process
    (eager,) = build(OURS).values()
    step = untrained_objective(config, dataset, [1], CPU, torch.float32)
    forward = lineup.compiled(step, backend="eager") if compiled else None
    replayed = Graphed(config, step, FakeCapture(), forward=forward)
    before, _ = eager.first()
    Agreement(config, dataset, CPU, torch.float32).check(replayed)  # takes the first step, from the same weights
    eager(0, rounds.Clock(CPU))
    for i in range(1, 4):
        for contender in (eager, replayed):
            contender(i, rounds.Clock(CPU))
    (expected, _), (loss, _) = eager.first(), Contender.first(replayed)
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert abs(before - expected) > 100 * abs(loss - expected)


def test_contenders_take_turns() -> None:
    taken = []

    def contender(name: str) -> rounds.Step:
        def step(i: int, clock: rounds.Clock) -> None:
            taken.append((i, name))
            clock.mark("a")
            clock.mark("b")

        return step

    times = rounds.time_all({name: contender(name) for name in "xy"}, 2, CPU, warm_up=1)
    assert taken == [(0, "x"), (0, "y"), (1, "y"), (1, "x"), (2, "x"), (2, "y")]
    for stages in times.values():
        assert [len(seconds) for seconds in stages.values()] == [2, 2, 2]
        np.testing.assert_allclose(stages["a"] + stages["b"], stages[rounds.WHOLE])


def test_who_fails_takes_no_more_turns() -> None:
    failures = []

    def fine(i: int, clock: rounds.Clock) -> None:
        clock.mark("a")

    def failing(i: int, clock: rounds.Clock) -> None:
        if i == 2:
            raise RuntimeError("out of memory")
        clock.mark("a")

    times = rounds.time_all(
        {"x": failing, "y": fine}, 5, CPU, warm_up=1, failed=lambda name, error: failures.append((name, str(error)))
    )
    assert failures == [("x", "out of memory")]
    assert {name: len(stages["a"]) for name, stages in times.items()} == {"y": 5}
    assert rounds.time_all({"x": failing}, 5, CPU, failed=lambda *args: None, enough=lambda times: not times["x"]) == {}
    with pytest.raises(RuntimeError, match="out of memory"):
        rounds.time_all({"x": failing}, 5, CPU)
    few = rounds.time_all({"y": fine}, 5, CPU, enough=lambda times: len(times["y"]["a"]) == 2)
    assert len(few["y"]["a"]) == 2


def test_which_contenders_there_are(config: Config) -> None:
    for_cuda = lineup.names(config, torch.device("cuda"))
    assert ("plain + SDPA" in for_cuda) == (config.method == "umdf")
    assert set(lineup.names(config, CPU)) < set(for_cuda)
    assert set(lineup.names(config, CPU)) >= {OURS, AS_TRAINED, REFERENCE, SDPA, CROPPED, JAGGED}
    text = "compile, ours, compiled, in a graph,reference, cropped,ours + graph, bare loop,ours"
    assert lineup.choose(text, for_cuda) == [OURS, GRAPHED, CROPPED, OURS_COMPILED, "compile"]
    with pytest.raises(UserError, match="--variants compiled: no such contender here; expected some of ours; as tr"):
        lineup.choose("ours, compiled", for_cuda)
    assert set(for_cuda) <= set(lineup.SHOWN)


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
    assert shape_of(config) == Shape(50, (300, 74, 35), "mosei")
    assert shape_of(config, 7, "3,2,1", "mosi") == Shape(7, (3, 2, 1), "mosi")
    with pytest.raises(UserError, match="expected three widths"):
        shape_of(config, dims="3,2")


def test_lengths_are_those_of_a_data_set() -> None:
    mean = {lengths: lengths_of(Shape(50, (), lengths), 4000).mean() for lengths in ("mosi", "mosei", FULL)}
    assert mean == {"mosi": pytest.approx(12.8, abs=0.4), "mosei": pytest.approx(20.2, abs=0.6), FULL: 50}
    stretched = lengths_of(Shape(200, (), "mosei"), 4000)
    assert stretched.mean() == pytest.approx(81, abs=2)
    assert (stretched.max(), stretched[0]) == (200, 200)


def test_who_pads_holds_more_rows(config: Config) -> None:
    dataset = random_dataset(config, Shape(9, (5, 4, 3), "mosei"), 16)
    lengths = dataset.splits["train"].lengths[:, 0]
    rows = np.argsort(lengths)[None, :8]
    longest = int(lengths[rows].max())
    assert longest < 9
    for resident, expected in ((None, lengths[rows].sum()), (PADDED, 8 * 9), (CroppedSplit, 8 * longest)):
        how = {"resident": resident} if resident else {}
        objective = untrained_objective(config, dataset, [1], CPU, torch.float32, **how)
        batch = objective.draw(torch.from_numpy(rows), torch.tensor(0))
        (layout, *_) = batch.layouts
        assert layout.rows == expected
        assert layout.is_uniform == bool(resident)
        assert sum(real.sum() for real in batch.real) == 3 * lengths[rows].sum()


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

    def test_a_step_is_recorded_and_shown(
        self, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert train_step.main([*arguments, "--runs", "2"]) == 0
        ((kind, _), record) = next(iter(records.newest().items()))
        assert kind == "train_step_tiny_mosei"
        assert (record["workload"]["lengths"], record["workload"]["frames"]) == ("mosei", 4)
        assert [v["name"] for v in record["variants"]] == [REFERENCE, SDPA, CROPPED, OURS, AS_TRAINED]
        assert (record["excluded"], record["skipped"]) == ({}, {})
        reference, *_, ours, trained = record["variants"]
        assert list(ours["stages ms"]) == ["draw", "teach", "loss", "backward", "update"]
        assert ours["operator calls"] < reference["operator calls"]
        assert ours["energy"] == {"absent": "no NVIDIA device"}
        assert ours["launches"] is None
        assert (trained["precision"], trained["train.graph"], trained["said"]) == ("fp32", "off", [])
        assert all(v["gradient error"] < 1e-4 for v in record["variants"])
        names = [engine["name"] for engine in record["engine"]["engines"]]
        assert names[:3] == ["bare loop", "as configured", "ZeRO 0"]
        parts = report.parts()
        assert "| tiny (8 x 3 of 4) " in parts["speed"]
        assert "| no clipping " in parts["train_steps"]
        assert "tiny, batch 8, 3 of 4 frames of 5 + 4 + 3, mosei's lengths:" in parts["train_steps"]
        speed_plots.draw_all()
        (picture,) = (tmp_path / "pictures").iterdir()
        assert f"/{picture.name})" in parts["train_steps"]
        last = capsys.readouterr().out.splitlines()[-1]
        assert records.read(Path(last)) == record

    def test_several_models_are_timed_beside_ours(self, arguments: list[str]) -> None:
        given = [*arguments, "--runs", "2", "--no-engine", "--variants", "ours x seeds,ours"]
        assert train_step.main(given) == 0
        (record,) = records.newest().values()
        ours, seeds = record["variants"]
        assert [(v["name"], v["models"]) for v in (ours, seeds)] == [(OURS, 1), (SEEDS, 5)]
        assert seeds["ours ms"] != ours["ours ms"]
        assert train_step.times_as_long(record["variants"]) == {
            OURS: 1.0,
            SEEDS: seeds["step ms"]["p50"] / 5 / seeds["ours ms"],
        }

    @pytest.mark.parametrize(("victim", "code"), [(OURS, 1), (SDPA, 0)])
    def test_who_disagrees_is_excluded_alone(
        self, victim: str, code: int, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        make = lineup.build

        def build(name: str, *args: Any) -> Contender:
            contender = make(name, *args)
            if name == victim:
                for parameter in contender.module.parameters():
                    parameter.register_hook(lambda grad: 1.5 * grad)
            return contender

        monkeypatch.setattr(lineup, "build", build)
        given = [*arguments, "--runs", "1", "--no-engine", "--variants", "ours,reference,reference + SDPA"]
        assert train_step.main(given) == code
        (record,) = records.newest().values()
        assert {v["name"] for v in record["variants"]} == {OURS, REFERENCE, SDPA} - {victim}
        assert record["excluded"][victim].startswith("Disagreement: its first gradient")
        assert f"{victim}: excluded, Disagreement: its first gradient" in capsys.readouterr().out
        report.parts()
        speed_plots.draw_all()

    def test_who_raises_is_excluded_with_its_traceback(
        self, arguments: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def refused(*args: Any) -> Any:
            raise ImportError("no module named deepspeed\nat all")

        monkeypatch.setattr(lineup, "AsTrained", refused)
        assert train_step.main([*arguments, "--runs", "1", "--no-engine", "--variants", "as trained,ours"]) == 1
        (record,) = records.newest().values()
        assert record["excluded"] == {AS_TRAINED: "ImportError: no module named deepspeed"}
        assert "in refused" in record["tracebacks"][AS_TRAINED]
        assert [v["name"] for v in record["variants"]] == [OURS]

    def test_what_there_is_no_time_for_is_skipped(
        self, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(heats.Heats, "over", property(lambda self: bool(self.variants)))
        assert train_step.main([*arguments, "--runs", "9", "--variants", "ours,ours x seeds"]) == 0
        (record,) = records.newest().values()
        assert record["skipped"] == {SEEDS: "no time left", "engine": "no time left"}
        (ours,) = record["variants"]
        assert ours["runs"] == 9
        assert "ours x seeds: no time left" in capsys.readouterr().out

    def test_without_any_time_there_is_an_empty_record(self, arguments: list[str]) -> None:
        assert train_step.main([*arguments, "--seconds", "0.001"]) == 0
        (record,) = records.newest().values()
        assert set(record["skipped"]) == {OURS, REFERENCE, SDPA, CROPPED, AS_TRAINED, "engine"}
        report.parts()
        speed_plots.draw_all()

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
    def test_what_was_measured_stays_when_it_is_stopped(
        self, number: int, arguments: list[str], tmp_path: Path
    ) -> None:
        code = (
            "from pathlib import Path; from bench import entry, records, train_step; import sys;"
            f"records.FOLDER = Path({str(tmp_path / 'speed')!r}); entry.run(train_step.main)"
        )
        given = ["--no-engine", "--runs", "1000000", "--variants", "ours,reference"]
        process = subprocess.Popen([sys.executable, "-c", code, *arguments, *given], stdout=subprocess.PIPE, text=True)
        written: list[Path] = []
        for _ in range(3000):
            written = [path for path in tmp_path.glob("speed/*/*.json") if records.read(path)["variants"]]
            if written or process.poll() is not None:
                break
            time.sleep(0.1)
        os.kill(process.pid, number)
        out, _ = process.communicate(timeout=60)
        (path,) = written
        assert {v["name"] for v in records.read(path)["variants"]} == {OURS, REFERENCE}
        if number != signal.SIGKILL:
            assert process.returncode == 130
            assert out.splitlines()[-1] == str(path)
            assert "| ours " in out

    def test_growth_is_recorded_and_shown(self, arguments: list[str], tmp_path: Path) -> None:
        assert scaling.main([*arguments, "--runs", "1", "--axis", "seeds", "--values", "1,2"]) == 0
        (record,) = records.newest().values()
        assert record["kind"] == "scaling_seeds_tiny_mosei"
        assert [(point["value"], point["samples"]) for point in record["points"]] == [(1, 8), (2, 16)]
        speed_plots.draw_all()
        assert speed_plots.path_of(record).exists()
        assert f"/{speed_plots.path_of(record).name})" in report.parts()["scaling"]

    def test_real_lengths_come_before_full_ones(self, arguments: list[str]) -> None:
        given = [*arguments, "--runs", "1", "--no-engine", "--variants", "ours,reference"]
        for lengths in (FULL, "mosei"):
            assert train_step.main([*given, "--lengths", lengths]) == 0
        newest = records.newest()
        (full,) = (record for (kind, _), record in newest.items() if kind.endswith(FULL))
        text = report.parts()["whole_steps"]
        assert text.index(speed.REAL) < text.index("| tiny (8 x 3 of 4) ") < text.index(speed.AS_LONG)
        assert text.index(speed.AS_LONG) < text.index("| tiny (8 x 4) ")
        before_lengths = {key: value for key, value in full["workload"].items() if key != "lengths"}
        records.put(full | {"kind": "train_step_tiny", "workload": before_lengths})
        assert records.newest() == newest
        parts = report.parts()
        assert parts["whole_steps"] == text
        assert "| tiny (8 x 3 of 4) " in parts["speed"]
        assert "| tiny (8 x 4) " not in parts["speed"]

    def test_an_epoch_is_timed_with_its_validation(
        self, arguments: list[str], tiny_store: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        given = [*arguments[:2], "--data", str(tiny_store), "--epochs", "2", "--record"]
        assert epoch.main(given) == 0
        (record,) = records.newest().values()
        assert (record["kind"], record["samples"], record["validation samples"]) == ("epoch_tiny", 40, 12)
        for whole, *parts in zip(*(record["seconds"][x] for x in ("epoch", "training", "validation")), strict=True):
            assert min(parts) > 0
            assert sum(parts) < whole
        assert len(record["seconds"]["epoch"]) == 2
        assert epoch.render(record) in report.parts()["epochs"]
        with pytest.raises(UserError, match="no synthetic data are like it; expected --data"):
            epoch.main([*arguments[:2], "--set", "data.path=ict_mmmo.h5"])

    def test_bad_arguments_are_refused(self, arguments: list[str]) -> None:
        with pytest.raises(UserError, match="--variants plain"):
            train_step.main([*arguments, "--variants", "plain"])
        with pytest.raises(UserError, match="expected more than 0"):
            train_step.main([*arguments, "--seconds", "0"])
