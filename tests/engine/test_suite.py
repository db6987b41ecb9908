"""`fastmmkd suite`: several configs in one call, interrupted, failed and continued."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_records import assert_same, parameters, progress

from fastmmkd.cli import main
from fastmmkd.config import load_config, parse_config
from fastmmkd.data import store
from fastmmkd.data.dataset import Dataset
from fastmmkd.engine import interruption, run
from fastmmkd.engine.suite import Member, controls, plan, shared_schedule
from fastmmkd.methods import METHODS

pytestmark = pytest.mark.usefixtures("process_state", "without_pictures")


@pytest.fixture
def configs(tiny_config: dict, tmp_path: Path) -> Callable[..., list[Path]]:
    """`configs(name={block: {key: value}}, ...)`: files that differ from the tiny config in these."""

    def write(**wanted: dict[str, dict[str, Any]]) -> list[Path]:
        for name, changes in wanted.items():
            blocks = {block: tiny_config.get(block, {}) | values for block, values in changes.items()}
            raw = tiny_config | {"train": tiny_config["train"] | {"epochs": 1}} | blocks
            (tmp_path / f"{name}.json").write_text(json.dumps(raw))
        return [tmp_path / f"{name}.json" for name in wanted]

    return write


def suite(files: list[Path], out: Path, *arguments: str) -> int:
    return main(["suite", "--config", *map(str, files), "--out", str(out), *arguments])


def finished(out: Path) -> dict[Path, int]:
    return {path.relative_to(out): path.stat().st_mtime_ns for path in out.rglob("seed_*/**/*") if path.is_file()}


def test_every_config_is_trained_once_and_reported(
    configs: Callable[..., list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files, out = configs(scores={}, classes={"train": {"task": "classification-2", "epochs": 1}}), tmp_path / "out"
    assert suite(files, out) == 0
    first = capsys.readouterr().out
    assert first.splitlines()[:2] == ["scores: to do", "classes: to do"]
    assert {path.parent.name for path in out.rglob("results.json")} == {"scores", "classes"}
    report = (out / "report.md").read_text()
    assert "| scores - classes " in report
    assert f"{out / 'report.md'}\n" in first
    before = finished(out)
    assert suite(files, out, "--seeds", "1,2") == 0
    again = capsys.readouterr().out
    assert again.splitlines()[:2] == ["scores: 1 of 2 seeds done", "classes: 1 of 2 seeds done"]
    after = finished(out)
    assert {path: after[path] for path in before} == before
    assert set(after) > set(before)


def test_folds_are_trained_one_by_one_and_reported_together(
    configs: Callable[..., list[Path]],
    tiny_dataset: Callable[..., Dataset],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files, out, folds = configs(one={}), tmp_path / "out", []
    for name, kept in (("first", slice(0, 20)), ("second", slice(8, None))):
        dataset = tiny_dataset()
        dataset.splits["test"] = dataset.splits["test"].take(np.arange(len(dataset.splits["test"]))[kept])
        folds.append(str(store.write(dataset, tmp_path / f"{name}.h5").path))
    assert suite(files, out, "--folds", *folds) == 0
    said = capsys.readouterr().out
    assert said.splitlines()[:2] == ["one, first: to do", "one, second: to do"]
    assert {path.parent.relative_to(out) for path in out.rglob("results.json")} == {
        Path("one/first"),
        Path("one/second"),
    }
    assert "| 1 on each of 2 folds |" in (out / "report.md").read_text()
    assert suite(files, out, "--folds", *folds) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["one, first: done", "one, second: done"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--folds", "a.h5"], "--folds a.h5: expected two or more files of different names"),
        (["--folds", "x/a.h5", "y/a.h5"], "expected two or more files of different names"),
        (["--folds", "a.h5", "b.h5", "--data", "c.h5"], "--folds: the folds are the data, expected no --data"),
    ],
)
def test_folds_that_cannot_be(
    arguments: list[str],
    said: str,
    configs: Callable[..., list[Path]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert suite(configs(one={}), tmp_path / "out", *arguments) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ("run.json", "one: holds a run of its own; expected another --out for runs on folds"),
        ("c/results.json", "one: holds a run on c, too; expected it among --folds, or another --out"),
    ],
)
def test_other_runs_where_folds_are_to_be(
    there: str, said: str, configs: Callable[..., list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out" / "one" / there
    file.parent.mkdir(parents=True)
    file.write_text("{}")
    assert suite(configs(one={}), tmp_path / "out", "--folds", "a.h5", "b.h5") == 2
    assert said in capsys.readouterr().err


def test_every_config_of_a_data_set(
    configs: Callable[..., list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of a name as the papers have it; `umdf_tiny.json`, but not `umdf_other_tiny.json` or a config of another name."""
    configs(umdf_tiny={}, umdf_other_tiny={}, study_tiny={})
    (tmp_path / "configs").mkdir()
    for file in tmp_path.glob("*_tiny.json"):
        file.rename(tmp_path / "configs" / file.name)
    monkeypatch.chdir(tmp_path)
    assert main(["suite", "--paper", "tiny", "--out", "out"]) == 0
    assert {path.parent.name for path in Path("out").rglob("results.json")} == {"umdf_tiny"}
    report = Path("out/report.md").read_text()
    assert "No published numbers are shown" in report
    assert main(["suite", "--paper", "none", "--out", "out"]) == 2
    assert "there is no configs/<method>_none.json here; expected --config FILE" in capsys.readouterr().err
    assert main(["suite", "--out", "out"]) == 2
    assert "expected either --config, or --paper with the name" in capsys.readouterr().err


