"""Several seeds at once: seed by seed what separate runs give; exact resumption; what may be mixed and what not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_records import assert_same, parameters, records, without_timings

import fastmmkd
from fastmmkd.blocks import Config
from fastmmkd.cli import main
from fastmmkd.config import parse_config
from fastmmkd.data.dataset import Dataset
from fastmmkd.engine import device, run, trainer
from fastmmkd.engine.clipping import clip_models
from fastmmkd.engine.flat_adam import FlatAdam
from fastmmkd.engine.groups import together
from fastmmkd.engine.phases import begin_phase, phases_of
from fastmmkd.errors import Interrupted, UserError
from fastmmkd.methods.method import TEACHER_SEEDS
from fastmmkd.nn.models import model_state, stack_models
from tests.engine.fake_capture import NoHostSync
from tests.handmade import network_of, student_of

Train = Callable[..., Path]
SEEDS = [3, 1, 2]
METHODS = ["umdf", "corrkd", "hrlf"]


@pytest.fixture(scope="module")
def raw_of(
    tiny_store: Path, tiny_config_of: Callable[[Path], dict], distilled_config_of: Callable[[str, Path], dict]
) -> Callable[[str], dict]:
    """`raw_of(method)`: three seeds together, two epochs of each phase, every step clipped."""

    def make(method: str) -> dict:
        raw = tiny_config_of(tiny_store) if method == "umdf" else distilled_config_of(method, tiny_store)
        raw["train"] |= {"seeds": SEEDS, "epochs": 2, "select": "mae", "together": True}
        raw["deepspeed"]["gradient_clipping"] = 0.2
        raw["deepspeed"]["optimizer"]["params"]["eps"] = (
            1e-3  # without it Adam blows up gradients that are mere rounding
        )
        return raw

    return make


def separately(raw: dict) -> dict:
    return raw | {"train": raw["train"] | {"together": False}}


@pytest.fixture(scope="module")
def at_once(train_tiny: Train, raw_of: Callable[[str], dict], tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """`at_once(method)`: the folder of a finished run; shared, so do not change it."""
    made: dict[str, Path] = {}

    def make(method: str) -> Path:
        if method not in made:
            made[method] = train_tiny(raw_of(method), tmp_path_factory.mktemp("together") / method)
        return made[method]

    return make


def files(folder: Path) -> set[Path]:
    """What a folder holds, but for checkpoints and the names of TensorBoard's files."""
    paths = {path.relative_to(folder) for path in folder.rglob("*") if "tfevents" not in path.name}
    return {path for path in paths if "checkpoints" not in path.parts}


