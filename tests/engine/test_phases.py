"""A teacher, then its student: what a run leaves, exact resumption in either phase, teachers taken from elsewhere."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_records import assert_same, assert_same_phase, assert_same_run, parameters, progress, records
from safetensors.torch import load_file, save_file

import fastmmkd
from fastmmkd import run_results
from fastmmkd.blocks import LARGEST_SEED
from fastmmkd.cli import main, train_main
from fastmmkd.config import parse_config
from fastmmkd.data import store
from fastmmkd.data.batches import ResidentSplit, View
from fastmmkd.data.dataset import Dataset
from fastmmkd.engine import run as engine_run
from fastmmkd.engine import teachers
from fastmmkd.engine.groups import alone
from fastmmkd.engine.phases import Phase, begin_phase, phases_of
from fastmmkd.errors import Interrupted, UserError
from fastmmkd.evaluation import plots
from fastmmkd.evaluation.protocol import Evaluator
from fastmmkd.methods.corrkd import CorrKD
from fastmmkd.methods.hrlf import HRLF
from fastmmkd.methods.method import Network, PhaseSpec
from tests.handmade import network_of, student_of

Train = Callable[..., Path]
STUDENTS = {"corrkd": CorrKD, "hrlf": HRLF}
ALONE = {"corrkd": {"task"}, "hrlf": {"task", "frf"}}
DISTILLED = {"corrkd": {"scd", "cpd", "rcd"}, "hrlf": {"hmi", "hal", "kl"}}
only_corrkd = pytest.mark.parametrize("method", ["corrkd"], indirect=True)


@pytest.fixture(scope="module", params=["corrkd", "hrlf"])
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def raw(method: str, tiny_store: Path, distilled_config_of: Callable[[str, Path], dict]) -> dict:
    """A config of 2 x 5 steps of the teacher and as many of the student."""
    return distilled_config_of(method, tiny_store)


@pytest.fixture(scope="module")
def distilled(
    method: str,
    train_tiny: Train,
    tiny_store: Path,
    distilled_config_of: Callable[[str, Path], dict],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The folder of a finished run with seeds 1 and 2; shared, so do not change it."""
    config = distilled_config_of(method, tiny_store)
    config["train"]["seeds"] = [1, 2]
    return train_tiny(config, tmp_path_factory.mktemp("distilled") / method)


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take longer than the trainings."""
    monkeypatch.setattr(plots, "curves", lambda path, found: path.touch())
    monkeypatch.setattr(run_results, "draw_embedding", lambda *arguments: None)


def stored(dataset: Dataset, path: Path) -> str:
    store.write(dataset, path)
    return str(path)


def without_language(dataset: Dataset, train: int, valid: int) -> Dataset:
    """The first samples of both splits lack language."""
    for name, count in (("train", train), ("valid", valid)):
        split = dataset.splits[name]
        split.present[:count, 0] = False
        split.lengths[:count, 0] = 0
        split.features["language"][:count] = 0
    return dataset


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif value is not None:
        for item in value:
            yield from tensors(item)


class TestARun:
    def test_it_leaves_a_teacher_below_each_student(self, distilled: Path, method: str, tiny_store: Path) -> None:
        assert not list(distilled.rglob("*.tmp"))
        for seed in (1, 2):
            folder = distilled / f"seed_{seed}"
            common = {"model.safetensors", "metrics.jsonl", "tensorboard", "checkpoints"}
            assert {path.name for path in folder.iterdir()} == common | {"teacher", "evaluation.json"}
            assert {path.name for path in (folder / "teacher").iterdir()} == common | {"teacher.json"}
            for phase, parts in (("teacher", ALONE[method]), ("", ALONE[method] | DISTILLED[method])):
                found = records(distilled, seed, phase)
                assert [(r["epoch"], r["step"]) for r in found] == [(1, 5), (2, 10)]
                train = found[0]["train"]
                assert set(train) == {"loss"} | parts
                assert train["loss"] == pytest.approx(sum(train[name] for name in parts), rel=1e-6)
                assert progress(distilled, seed, phase)["finished"]
            said = json.loads((folder / "teacher" / "teacher.json").read_text())
            assert said["seed"] == seed
            assert said["identity"]["method"] == method
            assert said["identity"]["feature_dims"] == [5, 4, 3]
            assert said["identity"]["data_hash"] == store.read_header(tiny_store).content_hash

    def test_what_it_exports_is_the_network_alone(self, distilled: Path, raw: dict) -> None:
        """No statistics network, no discriminator."""
        wanted = network_of(parse_config(raw), (5, 4, 3), seed=1).state_dict()
        normalisation = {f"normalisation.{m}.{s}" for m in ("language", "audio", "visual") for s in ("mean", "std")}
        for phase in ("teacher", ""):
            assert set(parameters(distilled, phase=phase)) == set(wanted) | normalisation

    @pytest.mark.usefixtures("process_state", "without_pictures")
    def test_it_predicts_and_evaluates_with_the_student(
        self, distilled: Path, method: str, tiny_store: Path, tmp_path: Path
    ) -> None:
        split = store.read(tiny_store).splits["test"]
        for seed in (1, 2):
            predictor = fastmmkd.load(distilled, seed)
            expected = parameters(distilled, seed)
            assert all(torch.equal(value, expected[name]) for name, value in predictor.module.state_dict().items())
            evaluation = json.loads((distilled / f"seed_{seed}" / "evaluation.json").read_text())
            mae = np.abs(predictor.predict(split) - split.labels).mean()
            assert mae == pytest.approx(evaluation["conditions"]["lav"]["metrics"]["mae"])
        assert main(["eval", "--run", str(distilled), "--out", str(tmp_path / "results")]) == 0
        results = json.loads((tmp_path / "results" / "results.json").read_text())
        assert results["seeds"] == [1, 2]
        assert results["method"] == method
        command = ["predict", "--run", str(distilled), "--data", str(tiny_store), "--out", str(tmp_path / "p.csv")]
        assert main(command) == 0
        assert len((tmp_path / "p.csv").read_text().splitlines()) == 1 + 40 + 12 + 14

    def test_it_says_which_phase_it_is_in(
        self, train_tiny: Train, raw: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = tmp_path / "run"
        with pytest.raises(Interrupted):
            train_tiny(raw, run, stop_after=17)
        titles = [line.partition("  ")[0] for line in capsys.readouterr().out.splitlines()[1:]]
        name = raw["method"]
        assert titles == [
            f"{name} seed 1 teacher epoch 1/2",
            f"{name} seed 1 teacher epoch 2/2",
            f"{name} seed 1 student epoch 1/2",
        ]
        train_tiny(raw, run, resume=True)
        lines = capsys.readouterr().out.splitlines()
        assert lines[1] == "seed 1: its teacher is finished"
        assert lines[2].startswith(f"{name} seed 1 student epoch 2/2  loss ")
        assert [line for line in lines[3:] if " epoch 1/" in line or " epoch 2/" in line] == []
        assert lines[-1].startswith("seed 1: evaluating the epoch ")

    @pytest.mark.parametrize(
        "task", ["regression", "classification-2", "classification-3", "emotions-binary", "emotions-4way"]
    )
    @pytest.mark.usefixtures("without_pictures")
    def test_every_task(
        self, train_tiny: Train, raw: dict, tiny_dataset: Callable[..., Dataset], tmp_path: Path, task: str
    ) -> None:
        dataset = without_language(tiny_dataset(), train=4, valid=4)
        if task.startswith("emotions"):
            dataset.label_kind = "emotions"
            for split in dataset.splits.values():
                split.labels = np.eye(4, dtype=np.float32)[np.digitize(split.labels, [-1.5, 0, 1.5])]
        raw["data"]["path"] = stored(dataset, tmp_path / "data.h5")
        raw["teacher"]["epochs"] = 1
        raw["train"] |= {"task": task, "epochs": 1, "select": None}
        run = train_tiny(raw, tmp_path / "run", results=True)
        for phase in ("teacher", ""):
            (record,) = records(run, phase=phase)
            assert all(math.isfinite(value) for value in record["train"].values())
        assert json.loads((run / "results.json").read_text())["task"] == task

    @only_corrkd
    def test_in_bf16_the_teacher_is_in_bf16_too(
        self, train_tiny: Train, raw: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        raw["deepspeed"] |= {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
        raw["train"] |= {"task": "classification-3", "select": None}
        watch = TeacherWatch(monkeypatch, CorrKD)
        run = train_tiny(raw, tmp_path / "run")
        assert watch.teacher
        assert {p.dtype for p in watch.teacher.parameters()} == {torch.bfloat16}
        assert {x.dtype for x in watch.taught} == {torch.bfloat16}
        for phase in ("teacher", ""):
            assert parameters(run, phase=phase)["head.weight"].dtype == torch.bfloat16
            for record in records(run, phase=phase):
                assert all(math.isfinite(value) for value in record["train"].values())


class TeacherWatch:
    """Keeps the teacher of a run, what it was asked, and what the student's graph holds on to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, student: type) -> None:
        self.teacher: Network | None = None
        self.before: dict[str, torch.Tensor] = {}
        self.with_gradients: list[bool] = []
        self.taught: list[torch.Tensor] = []
        self.saved: set[int] = set()
        """Storages that autograd saved since the teacher was loaded."""
        load, forward = teachers.load, student.forward

        def loading(*arguments: Any) -> Network:
            self.teacher = teacher = load(*arguments)
            self.before = {name: value.clone() for name, value in teacher.state_dict().items()}
            represent = teacher.represent

            def representing(features: list[torch.Tensor], masks: list[torch.Tensor]) -> Any:
                self.with_gradients.append(torch.is_grad_enabled() or teacher.training)
                return represent(features, masks)

            monkeypatch.setattr(teacher, "represent", representing)
            return teacher

        def forwarding(module: Any, batch: Any) -> Any:
            self.taught += tensors(batch.taught)
            return forward(module, batch)

        monkeypatch.setattr(teachers, "load", loading)
        monkeypatch.setattr(student, "forward", forwarding)

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.teacher:
            self.saved.add(tensor.untyped_storage().data_ptr())
        return tensor


