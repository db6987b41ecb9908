"""Checkpoints: what a file holds is not run, what is damaged is noticed, and what is kept is enough to go on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from run_records import assert_same_run, progress
from safetensors.torch import load_file

from fastmmkd.cli import main
from fastmmkd.engine.teachers import is_at_floor
from fastmmkd.errors import Interrupted, UserError
from fastmmkd.files import sha256
from fastmmkd.model_file import import_model, read_facts, serialised
from fastmmkd.predictor import load

Train = Callable[..., Path]
BLOCKS: dict[str, dict[str, Any]] = {
    "flat": {},
    "stage 0": {"optimizer": {"type": "SGD", "params": {"lr": 0.01}}},
    "stage 1": {"zero_optimization": {"stage": 1, "overlap_comm": False}},
    "stage 2": {"zero_optimization": {"stage": 2}},
    "stage 2 in bf16": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
}


def checkpoint_files(run: Path, pointer: str = "latest.json") -> list[Path]:
    folder = run / "seed_1" / "checkpoints"
    return sorted((folder / json.loads((folder / pointer).read_text())["tag"]).iterdir())


def rehash(run: Path) -> None:
    """Write the hashes anew, as somebody would who means to change a checkpoint."""
    pointer = run / "seed_1" / "checkpoints" / "latest.json"
    saved = json.loads(pointer.read_text())
    saved["files"] = {file.name: sha256(file) for file in checkpoint_files(run)}
    pointer.write_text(json.dumps(saved))


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS)
def test_a_payload_in_any_file_of_a_checkpoint_does_not_run(
    train_tiny: Train, tiny_config: dict, tmp_path: Path, block: dict
) -> None:
    tiny_config["deepspeed"] |= block
    run, ran = tmp_path / "run", tmp_path / "ran"
    with pytest.raises(Interrupted):
        train_tiny(tiny_config, run, stop_after=2)
    files = checkpoint_files(run)
    assert any("model_states" in file.name for file in files)
    assert any("optim_states" in file.name for file in files) == ("zero_optimization" in block)
    for file in files:
        whole = file.read_bytes()
        torch.save(torch.load(file, weights_only=False) | {"more": Payload(ran)}, file)
        rehash(run)
        with pytest.raises(UserError, match=f"{file.name} holds more than a checkpoint of DeepSpeed, and was not run"):
            train_tiny(tiny_config, run, resume=True)
        assert not ran.exists()
        file.write_bytes(whole)
        rehash(run)
    train_tiny(tiny_config, run, resume=True)
    assert progress(run)["finished"]


class TestDamage:
    @pytest.fixture
    def stopped(self, train_tiny: Train, tiny_config: dict, tmp_path: Path) -> Path:
        """A run that was stopped within its second epoch: its checkpoints are of epoch 1 and of the step."""
        with pytest.raises(Interrupted):
            train_tiny(tiny_config, tmp_path / "run", stop_after=7)
        return tmp_path / "run"

    @pytest.mark.parametrize("part", [0.001, 0.3, 0.5, 0.7, 0.999])
    def test_a_flipped_bit_in_the_newest_checkpoint_costs_the_steps_since_the_one_before(
        self,
        stopped: Path,
        train_tiny: Train,
        tiny_config: dict,
        trained: Path,
        capsys: pytest.CaptureFixture[str],
        part: float,
    ) -> None:
        (file,) = checkpoint_files(stopped)
        flip(file, int(part * 8 * file.stat().st_size))
        capsys.readouterr()
        train_tiny(tiny_config, stopped, resume=True)
        assert (
            f"{file.parent}: a damaged checkpoint ({file.name} is not what was written): going on from the one before, "
            "of epoch 1, step 0"
        ) in capsys.readouterr().out.splitlines()
        assert_same_run(stopped, trained)

    @pytest.mark.parametrize("content", [None, "", "{", "[]", "{}", '{"tag": "epoch_1_step_2"}', "[" * 100_000])
    def test_so_does_a_damaged_pointer(
        self, stopped: Path, train_tiny: Train, tiny_config: dict, trained: Path, content: str | None
    ) -> None:
        pointer = stopped / "seed_1" / "checkpoints" / "latest.json"
        if content is None:
            pointer.unlink()
        else:
            pointer.write_text(content)
        train_tiny(tiny_config, stopped, resume=True)
        assert_same_run(stopped, trained)

    @pytest.mark.parametrize(
        ("key", "value"),
        [
            ("tag", "../../../elsewhere"),
            ("tag", 3),
            ("world_size", 0),
            ("step", -1),
            ("files", {}),
            ("files", ["mp_rank_00_model_states.pt"]),
            ("epoch", -5),
            ("epoch", True),
            ("epoch", 10**30),
            ("best", "0.5"),
            ("sums", {"loss": None}),
            ("finished", 1),
        ],
    )
    def test_odd_values_in_a_pointer_are_refused(
        self, stopped: Path, train_tiny: Train, tiny_config: dict, key: str, value: Any
    ) -> None:
        folder = stopped / "seed_1" / "checkpoints"
        for name in ("latest.json", "previous.json"):
            pointer = folder / name
            said = json.loads(pointer.read_text())
            (said if key in said else said["seeds"][0])[key] = value
            pointer.write_text(json.dumps(said))
        with pytest.raises(UserError) as caught:
            train_tiny(tiny_config, stopped, resume=True)
        assert str(caught.value) == (
            f"{folder / 'latest.json'}: not a checkpoint's latest.json; expected the keys of this version; remove "
            f"{stopped / 'seed_1'} to train anew"
        )

    def test_a_pointer_of_an_earlier_version_is_read(
        self, stopped: Path, train_tiny: Train, tiny_config: dict, trained: Path
    ) -> None:
        """Its `step` was the seed's own, within the epoch, which is what a run goes on from."""
        pointer = stopped / "seed_1" / "checkpoints" / "latest.json"
        said = json.loads(pointer.read_text())
        (own,) = said.pop("seeds")
        assert said["step"] == 5 * own["epoch"] + own["step"] > own["step"]
        pointer.write_text(json.dumps(said | own))
        train_tiny(tiny_config, stopped, resume=True)
        assert_same_run(stopped, trained)

    def test_both_damaged_are_named_with_the_way_on(
        self, stopped: Path, train_tiny: Train, tiny_config: dict, trained: Path
    ) -> None:
        (newest,), (before,) = checkpoint_files(stopped), checkpoint_files(stopped, "previous.json")
        flip(before, 4321)
        newest.unlink()
        with pytest.raises(UserError) as caught:
            train_tiny(tiny_config, stopped, resume=True)
        assert str(caught.value) == (
            f"{newest.parent}: a damaged checkpoint ({newest.name}: No such file or directory); remove "
            f"{stopped / 'seed_1'} to train anew"
        )

    def test_a_model_that_is_damaged_while_the_run_rests(
        self, stopped: Path, train_tiny: Train, tiny_config: dict
    ) -> None:
        file = stopped / "seed_1" / "model.safetensors"
        flip(file, 4 * file.stat().st_size)
        with pytest.raises(UserError) as caught:
            train_tiny(tiny_config, stopped, resume=True)
        assert str(caught.value) == (
            f"{file}: a damaged model, it is not what was written; remove {stopped / 'seed_1'} to train anew"
        )


