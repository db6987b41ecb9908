"""Training in this process: it learns, repeats itself, and continues an interrupted run bit for bit."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from run_records import (
    assert_same,
    assert_same_run,
    engine_state,
    parameters,
    progress,
    records,
    scalars,
    without_timings,
)

from fastmmkd.cli import main
from fastmmkd.data import store
from fastmmkd.data.dataset import Dataset
from fastmmkd.engine import device
from fastmmkd.errors import Interrupted, UserError
from fastmmkd.methods.method import Trainable
from tests.engine.conftest import stored
from tests.handmade import lacking

Train = Callable[..., Path]
STEPS_PER_EPOCH, EPOCHS = 5, 3


def test_the_loss_falls(train_tiny: Train, tiny_config: dict, tmp_path: Path) -> None:
    tiny_config["train"]["epochs"] = 12
    lines = records(train_tiny(tiny_config, tmp_path / "run"))
    assert lines[-1]["train"]["task"] < 0.5 * lines[0]["train"]["task"]
    assert lines[-1]["valid"]["mae"] < 0.8 * lines[0]["valid"]["mae"]


def test_a_run_writes_down_what_it_did(trained: Path, tiny_store: Path) -> None:
    record = json.loads((trained / "run.json").read_text())
    assert record["config"]["train"]["seeds"] == [1, 2]
    assert record["data_hash"] == store.read_header(tiny_store).content_hash
    assert record["precision"] == "fp32"
    assert record["world_size"] == 1
    assert {"torch", "deepspeed", "fastmmkd"} <= set(record["versions"])
    for seed in (1, 2):
        lines = records(trained, seed)
        assert [r["epoch"] for r in lines] == [1, 2, 3]
        assert [r["step"] for r in lines] == [5, 10, 15]
        assert set(lines[0]["train"]) == {"loss", "task", "fea", "logits"}
        train = lines[0]["train"]
        assert train["loss"] == pytest.approx(train["task"] + train["fea"] + train["logits"], rel=1e-6)
        assert progress(trained, seed)["finished"]
        assert {p.name for p in (trained / f"seed_{seed}" / "checkpoints").iterdir()} == {
            "latest.json",
            "previous.json",
            "epoch_3_step_0",
            "epoch_3_step_0_end",
        }
    assert not list(trained.rglob("*.tmp"))


def test_tensorboard_holds_what_metrics_jsonl_holds(trained: Path) -> None:
    assert scalars(trained, "valid/f1_non0") == [(r["step"], r["valid"]["f1_non0"]) for r in records(trained)]
    assert scalars(trained, "train/fea") == [(r["step"], r["train"]["fea"]) for r in records(trained)]


@pytest.mark.parametrize("method", ["umdf", "corrkd", "hrlf"])
def test_the_journal_has_gradient_sizes_on_request(
    method: str, train_tiny: Train, tiny_config: dict, tiny_store: Path, distilled_config_of: Callable, tmp_path: Path
) -> None:
    """One of every part, times its weight; asking for them changes nothing else."""
    config = tiny_config if method == "umdf" else distilled_config_of(method, tiny_store)
    config["loss"] = config.get("loss", {}) | ({"lambda_fea": 0.25} if method == "umdf" else {})
    plain = train_tiny(config, tmp_path / "plain")
    config["train"]["gradients"] = True
    asked = train_tiny(config, tmp_path / "asked")
    for folder in ["", "teacher"] if method != "umdf" else [""]:
        with_sizes, without = (
            [json.loads(line) for line in (run / "seed_1" / folder / "metrics.jsonl").read_text().splitlines()]
            for run in (asked, plain)
        )
        for record, other in zip(with_sizes, without, strict=True):
            assert set(record["gradients"]) == set(record["train"]) - {"loss"}
            assert record["gradients"]["task"] > 0
            assert "gradients" not in other
            assert record["train"] == other["train"]
            assert record["valid"] == other["valid"]


def test_gradient_sizes_are_weighted(train_tiny: Train, tiny_config: dict, tmp_path: Path) -> None:
    """At learning rate 0 a weight changes nothing else."""
    tiny_config["train"] |= {"gradients": True, "epochs": 1}
    tiny_config["deepspeed"]["optimizer"]["params"]["lr"] = 0.0
    whole = records(train_tiny(tiny_config, tmp_path / "whole"))[0]["gradients"]
    tiny_config["loss"] = {"lambda_fea": 0.25}
    quarter = records(train_tiny(tiny_config, tmp_path / "quarter"))[0]["gradients"]
    assert quarter == pytest.approx(whole | {"fea": 0.25 * whole["fea"]}, rel=1e-6)
    assert whole["fea"] > 0


class TestRepetition:
    def test_the_same_seed_gives_the_same_bits(
        self, train_tiny: Train, tiny_config: dict, trained: Path, tmp_path: Path
    ) -> None:
        assert_same_run(train_tiny(tiny_config, tmp_path / "again"), trained)

    def test_another_seed_gives_another_model(self, trained: Path) -> None:
        first, second = parameters(trained, 1), parameters(trained, 2)
        learned = [name for name in first if not name.startswith("normalisation.") and first[name].ndim > 2]
        assert learned
        assert not any(torch.equal(first[name], second[name]) for name in learned)

    @pytest.mark.parametrize(
        ("stop_after", "epoch", "step"),
        [
            pytest.param(7, 1, 2, id="within an epoch"),
            pytest.param(5, 0, 5, id="after an epoch's last step"),
            pytest.param(16, 3, 0, id="after the last epoch"),
        ],
    )
    def test_an_interrupted_run_continues_exactly(
        self,
        train_tiny: Train,
        tiny_config: dict,
        trained: Path,
        tmp_path: Path,
        stop_after: int,
        epoch: int,
        step: int,
    ) -> None:
        run = tmp_path / "run"
        with pytest.raises(Interrupted):
            train_tiny(tiny_config, run, stop_after=stop_after)
        assert (progress(run)["epoch"], progress(run)["step"]) == (epoch, step)
        assert not (run / "seed_1" / "evaluation.json").exists()
        train_tiny(tiny_config, run, resume=True)
        assert_same_run(run, trained)
        assert [s for s, _ in scalars(run, "valid/f1_non0")] == [5, 10, 15]

    @pytest.mark.parametrize("block", [{"scheduler": None}, {}], ids=["null", "left out"])
    def test_without_a_scheduler_the_learning_rate_is_constant(
        self, train_tiny: Train, tiny_config: dict, trained: Path, tmp_path: Path, block: dict
    ) -> None:
        tiny_config["deepspeed"] |= block
        with pytest.raises(Interrupted):
            train_tiny(tiny_config, tmp_path / "run", stop_after=7)
        run = train_tiny(tiny_config, tmp_path / "run", resume=True)
        assert [record["engine"]["lr"] for record in records(run)] == [0.003] * EPOCHS
        assert_same_run(run, trained)

    def test_null_is_no_clipping(self, train_tiny: Train, tiny_config: dict, trained: Path, tmp_path: Path) -> None:
        free, clipped = (copy.deepcopy(tiny_config) for _ in range(2))
        free["deepspeed"]["gradient_clipping"], clipped["deepspeed"]["gradient_clipping"] = None, 1e6
        unclipped, expected = train_tiny(free, tmp_path / "free"), train_tiny(clipped, tmp_path / "clipped")
        for name, value in parameters(expected, 1).items():
            torch.testing.assert_close(parameters(unclipped, 1)[name], value)
        name = "head.weight"
        assert not torch.equal(parameters(unclipped, 1)[name], parameters(trained, 1)[name])

    def test_a_run_interrupted_at_every_few_steps_is_still_the_same_run(
        self, train_tiny: Train, tiny_config: dict, trained: Path, tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        for attempt in range(3):
            with pytest.raises(Interrupted):
                train_tiny(tiny_config, run, resume=attempt > 0, stop_after=4)
            assert progress(run)["epoch"] * STEPS_PER_EPOCH + progress(run)["step"] == 4 * (attempt + 1)
        train_tiny(tiny_config, run, resume=True)
        assert_same_run(run, trained)

    def test_a_run_killed_between_two_checkpoints_continues_exactly(
        self, train_tiny: Train, tiny_config: dict, trained: Path, tmp_path: Path
    ) -> None:
        """What was recorded after the last checkpoint is recorded again, once."""
        run = tmp_path / "run"
        with pytest.raises(Interrupted):
            train_tiny(tiny_config, run, stop_after=7)
        lost = records(trained)[1]
        with (run / "seed_1" / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(lost) + "\n" + json.dumps(lost)[:20])  # the last line was cut off
        train_tiny(tiny_config, run, resume=True)
        assert_same_run(run, trained)

    @pytest.mark.parametrize(("block", "stage"), [({"bf16": {"enabled": True}}, 2), ({}, 1)], ids=["bf16", "fp32"])
    def test_zero_optimisation_continues_exactly_too(
        self, train_tiny: Train, tiny_config: dict, tmp_path: Path, block: dict, stage: int
    ) -> None:
        tiny_config["deepspeed"] |= {**block, "zero_optimization": {"stage": stage}}
        tiny_config["train"]["epochs"] = 2
        whole = train_tiny(tiny_config, tmp_path / "whole")
        with pytest.raises(Interrupted):
            train_tiny(tiny_config, tmp_path / "parts", stop_after=3)
        parts = train_tiny(tiny_config, tmp_path / "parts", resume=True)
        assert_same(parameters(parts), parameters(whole))
        assert without_timings(records(parts)) == without_timings(records(whole))
        assert progress(parts) == progress(whole)

    @pytest.mark.parametrize("stage", [0, 1])
    def test_master_weights_and_moments_of_a_run_in_bf16_continue_exactly(
        self, train_tiny: Train, tiny_config: dict, tmp_path: Path, stage: int
    ) -> None:
        tiny_config["deepspeed"] |= {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
        tiny_config["train"]["epochs"] = 2
        whole = train_tiny(tiny_config, tmp_path / "whole")
        with pytest.raises(Interrupted):
            train_tiny(tiny_config, tmp_path / "parts", stop_after=3)
        parts = train_tiny(tiny_config, tmp_path / "parts", resume=True)
        assert_same_run(parts, whole)
        ((_, saved),) = engine_state(parts).items()
        assert {name: x.dtype for name, x in saved["optimizer"]["state"].items()} == dict.fromkeys(
            ("weights", "exp_avg", "exp_avg_sq", "step"), torch.float32
        )
        assert {x.dtype for x in saved["module"].values()} == {torch.bfloat16}
        assert parameters(parts)["head.weight"].dtype == torch.bfloat16


class TestResumption:
    def test_finished_seeds_are_kept_and_more_may_be_added(
        self,
        train_tiny: Train,
        tiny_config: dict,
        trained: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        run = train_tiny(tiny_config, tmp_path / "run")
        before = {p: p.stat().st_mtime_ns for p in (run / "seed_1").rglob("*")}
        first = json.loads((run / "run.json").read_text())
        assert first["resumed"] == []
        tiny_config["train"]["seeds"] = [1, 2]
        capsys.readouterr()
        train_tiny(tiny_config, run, resume=True)
        second = json.loads((run / "run.json").read_text())
        assert second["started"] == first["started"]
        assert len(second["resumed"]) == 1
        assert second["config"]["train"]["seeds"] == [1, 2]
        assert "seed 1: finished before" in capsys.readouterr().out.splitlines()
        assert {p: p.stat().st_mtime_ns for p in (run / "seed_1").rglob("*")} == before
        assert_same_run(run, trained, seed=2)

    def test_an_existing_run_is_not_touched_without_resume(
        self, train_tiny: Train, tiny_config: dict, trained: Path
    ) -> None:
        tiny_config["train"]["seeds"] = [1, 2]
        with pytest.raises(UserError) as caught:
            train_tiny(tiny_config, trained)
        assert str(caught.value) == (
            f"{trained}: already holds a run; expected --resume to continue it, or another --out"
        )

    def test_a_finished_run_may_go_on_for_more_epochs(
        self, train_tiny: Train, tiny_config: dict, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """It ends as the longer one would have from the start; so does one that was stopped in its first seed."""
        tiny_config["train"] |= {"seeds": [1, 2], "epochs": 5}
        whole = train_tiny(tiny_config, tmp_path / "whole")
        run = tmp_path / "run"
        shutil.copytree(trained, run)
        tiny_config["train"]["epochs"] = 4
        with pytest.raises(Interrupted):
            train_tiny(tiny_config, run, resume=True, stop_after=3)
        assert progress(run)["tag"] == "epoch_3_step_3"
        tiny_config["train"]["epochs"] = 5
        train_tiny(tiny_config, run, resume=True)
        for seed in (1, 2):
            assert_same_run(run, whole, seed)
        assert json.loads((run / "run.json").read_text())["config"]["train"]["epochs"] == 5
        before = {path: path.stat().st_mtime_ns for path in (run / "seed_1").rglob("*")}
        train_tiny(tiny_config, run, resume=True)
        assert {path: path.stat().st_mtime_ns for path in (run / "seed_1").rglob("*")} == before

    def test_without_its_checkpoints_it_may_not(
        self, train_tiny: Train, tiny_config: dict, trained: Path, tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        shutil.copytree(trained, run)
        shutil.rmtree(run / "seed_2" / "checkpoints")
        tiny_config["train"] |= {"seeds": [1, 2], "epochs": 5}
        with pytest.raises(UserError, match=r"seed_2: no checkpoints to go on from; expected no more train\.epochs$"):
            train_tiny(tiny_config, run, resume=True)
        assert (run / "seed_1" / "evaluation.json").exists()

    def test_patience_that_is_over_stays_so(self, train_tiny: Train, tiny_config: dict, tmp_path: Path) -> None:
        tiny_config["train"] |= {"patience": 1, "epochs": 4}
        tiny_config["deepspeed"]["optimizer"]["params"]["lr"] = 0.0
        run = train_tiny(tiny_config, tmp_path / "run")
        tiny_config["train"]["epochs"] = 9
        train_tiny(tiny_config, run, resume=True)
        assert [record["epoch"] for record in records(run)] == [1, 2]

    def test_it_is_said_where_the_schedule_ends_before_the_training(
        self, train_tiny: Train, tiny_config: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        params = {"total_num_steps": 15, "warmup_num_steps": 2, "warmup_max_lr": 0.003}
        tiny_config["deepspeed"]["scheduler"] = {"type": "WarmupDecayLR", "params": params}
        run, said = (
            tmp_path / "run",
            "deepspeed.scheduler.params.total_num_steps: the learning rate's schedule ends at ",
        )
        train_tiny(tiny_config, run)
        assert said not in capsys.readouterr().out
        tiny_config["train"]["epochs"] = 4
        train_tiny(tiny_config, run, resume=True)
        assert f"{said}step 15 of 20\n" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("block", "key", "value", "message"),
        [
            ("train", "epochs", 2, "train.epochs was 3, is 2"),
            ("train", "seeds", [1, 3], "train.seeds was [1, 2], is [1, 3]"),
            ("loss", "lambda_fea", 0.5, "loss.lambda_fea was 1.0, is 0.5"),
            ("deepspeed", "gradient_clipping", 2.0, "deepspeed.gradient_clipping was 1.0, is 2.0"),
        ],
    )
    def test_another_config_is_refused_by_key(
        self, train_tiny: Train, tiny_config: dict, trained: Path, block: str, key: str, value: Any, message: str
    ) -> None:
        tiny_config["train"]["seeds"] = [1, 2]
        tiny_config.setdefault(block, {})[key] = value
        with pytest.raises(UserError) as caught:
            train_tiny(tiny_config, trained, resume=True)
        assert str(caught.value) == f"{trained / 'run.json'}: --resume with another config: {message}"

    def test_other_data_are_refused_by_name(
        self, train_tiny: Train, tiny_config: dict, tiny_store: Path, trained: Path, tmp_path: Path
    ) -> None:
        dataset = store.read(tiny_store)
        dataset.splits["train"].labels[0] += 0.2
        tiny_config["data"]["path"] = stored(dataset, tmp_path / "other.h5")
        tiny_config["train"]["seeds"] = [1, 2]
        with pytest.raises(UserError, match=r"--resume with other data: .*other\.h5 is not the file"):
            train_tiny(tiny_config, trained, resume=True)

    def test_the_same_data_may_have_moved(
        self, train_tiny: Train, tiny_config: dict, tiny_store: Path, tmp_path: Path
    ) -> None:
        run = tmp_path / "run"
        with pytest.raises(Interrupted):
            train_tiny(tiny_config, run, stop_after=2)
        tiny_config["data"]["path"] = stored(store.read(tiny_store), tmp_path / "moved.h5")
        train_tiny(tiny_config, run, resume=True)
        assert progress(run)["finished"]

    def test_another_precision_is_refused(self, train_tiny: Train, tiny_config: dict, tmp_path: Path) -> None:
        run = tmp_path / "run"
        with pytest.raises(Interrupted):
            train_tiny(tiny_config, run, stop_after=2)
        record = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(record | {"precision": "fp16"}))
        with pytest.raises(UserError, match="--resume in fp32 of a run in fp16"):
            train_tiny(tiny_config, run, resume=True)

    @pytest.mark.parametrize("block", [{}, {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}])
    def test_a_checkpoint_with_deepspeeds_own_update_is_named(
        self, train_tiny: Train, tiny_config: dict, tmp_path: Path, block: dict, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        tiny_config["deepspeed"] |= block
        with monkeypatch.context() as patch:
            patch.setattr(device, "flat_adam", lambda block, models: None)
            with pytest.raises(Interrupted):
                train_tiny(tiny_config, tmp_path / "run", stop_after=2)
        with pytest.raises(UserError) as caught:
            train_tiny(tiny_config, tmp_path / "run", resume=True)
        folder = tmp_path / "run" / "seed_1"
        assert str(caught.value) == (
            f"{folder / 'checkpoints' / progress(tmp_path / 'run')['tag']}: a checkpoint with another optimiser's "
            f"state; expected flat master weights and moments; remove {folder} to train anew"
        )

    def test_a_damaged_checkpoint_is_named(self, train_tiny: Train, tiny_config: dict, tmp_path: Path) -> None:
        run = tmp_path / "run"
        with pytest.raises(Interrupted):
            train_tiny(tiny_config, run, stop_after=2)
        tag = progress(run)["tag"]
        (file,) = (run / "seed_1" / "checkpoints" / tag).iterdir()
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(UserError, match=f"{tag}: a damaged checkpoint"):
            train_tiny(tiny_config, run, resume=True)
        file.unlink()
        with pytest.raises(UserError, match=tag):
            train_tiny(tiny_config, run, resume=True)


class TestRefusals:
    """Mistakes are found before the first step, and leave nothing that would stand in the way of the corrected run."""

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            (
                "batch_size",
                41,
                r"train\.batch_size: 41, but .*tiny\.h5 has 40 training samples; .*, --set train\.batch_size=40$",
            ),
            ("select", "acc9", r"train\.select: 'acc9' is no metric of regression; expected one of f1_non0, mae"),
            (
                "task",
                "emotions-4way",
                r"train\.task: emotions-4way needs emotions labels, .*tiny\.h5 has score labels; "
                r"expected one of regression, classification-2, classification-3, classification-7$",
            ),
        ],
    )
    def test_what_does_not_fit_the_data(
        self, train_tiny: Train, tiny_config: dict, tmp_path: Path, key: str, value: Any, message: str
    ) -> None:
        with pytest.raises(UserError, match=message):
            train_tiny(tiny_config | {"train": tiny_config["train"] | {key: value}}, tmp_path / "run")
        assert not (tmp_path / "run" / "run.json").exists()

    def test_a_missing_data_file_names_both_remedies(
        self, train_tiny: Train, tiny_config: dict, tmp_path: Path
    ) -> None:
        path = tmp_path / "my_mosei.h5"
        tiny_config["data"]["path"] = str(path)
        with pytest.raises(UserError) as caught:
            train_tiny(tiny_config, tmp_path / "run")
        message = str(caught.value)
        assert message.startswith(f"{path}: no such data file; ")
        assert f"`fastmmkd data import --format mult SRC --out {path}`" in message
        assert f"`fastmmkd data synth --like mosei --fraction 1.0 --seed 1 --out {path}`" in message
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize("log_every", [1, 100])
    def test_a_loss_that_is_not_finite(
        self, train_tiny: Train, tiny_config: dict, tmp_path: Path, log_every: int
    ) -> None:
        tiny_config["deepspeed"] |= {"optimizer": {"type": "SGD", "params": {"lr": 10.0}}, "gradient_clipping": None}
        tiny_config["train"]["log_every"] = log_every
        with pytest.raises(UserError) as caught:
            train_tiny(tiny_config, tmp_path / "run")
        assert str(caught.value) == (
            f"{tmp_path / 'run' / 'seed_1'}: the loss is not finite in epoch 1; expected a lower "
            "deepspeed.optimizer.params.lr, or deepspeed.gradient_clipping"
        )
        assert not (tmp_path / "run" / "seed_1" / "checkpoints").exists()

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            (
                "optimizer",
                {"type": "SGD", "params": {"lr": 0.1, "torch_adam": True}},
                "deepspeed: .*'torch_adam'.*, see ",
            ),
            ("scheduler", {"type": "Nope"}, "deepspeed: .*Nope.*, see "),
            ("zero_optimization", {"stage": 2, "reduce_bucket_size": -1}, "deepspeed: .*reduce_bucket_size.*, see "),
            ("communication_data_type", "x", "deepspeed: .*, see "),
            ("optimizer", {"type": "SGD", "params": {"lr": 10.0}}, "the loss is not finite in epoch 1"),
        ],
    )
    def test_what_only_deepspeed_or_the_first_epoch_refuses_leaves_the_folder_free(
        self, train_tiny: Train, tiny_config: dict, trained: Path, tmp_path: Path, key: str, value: Any, message: str
    ) -> None:
        odd = copy.deepcopy(tiny_config)
        odd["deepspeed"] |= {key: value, "gradient_clipping": None}
        odd["train"]["log_every"] = 100
        with pytest.raises(UserError, match=message) as caught:
            train_tiny(odd, tmp_path / "run")
        assert "\n" not in str(caught.value)
        assert {path.name for path in (tmp_path / "run").iterdir()} == {"deepspeed.log", "run.lock"}
        assert_same_run(train_tiny(tiny_config, tmp_path / "run"), trained)

    def test_a_refused_resumption_forgets_nothing(self, train_tiny: Train, tiny_config: dict, tmp_path: Path) -> None:
        with pytest.raises(Interrupted):
            train_tiny(tiny_config, tmp_path / "run", stop_after=2)
        before = {path for path in (tmp_path / "run").rglob("*") if "tensorboard" not in path.parts}
        tiny_config["loss"] = {"lambda_fea": 0.5}
        with pytest.raises(UserError, match="--resume with another config"):
            train_tiny(tiny_config, tmp_path / "run", resume=True)
        assert {path for path in (tmp_path / "run").rglob("*") if "tensorboard" not in path.parts} == before


class TestSelection:
    @pytest.mark.parametrize(("metric", "best"), [("mae", min), ("corr", max)])
    def test_the_exported_model_is_the_best_epoch(
        self, train_tiny: Train, tiny_config: dict, tmp_path: Path, metric: str, best: Callable
    ) -> None:
        tiny_config["train"] |= {"select": metric, "epochs": 5}
        tiny_config["deepspeed"]["optimizer"]["params"]["lr"] = 0.03  # too much, so that the best is not the last
        run = train_tiny(tiny_config, tmp_path / "run")
        scores = [record["valid"][metric] for record in records(run)]
        assert progress(run)["best"] == best(scores)
        assert progress(run)["best_epoch"] == scores.index(best(scores)) + 1

    def test_it_may_look_at_complete_samples_alone(
        self, train_tiny: Train, tiny_config: dict, trained: Path, tmp_path: Path
    ) -> None:
        tiny_config["train"]["select_on"] = "complete"
        run = train_tiny(tiny_config, tmp_path / "run")
        assert [record["train"] for record in records(run)] == [record["train"] for record in records(trained)]
        scores = [record["valid"]["f1_non0"] for record in records(run)]
        assert scores != [record["valid"]["f1_non0"] for record in records(trained)]
        assert progress(run)["best"] == max(scores)

    def test_patience_stops_after_epochs_without_a_better_one(
        self, train_tiny: Train, tiny_config: dict, tmp_path: Path
    ) -> None:
        tiny_config["train"] |= {"patience": 2, "epochs": 9}
        tiny_config["deepspeed"]["optimizer"]["params"]["lr"] = 0.0
        run = train_tiny(tiny_config, tmp_path / "run")
        assert [record["epoch"] for record in records(run)] == [1, 2, 3]
        assert progress(run)["best_epoch"] == 1
        assert progress(run)["finished"]


class TestOtherData:
    def test_unaligned_sequences(
        self, train_tiny: Train, tiny_config: dict, tiny_dataset: Callable[..., Dataset], tmp_path: Path
    ) -> None:
        tiny_config["data"]["path"] = stored(tiny_dataset(steps=(4, 7, 5)), tmp_path / "unaligned.h5")
        lines = records(train_tiny(tiny_config, tmp_path / "run"))
        assert lines[-1]["train"]["loss"] < lines[0]["train"]["loss"]

    def test_without_missingness_nothing_depends_on_the_draws(
        self, train_tiny: Train, tiny_config: dict, tmp_path: Path
    ) -> None:
        """Both versions are the complete sample, so that what is between them vanishes."""
        tiny_config["missing"] = {"enabled": False}
        for record in records(train_tiny(tiny_config, tmp_path / "run")):
            assert record["train"]["fea"] == pytest.approx(0, abs=1e-6)
            assert record["train"]["logits"] == 0

    def test_classes_of_scores(self, train_tiny: Train, tiny_config: dict, tmp_path: Path) -> None:
        tiny_config["train"]["task"] = "classification-3"
        run = train_tiny(tiny_config, tmp_path / "run")
        evaluation = json.loads((run / "seed_1" / "evaluation.json").read_text())
        assert evaluation["conditions"]["lav"]["samples"] == 14
        assert "acc3" in evaluation["conditions"]["lav"]["metrics"]

    def test_samples_without_a_single_emotion_are_refused_or_dropped(
        self, train_tiny: Train, tiny_config: dict, tiny_dataset: Callable[..., Dataset], tmp_path: Path
    ) -> None:
        dataset = tiny_dataset()
        dataset.label_kind = "emotions"
        for split in dataset.splits.values():
            split.labels = np.eye(4, dtype=np.float32)[np.digitize(split.labels, [-1.5, 0, 1.5])]
            split.labels[:3] = [[0, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 1]]
        tiny_config["data"]["path"] = stored(dataset, tmp_path / "emotions.h5")
        tiny_config["train"] |= {"task": "emotions-4way", "epochs": 1, "select": None}
        with pytest.raises(UserError, match=r"of 66 samples in .*emotions\.h5 3 hold none and 6 several \(train 3,"):
            train_tiny(tiny_config, tmp_path / "run")
        tiny_config["data"]["ambiguous"] = "drop"
        run = train_tiny(tiny_config, tmp_path / "run", results=True)
        results = json.loads((run / "results.json").read_text())
        assert results["conditions"]["lav"]["samples"] == 14 - 3
        assert results["data"].endswith(", without 9 of 66 samples that hold no or several emotions")
        assert results["data_hash"] == store.read_header(tmp_path / "emotions.h5").content_hash
        before = (run / "results.json").read_bytes()
        assert main(["eval", "--run", str(run)]) == 0
        assert (run / "results.json").read_bytes() == before

    @pytest.mark.parametrize("task", ["emotions-binary", "emotions-4way"])
    def test_emotions_and_samples_that_lack_modalities(
        self, train_tiny: Train, tiny_config: dict, tiny_dataset: Callable[..., Dataset], tmp_path: Path, task: str
    ) -> None:
        dataset = tiny_dataset()
        dataset.label_kind = "emotions"
        for name, split in dataset.splits.items():
            split.labels = np.eye(4, dtype=np.float32)[np.digitize(split.labels, [-1.5, 0, 1.5])]
            dataset.splits[name] = lacking(split, "language", slice(4))
        tiny_config["data"]["path"] = stored(dataset, tmp_path / "emotions.h5")
        tiny_config["train"] |= {"task": task, "epochs": 4, "select": None}
        run = train_tiny(tiny_config, tmp_path / "run", results=True)
        results = json.loads((run / "results.json").read_text())
        samples = {name: outcome["samples"] for name, outcome in results["conditions"].items()}
        assert samples == {"l": 10, "a": 14, "v": 14, "la": 10, "lv": 10, "av": 14, "lav": 10}
        lines = records(run)
        assert lines[-1]["train"]["task"] < lines[0]["train"]["task"]


class TestOrder:
    def order(self, seed: int, epoch: int) -> torch.Tensor:
        return Trainable().order(torch.arange(5, 48), seed, epoch)

    def test_an_epoch_takes_every_sample_once(self) -> None:
        assert sorted(self.order(seed=3, epoch=2).tolist()) == list(range(5, 48))

    def test_it_depends_on_seed_and_epoch_alone(self) -> None:
        torch.manual_seed(0)
        first = self.order(seed=1, epoch=0)
        torch.manual_seed(99)
        assert torch.equal(self.order(seed=1, epoch=0), first)
        assert not torch.equal(self.order(seed=1, epoch=1), first)
        assert not torch.equal(self.order(seed=2, epoch=0), first)
        self.order(seed=2**31 - 1, epoch=10**5)
