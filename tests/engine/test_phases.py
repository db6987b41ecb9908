"""A teacher, then its student: what a run leaves, in which order it trains, and where each phase starts."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from run_records import assert_same, parameters, progress, records

import fastmmkd
from fastmmkd.blocks import LARGEST_SEED
from fastmmkd.cli import main
from fastmmkd.config import parse_config
from fastmmkd.data import store
from fastmmkd.data.dataset import Dataset
from fastmmkd.engine.groups import alone
from fastmmkd.engine.phases import begin_phase, phases_of
from fastmmkd.errors import Interrupted
from tests.engine.conftest import only_corrkd, stored, without_language
from tests.handmade import network_of, student_of

Train = Callable[..., Path]
ALONE = {"corrkd": {"task"}, "hrlf": {"task", "frf"}}
DISTILLED = {"corrkd": {"scd", "cpd", "rcd"}, "hrlf": {"hmi", "hal", "kl"}}


class TestARun:
    def test_it_leaves_a_teacher_below_each_student(self, distilled: Path, method: str, tiny_store: Path) -> None:
        assert not list(distilled.rglob("*.tmp"))
        for seed in (1, 2):
            folder = distilled / f"seed_{seed}"
            common = {"model.safetensors", "metrics.jsonl", "tensorboard", "checkpoints"}
            assert {path.name for path in folder.iterdir()} == common | {"teacher", "evaluation.json"}
            assert {path.name for path in (folder / "teacher").iterdir()} == common | {"teacher.json"}
            for phase, parts in (("teacher", ALONE[method]), ("", ALONE[method] | DISTILLED[method])):
                lines = records(distilled, seed, phase)
                assert [(r["epoch"], r["step"]) for r in lines] == [(1, 5), (2, 10)]
                train = lines[0]["train"]
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
            f"{name} seed 1 student: what it learns from was asked once (40 samples, 0.0 MB)",
            f"{name} seed 1 student epoch 1/2",
        ]
        train_tiny(raw, run, resume=True)
        lines = capsys.readouterr().out.splitlines()
        assert lines[1] == "seed 1: its teacher is finished"
        assert lines[2] == titles[2]
        assert lines[3].startswith(f"{name} seed 1 student epoch 2/2  loss ")
        assert [line for line in lines[4:] if " epoch 1/" in line or " epoch 2/" in line] == []
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
        lines = records(train_tiny(raw | {"teacher": None}, tmp_path / "run"))
        assert all(set(record["train"]) == {"loss"} | ALONE[method] for record in lines)
        assert lines[-1]["train"]["loss"] < lines[0]["train"]["loss"]