class TestModels:
    @pytest.fixture
    def file(self, trained: Path, tmp_path: Path) -> Path:
        file = tmp_path / "model.safetensors"
        file.write_bytes((trained / "seed_1" / "model.safetensors").read_bytes())
        return file

    def test_any_flipped_bit_is_noticed(self, file: Path) -> None:
        import_model(file.parent)
        bits = 8 * file.stat().st_size
        for bit in [*range(64), *range(64, 8 * 600, 37), *range(8 * 600, bits, bits // 50), bits - 1]:
            flip(file, bit)
            with pytest.raises(UserError, match=r"model\.safetensors: (not an exported model|a damaged model)"):
                import_model(file.parent)
            flip(file, bit)
        import_model(file.parent)

    def test_the_same_tensors_and_facts_are_the_same_bytes(self, file: Path) -> None:
        tensors, facts = load_file(str(file)), read_facts(file.parent)
        again = serialised(dict(reversed(tensors.items())), dict(reversed(facts.items())))
        assert again == file.read_bytes()

    def test_its_mode_is_what_the_umask_leaves(self, trained: Path) -> None:
        umask = os.umask(0)
        os.umask(umask)
        assert (trained / "seed_1" / "model.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask

    @pytest.mark.usefixtures("process_state")
    def test_eval_predict_and_teacher_refuse_it(
        self,
        trained: Path,
        tiny_store: Path,
        tmp_path: Path,
        capfd: pytest.CaptureFixture[str],
    ) -> None:
        run = tmp_path / "run"
        for path in ("run.json", "seed_1/model.safetensors"):
            (run / path).parent.mkdir(parents=True, exist_ok=True)
            (run / path).write_bytes((trained / path).read_bytes())
        file = run / "seed_1" / "model.safetensors"
        flip(file, 8 * file.stat().st_size - 5)
        for command in (
            ["eval", "--run", str(run)],
            ["predict", "--run", str(run), "--data", str(tiny_store), "--out", str(tmp_path / "out.csv")],
        ):
            assert main(command) == 2
            assert capfd.readouterr().err == f"error: {file}: a damaged model, it is not what was written\n"
        assert not (run / "results.json").exists()
        assert not (tmp_path / "out.csv").exists()
        with pytest.raises(UserError, match="a damaged model"):
            load(run)
        with pytest.raises(UserError, match="a damaged model"):
            is_at_floor(file.parent)