def test_controls_are_the_same_system_under_other_terms(tiny_config: dict, tmp_path: Path) -> None:
    raw = json.loads((Path(__file__).parents[2] / "configs" / "cubemlp_mosi.json").read_text())
    file = tmp_path / "cubemlp_mosi.json"
    file.write_text(json.dumps(raw))
    full = Member("cubemlp_mosi", parse_config(raw), tmp_path / "out" / "cubemlp_mosi")
    missing, masked = controls(full, file, [])
    assert (missing.name, missing.variant) == ("cubemlp_mosi + missing training", "+ missing training")
    assert missing.folder == tmp_path / "out" / "cubemlp_mosi_missing_training"
    assert missing.config.missing.enabled
    assert masked.config.model.attention_mask == "missing"
    assert not masked.config.missing.enabled
    of_umdf = Member("tiny", parse_config(tiny_config), tmp_path / "out" / "tiny")
    assert controls(of_umdf, file, []) == []


@pytest.mark.parametrize("data", ["mosi", "mosei", "iemocap", "ict_mmmo", "cmu_mosi"])
def test_a_shared_schedule_is_that_of_hrlf(data: str) -> None:
    shipped = Path(__file__).parents[2] / "configs"
    lead = load_config(shipped / f"hrlf_{data}.json")
    files = sorted(shipped.glob(f"*_{data}.json"))
    files = [file for file in files if file.stem.removesuffix(f"_{data}") in METHODS]
    assert len(files) == 10
    for file in files:
        own, shared = load_config(file), load_config(file, shared_schedule(file))
        assert (shared.train.batch_size, shared.train.epochs, shared.train.patience) == (
            lead.train.batch_size,
            lead.train.epochs,
            None,
        )
        for key in ("optimizer", "scheduler", "gradient_clipping"):
            assert shared.deepspeed.get(key) == lead.deepspeed.get(key)
        assert shared.teacher is None or (shared.teacher.epochs, shared.teacher.patience) == (None, None)
        assert (shared.teacher is None) == (own.teacher is None)
        for block in ("method", "data", "model", "missing", "loss", "eval"):
            assert getattr(shared, block) == getattr(own, block)
        assert shared.deepspeed.get("fp16") == own.deepspeed.get("fp16")