def assert_close_records(lines: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [(r["epoch"], r["step"]) for r in lines] == [(r["epoch"], r["step"]) for r in expected]
    for a, b in zip(lines, expected, strict=True):
        assert a["train"] == pytest.approx(b["train"], rel=1e-5, abs=1e-7)
        assert a["valid"] == pytest.approx(b["valid"], rel=1e-4, abs=1e-4)
        assert a["engine"]["lr"] == b["engine"]["lr"]


def evaluated(run: Path, seed: int) -> list[dict[str, float | None]]:
    evaluation = json.loads((run / f"seed_{seed}" / "evaluation.json").read_text())
    return [entry["metrics"] for entry in (*evaluation["conditions"].values(), *evaluation["sweep"])]


def pointer(run: Path, phase: str = "", group: str = "together_*") -> dict[str, Any]:
    (folder,) = run.glob(group)
    return json.loads((folder / phase / "checkpoints" / "latest.json").read_text())


def group_state(run: Path, phase: str) -> dict[str, Any]:
    """Everything that was saved of the group: weights, optimiser, where each seed stands."""
    (group,) = run.glob("together_*")
    saved, folder = pointer(run, phase), group / phase / "checkpoints"
    del saved["files"]
    for seed in saved["seeds"]:
        del seed["seconds"]
    return saved | {
        file.name: torch.load(file, weights_only=False) for file in sorted((folder / saved["tag"]).iterdir())
    }


def assert_same_group(a: Path, b: Path, phases: tuple[str, ...]) -> None:
    for phase in phases:
        assert_same(group_state(a, phase), group_state(b, phase))
        for seed in SEEDS:
            assert_same(parameters(a, seed, phase), parameters(b, seed, phase))
            assert without_timings(records(a, seed, phase)) == without_timings(records(b, seed, phase))
    for seed in SEEDS:
        assert (a / f"seed_{seed}" / "evaluation.json").read_text() == (
            b / f"seed_{seed}" / "evaluation.json"
        ).read_text()


@pytest.mark.parametrize("method", METHODS)
def test_every_seed_is_that_of_a_separate_run(
    train_tiny: Train, raw_of: Callable[[str], dict], at_once: Callable[[str], Path], tmp_path: Path, method: str
) -> None:
    joint, alone = at_once(method), train_tiny(separately(raw_of(method)), tmp_path / "alone")
    for seed in SEEDS:
        assert files(joint / f"seed_{seed}") == files(alone / f"seed_{seed}")
        for phase in ("",) if method == "umdf" else ("", "teacher"):
            assert_close_records(records(joint, seed, phase), records(alone, seed, phase))
            ours, theirs = parameters(joint, seed, phase), parameters(alone, seed, phase)
            assert ours.keys() == theirs.keys()
            for name in ours:
                torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)
        for a, b in zip(evaluated(joint, seed), evaluated(alone, seed), strict=True):
            assert a == pytest.approx(b, rel=1e-3, abs=1e-3)
        predictor = fastmmkd.load(joint, seed)
        assert torch.equal(predictor.module.state_dict()["head.weight"], parameters(joint, seed)["head.weight"])
    if method != "umdf":
        said = [json.loads((r / "seed_2" / "teacher" / "teacher.json").read_text()) for r in (joint, alone)]
        assert said[0] == said[1]


@pytest.mark.parametrize("method", METHODS)
def test_each_model_starts_from_the_bits_of_its_seed(
    raw_of: Callable[[str], dict], tiny_dataset: Callable[..., Dataset], method: str
) -> None:
    config, dataset, group = parse_config(raw_of(method)), tiny_dataset(), together((5, 0), Path("none"))
    dims = dataset.feature_dims
    for i, seed in enumerate((5, 0)):
        for spec in phases_of(config):
            earlier = {"teacher": network_of(config, dims, seed=1)}
            stack = begin_phase(spec, config, dataset, group, earlier).module
            own = TEACHER_SEEDS + seed if spec.name == "teacher" else seed
            make = student_of if spec.name == "student" else network_of
            assert_same(model_state(stack, i), dict(make(config, dims, own).state_dict()))


