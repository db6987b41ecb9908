"""Teachers taken from another run: copied where they fit, refused in one line where they do not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_records import assert_same, assert_same_run, parameters, progress, records
from safetensors.torch import load_file

from fastmmkd.cli import train_main
from fastmmkd.data import store
from fastmmkd.data.dataset import Dataset
from fastmmkd.errors import Interrupted, UserError
from fastmmkd.model_file import serialised
from tests.engine.conftest import only_corrkd, stored

Train = Callable[..., Path]


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
        weights = load_file(str(file))
        file.write_bytes(serialised(weights | {"head.bias": torch.zeros(1, 2)}, {}))
        assert complain(raw, teacher) == f"{file}: the weights are not of the config's network"

    def test_a_run_without_a_teacher_phase(
        self, complain: Callable[[dict, Path], str], raw: dict, tiny_config: dict, teacher: Path
    ) -> None:
        for config in (tiny_config, raw | {"teacher": None}):
            assert complain(config, teacher) == (
                f"--teacher {teacher}: this run has no teacher phase; expected a config with a teacher block"
            )