def test_the_teacher_is_frozen_and_leaves_no_graph(
    train_tiny: Train, raw: dict, method: str, distilled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = TeacherWatch(monkeypatch, STUDENTS[method])
    with torch.autograd.graph.saved_tensors_hooks(watch.pack, lambda tensor: tensor):
        run = train_tiny(raw, tmp_path / "run")
    assert_same_run(run, distilled)
    assert watch.teacher
    exported = parameters(run, phase="teacher")
    for name, value in watch.teacher.named_parameters():
        assert torch.equal(value, watch.before[name])
        assert torch.equal(value, exported[name])
        assert value.grad is None
        assert not value.requires_grad
    assert watch.with_gradients == [False] * 10
    assert watch.taught
    assert all(x.grad_fn is None and not x.requires_grad for x in watch.taught)
    assert watch.saved
    assert watch.saved.isdisjoint(p.untyped_storage().data_ptr() for p in watch.teacher.parameters())


class TestResumption:
    @pytest.mark.parametrize(
        ("stop_after", "phase", "epoch", "step"),
        [
            pytest.param(3, "teacher", 0, 3, id="within the teacher's first epoch"),
            pytest.param(10, "teacher", 1, 5, id="after the teacher's last step"),
            pytest.param(11, "teacher", 2, 0, id="after the teacher's last checkpoint"),
            pytest.param(12, "", 0, 1, id="after the student's first step"),
            pytest.param(18, "", 1, 2, id="within the student's last epoch"),
            pytest.param(22, "", 2, 0, id="after the student's last checkpoint"),
        ],
    )
    def test_an_interrupted_run_continues_exactly(
        self,
        train_tiny: Train,
        raw: dict,
        distilled: Path,
        tmp_path: Path,
        stop_after: int,
        phase: str,
        epoch: int,
        step: int,
    ) -> None:
        run = tmp_path / "run"
        with pytest.raises(Interrupted):
            train_tiny(raw, run, stop_after=stop_after)
        found = progress(run, phase=phase)
        assert (found["epoch"], found["step"]) == (epoch, step)
        assert (run / "seed_1" / "teacher" / "teacher.json").exists() == (phase == "")
        assert (run / "seed_1" / "checkpoints").exists() == (phase == "")
        train_tiny(raw, run, resume=True)
        assert_same_phase(run, distilled, phase="teacher")
        assert_same_run(run, distilled)

    @pytest.mark.parametrize("step", ["finish", "load", "begin the student"])
    def test_a_run_killed_between_its_phases_continues_exactly(
        self,
        train_tiny: Train,
        raw: dict,
        distilled: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        step: str,
    ) -> None:
        class Killed(Exception):
            pass

        def kill(*arguments: Any) -> None:
            raise Killed

        def begin(spec: PhaseSpec, *arguments: Any) -> Phase:
            return kill() if spec.name == "student" else begin_phase(spec, *arguments)

        run = tmp_path / "run"
        with monkeypatch.context() as patch:
            if step == "begin the student":
                patch.setattr(engine_run, "begin_phase", begin)
            else:
                patch.setattr(teachers, step, kill)
            with pytest.raises(Killed):
                train_tiny(raw, run)
        assert progress(run, phase="teacher")["finished"]
        assert (run / "seed_1" / "teacher" / "teacher.json").exists() == (step != "finish")
        assert not (run / "seed_1" / "checkpoints").exists()
        train_tiny(raw, run, resume=True)
        assert_same_phase(run, distilled, phase="teacher")
        assert_same_run(run, distilled)

    @only_corrkd
    def test_a_teacher_that_was_damaged_meanwhile(self, train_tiny: Train, raw: dict, tmp_path: Path) -> None:
        run = tmp_path / "run"
        with pytest.raises(Interrupted):
            train_tiny(raw, run, stop_after=12)
        file = run / "seed_1" / "teacher" / "model.safetensors"
        file.write_bytes(file.read_bytes()[:100])
        with pytest.raises(UserError, match=f"^{file}: not an exported model: .*$"):
            train_tiny(raw, run, resume=True)


class TestReusedTeachers:
    def test_those_of_a_run(self, train_tiny: Train, raw: dict, distilled: Path, tmp_path: Path) -> None:
        """Each seed takes that of its own seed, and is the student that it was there."""
        raw["train"]["seeds"] = [1, 2]
        run = train_tiny(raw, tmp_path / "run", teacher=distilled)
        for seed in (1, 2):
            folder = run / f"seed_{seed}" / "teacher"
            assert {path.name for path in folder.iterdir()} == {"teacher.json", "model.safetensors"}
            source = distilled / f"seed_{seed}" / "teacher"
            assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
            said = json.loads((source / "teacher.json").read_text())
            assert json.loads((folder / "teacher.json").read_text()) == said | {"source": str(source)}
            assert_same_run(run, distilled, seed)

    @only_corrkd
    @pytest.mark.parametrize("below", ["seed_1", "seed_1/teacher"])
    def test_one_for_all_seeds(self, train_tiny: Train, raw: dict, distilled: Path, tmp_path: Path, below: str) -> None:
        raw["train"]["seeds"] = [1, 2]
        run = train_tiny(raw, tmp_path / "run", teacher=distilled / below)
        for seed in (1, 2):
            assert_same(parameters(run, seed, "teacher"), parameters(distilled, 1, "teacher"))
        assert_same_run(run, distilled, seed=1)
        assert records(run, 2)[0]["train"]["scd"] != records(distilled, 2)[0]["train"]["scd"]

    @only_corrkd
    @pytest.mark.parametrize("repeated", [False, True], ids=["without --teacher", "with --teacher"])
    def test_they_are_copied(
        self, train_tiny: Train, raw: dict, distilled: Path, tmp_path: Path, repeated: bool
    ) -> None:
        """All of them, at the start: seed 2 was not begun when they went."""
        raw["train"]["seeds"] = [1, 2]
        source, run = shutil.copytree(distilled, tmp_path / "source"), tmp_path / "run"
        with pytest.raises(Interrupted):
            train_tiny(raw, run, stop_after=3, teacher=source)
        assert progress(run)["step"] == 3
        shutil.rmtree(source)
        train_tiny(raw, run, resume=True, teacher=source if repeated else None)
        for seed in (1, 2):
            assert_same_run(run, distilled, seed)
            assert not (run / f"seed_{seed}" / "teacher" / "metrics.jsonl").exists()

    @only_corrkd
    def test_one_replaces_a_teacher_that_is_not_finished(
        self, train_tiny: Train, raw: dict, distilled: Path, tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        with pytest.raises(Interrupted):
            train_tiny(raw, run, stop_after=3)
        train_tiny(raw, run, resume=True, teacher=distilled)
        assert {path.name for path in (run / "seed_1" / "teacher").iterdir()} == {"teacher.json", "model.safetensors"}
        assert_same_run(run, distilled)


class TestTeachersThatDoNotFit:
    """One line that names the key and both values, before anything is trained or written."""

    @pytest.fixture
    def refusal(self, train_tiny: Train, tmp_path: Path) -> Callable[[dict, Path], str]:
        def refused(config: dict, teacher: Path) -> str:
            with pytest.raises(UserError) as caught:
                train_tiny(config, tmp_path / "run", teacher=teacher)
            assert not (tmp_path / "run" / "run.json").exists()
            assert not list(tmp_path.glob("run/seed_*"))
            message = str(caught.value)
            assert "\n" not in message
            return message

        return refused

    @only_corrkd
    @pytest.mark.parametrize(
        ("block", "key", "value", "difference"),
        [
            ("model", "width", 16, "model.width is 8, the run has 16"),
            ("model", "heads", 4, "model.heads is 2, the run has 4"),
            ("model", "encoder_layers", 2, "model.encoder_layers is 1, the run has 2"),
            ("model", "attention_mask", "none", "model.attention_mask is missing, the run has none"),
            ("train", "task", "classification-2", "task is regression, the run has classification-2"),
            ("data", "clip", None, "clip is 10.0, the run has None"),
        ],
    )
    def test_another_config(
        self,
        refusal: Callable[[dict, Path], str],
        raw: dict,
        distilled: Path,
        block: str,
        key: str,
        value: Any,
        difference: str,
    ) -> None:
        raw["train"]["select"] = None
        raw[block][key] = value
        folder = distilled / "seed_1" / "teacher"
        assert refusal(raw, distilled) == f"{folder}: this teacher does not fit the run: {difference}"

    @only_corrkd
    def test_other_inputs(self, refusal: Callable[[dict, Path], str], raw: dict, distilled: Path) -> None:
        raw["data"] |= {"standardise": False, "clip": None}
        assert refusal(raw, distilled).endswith("does not fit the run: standardise is True, the run has False")

    def test_another_method(
        self,
        refusal: Callable[[dict, Path], str],
        distilled_config_of: Callable[[str, Path], dict],
        tiny_store: Path,
        distilled: Path,
        method: str,
    ) -> None:
        other = "hrlf" if method == "corrkd" else "corrkd"
        message = refusal(distilled_config_of(other, tiny_store), distilled)
        assert message.endswith(f"this teacher does not fit the run: method is {method}, the run has {other}")

    @only_corrkd
    def test_other_features(
        self,
        refusal: Callable[[dict, Path], str],
        raw: dict,
        distilled: Path,
        tiny_dataset: Callable[..., Dataset],
        tmp_path: Path,
    ) -> None:
        raw["data"]["path"] = stored(tiny_dataset(dims=(5, 4, 2)), tmp_path / "other.h5")
        assert refusal(raw, distilled).endswith("feature_dims is [5, 4, 3], the run has [5, 4, 2]")

    @only_corrkd
    def test_other_data(
        self, refusal: Callable[[dict, Path], str], raw: dict, distilled: Path, tiny_store: Path, tmp_path: Path
    ) -> None:
        dataset = store.read(tiny_store)
        dataset.splits["train"].labels[0] += 0.2
        raw["data"]["path"] = stored(dataset, tmp_path / "other.h5")
        theirs, ours = (store.read_header(Path(path)).content_hash for path in (tiny_store, raw["data"]["path"]))
        assert refusal(raw, distilled).endswith(f"data_hash is {theirs}, the run has {ours}")

    @only_corrkd
    def test_the_last_seed_of_a_run(self, refusal: Callable[[dict, Path], str], raw: dict, distilled: Path) -> None:
        raw["train"]["seeds"] = [1, 3]
        assert refusal(raw, distilled) == (
            f"{distilled}: no trained teacher for seed 3; expected a run whose seed_3/teacher holds teacher.json, or "
            "such a folder itself"
        )


@only_corrkd
@pytest.mark.usefixtures("process_state")
class TestMistakesOnTheCommandLine:
    @pytest.fixture
    def teacher(self, distilled: Path, tmp_path: Path) -> Path:
        """A teacher's folder that a test may change."""
        return shutil.copytree(distilled / "seed_1" / "teacher", tmp_path / "teacher")

    @pytest.fixture
    def complain(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[[dict, Path], str]:
        def run(config: dict, teacher: Path) -> str:
            (tmp_path / "tiny.json").write_text(json.dumps(config))
            command = ["--config", str(tmp_path / "tiny.json"), "--output", str(tmp_path / "run")]
            assert train_main([*command, "--teacher", str(teacher)]) == 2
            assert not (tmp_path / "run" / "run.json").exists()
            out, err = capfd.readouterr()
            assert out == ""
            assert err.startswith("error: ")
            assert err.count("\n") == 1
            return err.removeprefix("error: ").rstrip("\n")

        return run

    def test_no_such_folder(self, complain: Callable[[dict, Path], str], raw: dict, tmp_path: Path) -> None:
        assert complain(raw, tmp_path / "none").startswith(f"{tmp_path / 'none'}: no trained teacher for seed 1; ")

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("{", "not a teacher's teacher.json: "),
            ("[1]", "not a teacher's teacher.json; expected the key identity"),
            ('{"identity": 1}', "not a teacher's teacher.json; expected the key identity"),
        ],
    )
    def test_a_file_of_something_else(
        self, complain: Callable[[dict, Path], str], raw: dict, teacher: Path, text: str, expected: str
    ) -> None:
        (teacher / "teacher.json").write_text(text)
        assert complain(raw, teacher).startswith(f"{teacher / 'teacher.json'}: {expected}")

    def test_weights_that_are_not_there(self, complain: Callable[[dict, Path], str], raw: dict, teacher: Path) -> None:
        (teacher / "model.safetensors").unlink()
        expected = f"{teacher / 'model.safetensors'}: no such file; expected a trained model"
        assert complain(raw, teacher) == expected

    def test_damaged_weights(self, complain: Callable[[dict, Path], str], raw: dict, teacher: Path) -> None:
        file = teacher / "model.safetensors"
        file.write_bytes(file.read_bytes()[:1000])
        assert complain(raw, teacher).startswith(f"{file}: not an exported model: ")

    def test_weights_of_another_network(self, complain: Callable[[dict, Path], str], raw: dict, teacher: Path) -> None:
        file = teacher / "model.safetensors"
        found = load_file(str(file))
        save_file(found | {"head.bias": torch.zeros(1, 2)}, str(file))
        assert complain(raw, teacher) == f"{file}: the weights are not of the config's network"

    def test_a_run_without_a_teacher_phase(
        self, complain: Callable[[dict, Path], str], raw: dict, tiny_config: dict, teacher: Path
    ) -> None:
        for config in (tiny_config, raw | {"teacher": None}):
            assert complain(config, teacher) == (
                f"--teacher {teacher}: this run has no teacher phase; expected a config with a teacher block"
            )


@only_corrkd
class TestSamplesThatLackModalities:
    @pytest.fixture
    def incomplete(self, raw: dict, tiny_dataset: Callable[..., Dataset], tmp_path: Path) -> dict:
        """8 of 40 training samples and 4 of 12 validation samples lack language."""
        raw["data"]["path"] = stored(without_language(tiny_dataset(), train=8, valid=4), tmp_path / "incomplete.h5")
        raw["train"] |= {"epochs": 1, "select_on": "complete"}
        raw["teacher"]["epochs"] = 1
        return raw

    @pytest.mark.parametrize(
        ("allowed", "trained_on", "selected_on"),
        [(False, range(8, 40), range(4, 12)), (True, range(40), range(12))],
        ids=["left out", "taken with what they have"],
    )
    def test_in_the_teacher_phase(
        self,
        train_tiny: Train,
        incomplete: dict,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        allowed: bool,
        trained_on: range,
        selected_on: range,
    ) -> None:
        incomplete["teacher"]["incomplete_samples"] = allowed
        batches: list[tuple[tuple[View, ...], list[int]]] = []
        validated: list[list[int]] = []
        training_batch, evaluate = ResidentSplit.training_batch, Evaluator.run_models

        def recording_batch(self: Any, rows: torch.Tensor, seeds: Any, epoch: Any, views: Any) -> Any:
            batches.append((views, rows.flatten().tolist()))
            return training_batch(self, rows, seeds, epoch, views)

        def recording_rows(self: Any, predict: Any, models: int, scenario: Any, rows: np.ndarray) -> Any:
            validated.append(rows.tolist())
            return evaluate(self, predict, models, scenario, rows)

        monkeypatch.setattr(ResidentSplit, "training_batch", recording_batch)
        monkeypatch.setattr(Evaluator, "run_models", recording_rows)
        train_tiny(incomplete, tmp_path / "run")
        steps = len(trained_on) // 8
        of_teacher, of_student = batches[:steps], batches[steps:]
        assert sorted(row for _, rows in of_teacher for row in rows) == list(trained_on)
        assert {views for views, _ in of_teacher} == {(View.COMPLETE,)}
        assert {views for views, _ in of_student} == {(View.MISSING, View.COMPLETE)}
        assert sorted(row for _, rows in of_student for row in rows) == list(range(40))
        assert validated[:2] == [list(selected_on), list(range(4, 12))]

    def test_too_few_complete_ones(
        self, train_tiny: Train, raw: dict, tiny_dataset: Callable[..., Dataset], tmp_path: Path
    ) -> None:
        path = stored(without_language(tiny_dataset(), train=33, valid=0), tmp_path / "incomplete.h5")
        raw["data"]["path"] = path
        with pytest.raises(UserError) as caught:
            train_tiny(raw, tmp_path / "run")
        assert str(caught.value) == (
            f"train.batch_size: 8, but {path} has 7 complete training samples for the teacher; expected at most that, "
            "or teacher.incomplete_samples=true"
        )
        assert not (tmp_path / "run" / "run.json").exists()


class TestInitialisation:
    def test_student_and_network_alone_start_alike_the_teacher_does_not(
        self, train_tiny: Train, raw: dict, tmp_path: Path
    ) -> None:
        """What is exported under a learning rate of 0 is what training starts from."""
        raw["deepspeed"]["optimizer"]["params"]["lr"] = 0.0
        raw["teacher"]["epochs"] = raw["train"]["epochs"] = 1
        run = train_tiny(raw, tmp_path / "distilled")
        alone = train_tiny(raw | {"teacher": None}, tmp_path / "alone")
        assert not (alone / "seed_1" / "teacher").exists()
        student, teacher = parameters(run), parameters(run, phase="teacher")
        assert_same(parameters(alone), student)
        learned = [name for name in student if not name.startswith("normalisation.")]
        drawn = [name for name in learned if student[name].unique().numel() > 2]
        assert "head.weight" in drawn
        assert not any(torch.equal(student[name], teacher[name]) for name in drawn)

    @only_corrkd
    @pytest.mark.parametrize("seed", [0, 1, LARGEST_SEED])
    def test_at_every_seed(self, raw: dict, tiny_dataset: Callable[..., Dataset], seed: int) -> None:
        config, dataset = parse_config(raw), tiny_dataset()
        first, _ = phases_of(config)
        teacher = begin_phase(first, config, dataset, alone(seed, Path("none")), {}).module.network
        student = student_of(config, dataset.feature_dims, seed).network
        assert not torch.equal(teacher.head.weight, student.head.weight)

    def test_a_network_alone_learns_without_distillation(
        self, train_tiny: Train, raw: dict, method: str, tmp_path: Path
    ) -> None:
        raw["train"]["epochs"] = 6
        found = records(train_tiny(raw | {"teacher": None}, tmp_path / "run"))
        assert all(set(record["train"]) == {"loss"} | ALONE[method] for record in found)
        assert found[-1]["train"]["loss"] < found[0]["train"]["loss"]