def test_a_suite_under_one_schedule(
    configs: Callable[..., list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = configs(umdf_tiny={"train": {"patience": 1}})
    assert suite(files, tmp_path / "out", "--optim", "shared") == 2
    assert "hrlf_tiny.json: no such config file" in capsys.readouterr().err
    (lead,) = configs(hrlf_tiny={"train": {"epochs": 2, "batch_size": 4}})
    assert suite(files, tmp_path / "out", "--optim", "shared") == 0
    recorded = json.loads((tmp_path / "out" / "umdf_tiny" / "run.json").read_text())["config"]["train"]
    assert (recorded["epochs"], recorded["batch_size"], recorded["patience"]) == (2, 4, None)
    assert suite(files, tmp_path / "out") == 2
    assert "another config" in capsys.readouterr().err
    assert suite([lead.rename(tmp_path / "tiny.json")], tmp_path / "out", "--optim", "shared") == 2
    assert "tiny.json: expected a file named <method>_<data>.json" in capsys.readouterr().err


def test_an_interrupted_suite_continues_where_it_stopped(
    configs: Callable[..., list[Path]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files, out = configs(first={}, second={"loss": {"lambda_fea": 0.5}}), tmp_path / "out"

    class Stopping(interruption.InterruptionWatch):
        """Stops the second run after its third step."""

        runs = 0

        def __init__(self) -> None:
            super().__init__()
            Stopping.runs += 1
            self.steps = 0

        def agreed(self, device: torch.device, at_agreement: bool) -> bool:
            self.steps += 1
            self.requested |= Stopping.runs == 2 and self.steps == 3
            return super().agreed(device, at_agreement)

    with monkeypatch.context() as patch:
        patch.setattr(run, "InterruptionWatch", Stopping)
        assert suite(files, out) == 130
    assert not (out / "report.md").exists()
    assert progress(out / "first")["finished"]
    assert progress(out / "second")["step"] == 3
    before = finished(out / "first")
    capsys.readouterr()
    assert suite(files, out) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["first: done", "second: to do"]
    assert finished(out / "first") == before
    assert suite(files[1:], tmp_path / "whole") == 0
    assert_same(parameters(out / "second"), parameters(tmp_path / "whole" / "second"))


def test_a_signal_while_a_member_is_evaluated_stops_those_after_it(
    configs: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is nothing to save then, and the member ends as if nobody had asked."""
    trained: list[str] = []

    def train_run(config: Any, folder: Path, **how: Any) -> None:
        trained.append(folder.name)
        with interruption.InterruptionWatch():
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(run, "train_run", train_run)
    assert suite(configs(one={}, two={}), tmp_path / "out") == 130
    assert trained == ["one"]


def test_a_run_that_diverges_is_named_and_the_others_go_on(
    configs: Callable[..., list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    block = {"optimizer": {"type": "SGD", "params": {"lr": 10.0}}, "gradient_clipping": None}
    files, out = configs(wild={"deepspeed": block}, tame={}), tmp_path / "out"
    assert suite(files, out) == 2
    printed = capsys.readouterr()
    reason = (
        f"wild: {out / 'wild' / 'seed_1'}: the loss is not finite in epoch 1; expected a lower "
        "deepspeed.optimizer.params.lr, or deepspeed.gradient_clipping"
    )
    assert printed.err == f"error: 1 of 2 runs failed and are not in the report: {reason}\n"
    assert f"{reason.replace('wild: ', 'wild: failed: ', 1)}\n" in printed.out
    report = (out / "report.md").read_text()
    assert "| tame " in report
    assert "wild" not in report


class TestMistakesAreFoundBeforeTraining:
    @pytest.fixture(autouse=True)
    def no_training(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(*arguments: Any, **named: Any) -> None:
            raise AssertionError("trained")

        monkeypatch.setattr(run, "train_run", refuse)

    def test_a_typo_in_the_last_config(
        self, configs: Callable[..., list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        files = configs(first={}, last={"modle": {"width": 8}})
        assert suite(files, tmp_path / "out") == 2
        assert capsys.readouterr().err.startswith(f"error: {files[1]}: modle: unknown key; ")

    def test_data_that_are_not_there(
        self, configs: Callable[..., list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        files = configs(first={}, last={"data": {"path": str(tmp_path / "none.h5")}})
        assert suite(files, tmp_path / "out") == 2
        assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'none.h5'}: no such data file; ")

    def test_data_that_do_not_fit_the_last_config(
        self, configs: Callable[..., list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        files = configs(first={}, last={"train": {"task": "regression", "batch_size": 41, "epochs": 1}})
        assert suite(files, tmp_path / "out") == 2
        assert capsys.readouterr().err.startswith("error: last: train.batch_size: 41, but ")

    def test_emotions_without_a_single_label(
        self,
        configs: Callable[..., list[Path]],
        tiny_dataset: Callable[..., Dataset],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        dataset = tiny_dataset()
        dataset.label_kind = "emotions"
        for split in dataset.splits.values():
            split.labels = np.ones((len(split), 4), np.float32)
        store.write(dataset, tmp_path / "all.h5")
        task = {"task": "emotions-4way", "batch_size": 8, "epochs": 1, "select": "f1_4way"}
        files = configs(first={}, last={"train": task, "data": {"path": str(tmp_path / "all.h5")}})
        assert suite(files, tmp_path / "out") == 2
        assert capsys.readouterr().err.startswith("error: last: train.task: emotions-4way is for samples ")

    def test_two_configs_of_one_name(
        self, configs: Callable[..., list[Path]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (first,) = configs(same={})
        (tmp_path / "other").mkdir()
        second = first.rename(tmp_path / "other" / "same.json")
        configs(same={})
        assert suite([first, second], tmp_path / "out") == 2
        both = tmp_path / "out" / "same"
        assert capsys.readouterr().err == (
            f"error: --config {first} {second}: both would go to {both}; expected other file names\n"
        )


def test_overrides_reach_every_config(
    configs: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: dict[Path, tuple[int, ...]] = {}

    class Enough(Exception):
        pass

    def record(config: Any, output: Path, resume: bool, teacher: Path | None) -> None:
        assert resume
        assert teacher is None
        trained[output] = (config.train.epochs, *config.train.seeds)
        if len(trained) == 2:
            raise Enough

    monkeypatch.setattr(run, "train_run", record)
    with pytest.raises(Enough):
        suite(configs(a={}, b={}), tmp_path / "out", "--set", "train.epochs=7", "--seeds", "4,5")
    assert trained == {tmp_path / "out" / "a": (7, 4, 5), tmp_path / "out" / "b": (7, 4, 5)}


@pytest.mark.parametrize(
    ("done", "said"), [((), "to do"), ((2,), "1 of 3 seeds done"), ((1, 3), "2 of 3 seeds done"), ((1, 2, 3), "done")]
)
def test_the_plan_counts_evaluated_seeds(tiny_config: dict, tmp_path: Path, done: tuple[int, ...], said: str) -> None:
    tiny_config["train"]["seeds"] = [1, 2, 3]
    for seed in (1, 2, 3):
        (tmp_path / f"seed_{seed}").mkdir()
    for seed in done:
        (tmp_path / f"seed_{seed}" / "evaluation.json").touch()
    assert plan(Member("name", parse_config(tiny_config), tmp_path)) == said