class TestResumption:
    @pytest.mark.parametrize(
        ("method", "stops"),
        [
            ("umdf", [3]),
            ("umdf", [5, 1]),  # after an epoch's last step, twice
            ("corrkd", [7, 3, 6]),  # in the teachers' phase, at its end, among the students
            ("hrlf", [12]),
        ],
    )
    def test_an_interrupted_run_continues_exactly(
        self,
        train_tiny: Train,
        raw_of: Callable[[str], dict],
        at_once: Callable[[str], Path],
        tmp_path: Path,
        method: str,
        stops: list[int],
    ) -> None:
        folder = tmp_path / "run"
        for attempt, stop in enumerate(stops):
            with pytest.raises(Interrupted):
                train_tiny(raw_of(method), folder, resume=attempt > 0, stop_after=stop)
        train_tiny(raw_of(method), folder, resume=True)
        assert_same_group(folder, at_once(method), ("",) if method == "umdf" else ("teacher", ""))

    def test_finished_seeds_are_kept_and_others_form_a_group_of_their_own(
        self, train_tiny: Train, raw_of: Callable[[str], dict], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        raw, folder = raw_of("umdf"), tmp_path / "run"
        raw["train"] |= {"epochs": 1, "seeds": [1], "together": False}
        train_tiny(raw, folder)
        raw["train"] |= {"seeds": [1, 2, 3], "together": True}
        with pytest.raises(Interrupted):
            train_tiny(raw, folder, resume=True, stop_after=3)
        raw["train"]["seeds"] = [1, 2, 3, 4]
        capsys.readouterr()
        train_tiny(raw, folder, resume=True)
        said = capsys.readouterr().out.splitlines()
        assert "seed 1: finished before" in said
        assert len(pointer(folder, group="together_2")["seeds"]) == 2
        assert [seed["finished"] for seed in pointer(folder, group="together_4")["seeds"]] == [True]
        groups = {f.parent.name: json.loads(f.read_text())["seeds"] for f in folder.glob("together_*/group.json")}
        assert groups == {"together_2": [2, 3], "together_4": [4]}
        assert all((folder / f"seed_{seed}" / "evaluation.json").exists() for seed in (1, 2, 3, 4))
        before = {p: p.stat().st_mtime_ns for p in folder.glob("seed_*/**/*")}
        train_tiny(separately(raw), folder, resume=True)
        assert {p: p.stat().st_mtime_ns for p in folder.glob("seed_*/**/*")} == before

    def test_a_group_killed_between_two_evaluations_evaluates_the_rest(
        self, train_tiny: Train, raw_of: Callable[[str], dict], at_once: Callable[[str], Path], tmp_path: Path
    ) -> None:
        folder = shutil.copytree(at_once("umdf"), tmp_path / "run")
        wanted = (folder / "seed_1" / "evaluation.json").read_text()
        (folder / "seed_1" / "evaluation.json").unlink()
        train_tiny(raw_of("umdf"), folder, resume=True)
        assert (folder / "seed_1" / "evaluation.json").read_text() == wanted
        assert_same_group(folder, at_once("umdf"), ("",))

    def test_seeds_that_were_begun_otherwise_are_named(
        self, train_tiny: Train, raw_of: Callable[[str], dict], tmp_path: Path
    ) -> None:
        raw, (first, second) = raw_of("umdf"), (tmp_path / "first", tmp_path / "second")
        with pytest.raises(Interrupted):
            train_tiny(raw, first, stop_after=2)
        record = (first / "run.json").read_text()
        with pytest.raises(UserError) as caught:
            train_tiny(separately(raw), first, resume=True)
        assert str(caught.value) == (
            f"{first / 'together_3'}: seeds 3, 1, 2 were begun together; expected --together to go on"
        )
        assert (first / "run.json").read_text() == record
        with pytest.raises(Interrupted):
            train_tiny(separately(raw), second, stop_after=2)
        with pytest.raises(UserError) as caught:
            train_tiny(raw, second, resume=True)
        assert str(caught.value) == (
            f"{second / 'seed_3'}: begun alone; expected --resume without --together until it ends"
        )

    def test_a_damaged_group_is_named(self, train_tiny: Train, raw_of: Callable[[str], dict], tmp_path: Path) -> None:
        with pytest.raises(Interrupted):
            train_tiny(raw_of("umdf"), tmp_path / "run", stop_after=2)
        file = tmp_path / "run" / "together_3" / "group.json"
        file.write_text("[3, 1]")
        with pytest.raises(UserError, match=f"^{file}: not a group's group.json; expected the key seeds$"):
            train_tiny(raw_of("umdf"), tmp_path / "run", resume=True)
        file.write_text('{"seeds": [3, 1]}')
        with pytest.raises(UserError, match=r"latest\.json: a checkpoint of 3 seeds; expected 2, those of the group$"):
            train_tiny(raw_of("umdf"), tmp_path / "run", resume=True)


class TestEarlyStopping:
    @pytest.fixture
    def impatient(self, raw_of: Callable[[str], dict]) -> dict:
        raw = raw_of("umdf")
        raw["train"] |= {"epochs": 5, "patience": 1, "select": "corr", "seeds": [2, 3, 1]}
        raw["deepspeed"]["optimizer"]["params"]["lr"] = 0.01
        return raw

    def test_each_seed_stops_by_itself(
        self, train_tiny: Train, impatient: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """As in a separate run; the others go on, and an interruption in between changes nothing."""
        seeds = impatient["train"]["seeds"]
        shown: list[tuple[int, float]] = []
        monkeypatch.setattr(
            trainer.Telemetry, "step", lambda self, step, samples, parts: shown.append((samples, parts["loss"]))
        )
        stopped: list[list[int]] = []
        stop = FlatAdam.stop
        monkeypatch.setattr(FlatAdam, "stop", lambda self, models: stopped.append(models) or stop(self, models))
        whole = train_tiny(impatient, tmp_path / "whole")
        epochs = {seed: len(records(whole, seed)) for seed in seeds}
        assert epochs[2] < epochs[3] < epochs[1] == 5
        assert [samples for samples, _ in shown] == [24] * 5 * max(epochs.values())
        for epoch in range(max(epochs.values())):
            assert stopped[5 * epoch] == [i for i, seed in enumerate(seeds) if epochs[seed] <= epoch]
            live = [records(whole, seed)[epoch]["train"]["loss"] for seed in seeds if epochs[seed] > epoch]
            assert shown[5 * epoch + 4][1] == pytest.approx(sum(live) / len(live))
        stands = dict(zip(seeds, pointer(whole)["seeds"], strict=True))
        alone = train_tiny(separately(impatient), tmp_path / "alone")
        for seed in seeds:
            assert_close_records(records(whole, seed), records(alone, seed))
            (theirs,) = json.loads((alone / f"seed_{seed}" / "checkpoints" / "latest.json").read_text())["seeds"]
            assert {k: stands[seed][k] for k in ("epoch", "best_epoch", "finished")} == {
                k: theirs[k] for k in ("epoch", "best_epoch", "finished")
            }
        with pytest.raises(Interrupted):  # when the first has stopped
            train_tiny(impatient, tmp_path / "parts", stop_after=5 * epochs[2] + 2)
        assert pointer(tmp_path / "parts")["step"] == 5 * epochs[2] + 2
        train_tiny(impatient, tmp_path / "parts", resume=True)
        assert_same_group(tmp_path / "parts", whole, ("",))

    def test_a_seed_that_diverges_is_named(self, train_tiny: Train, impatient: dict, tmp_path: Path) -> None:
        impatient["deepspeed"] |= {"optimizer": {"type": "SGD", "params": {"lr": 10.0}}, "gradient_clipping": None}
        with pytest.raises(UserError, match=rf"^{tmp_path / 'run' / 'seed_2'}: the loss is not finite in epoch 1; "):
            train_tiny(impatient, tmp_path / "run")


class TestTeachers:
    def test_those_of_another_run_are_taken_seed_by_seed(
        self, train_tiny: Train, raw_of: Callable[[str], dict], at_once: Callable[[str], Path], tmp_path: Path
    ) -> None:
        source = at_once("corrkd")
        folder = train_tiny(raw_of("corrkd"), tmp_path / "run", teacher=source)
        for seed in SEEDS:
            assert_same(parameters(folder, seed, "teacher"), parameters(source, seed, "teacher"))
            assert_same(parameters(folder, seed), parameters(source, seed))
        alone = train_tiny(separately(raw_of("corrkd")), tmp_path / "alone", teacher=source)
        assert_close_records(records(alone, 2), records(folder, 2))


class TestClipping:
    @staticmethod
    def parameters(models: int) -> list[torch.nn.Parameter]:
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.zeros(models, *shape)) for shape in ((3, 4), (5,), ())]
        for i, parameter in enumerate(params):
            size = torch.tensor([0.1, 10.0, 3.0][:models]) + i
            parameter.grad = torch.randn_like(parameter) * size.view(-1, *[1] * (parameter.dim() - 1))
        return [*params, torch.nn.Parameter(torch.zeros(models, 2))]  # the last has no gradient

    @pytest.mark.parametrize("limit", [0.5, 20.0])
    def test_each_model_has_a_norm_of_its_own(self, limit: float) -> None:
        params, before = self.parameters(3), self.parameters(3)
        with NoHostSync():
            clip_models(params, limit, len(params[0]))
        for model in range(3):
            own = [torch.nn.Parameter(p[model].detach()) for p in before[:3]]
            for parameter, whole in zip(own, before, strict=False):
                parameter.grad = whole.grad[model].clone()
            torch.nn.utils.clip_grad_norm_(own, limit)
            for parameter, whole in zip(own, params, strict=False):
                torch.testing.assert_close(whole.grad[model], parameter.grad)

    def test_a_stopped_model_gets_gradient_zero_whatever_it_had(self) -> None:
        for limit in (0.0, 0.5):
            params, expected = self.parameters(3), self.parameters(3)
            for parameter in params[:3]:
                parameter.grad[1] = torch.nan
            clip_models(expected, limit, len(expected[0]))
            clip_models(params, limit, len(params[0]), stopped=[1])
            for parameter, other in zip(params[:3], expected, strict=False):
                assert not parameter.grad[1].any()
                assert torch.equal(parameter.grad[[0, 2]], other.grad[[0, 2]])


class TestRefusals:
    def test_an_optimizer_that_looks_at_whole_tensors(self, raw_of: Callable[[str], dict]) -> None:
        raw = raw_of("umdf")
        raw["deepspeed"]["optimizer"] = {"type": "Lamb"}
        parse_config(separately(raw))
        with pytest.raises(
            UserError, match=r"deepspeed\.optimizer\.type: Lamb would couple the seeds of train\.together"
        ):
            parse_config(raw)

    def test_fp16(self, raw_of: Callable[[str], dict], monkeypatch: pytest.MonkeyPatch) -> None:
        raw = raw_of("umdf")
        raw["deepspeed"] |= {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}
        assert device.place(parse_config(raw)).precision == "fp32"  # what fp16 becomes on a CPU
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
        with pytest.raises(UserError, match=r"^train\.together: in fp16 an overflow of one seed would skip "):
            device.place(parse_config(raw))
        assert device.place(parse_config(separately(raw))).precision == "fp16"

    @pytest.mark.parametrize(("block", "limit"), [({}, 1.0), ({"gradient_clipping": 0.3}, 0.3)])
    def test_what_would_couple_the_models_is_taken_from_deepspeed(
        self, raw_of: Callable[[str], dict], block: dict, limit: float
    ) -> None:
        raw = raw_of("umdf")
        del raw["deepspeed"]["gradient_clipping"]
        raw["deepspeed"] |= {"zero_optimization": {"stage": 2}} | block
        placement = device.place(parse_config(raw))
        assert placement.clip_each == limit
        assert placement.deepspeed["gradient_clipping"] == 0
        assert placement.deepspeed["zero_optimization"] == {"stage": 0}
        assert device.place(parse_config(separately(raw))).deepspeed["zero_optimization"] == {"stage": 2}


def test_a_stack_of_one_is_that_one() -> None:
    first, second = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    weight = first.weight
    assert stack_models([first]) is first
    assert first.weight is weight
    assert stack_models([first, second]).weight.shape == (2, 2)


@pytest.mark.usefixtures("process_state")
@pytest.mark.parametrize("command", ["train", "suite", "ablate"])
def test_the_flag_reaches_the_run(
    command: str, raw_of: Callable[[str], dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Enough(Exception):
        pass

    def record(config: Config, *arguments: Any, **named: Any) -> None:
        assert config.train.together
        assert config.train.seeds == (4, 5)
        raise Enough

    monkeypatch.setattr(run, "train_run", record)
    (tmp_path / "tiny.json").write_text(json.dumps(separately(raw_of("umdf"))))
    arguments = [
        "--config",
        str(tmp_path / "tiny.json"),
        "--out",
        str(tmp_path / "out"),
        "--seeds",
        "4,5",
        "--together",
    ]
    with pytest.raises(Enough):
        main([command, *arguments])
