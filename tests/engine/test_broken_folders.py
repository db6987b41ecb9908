"""Full disks, folders that cannot be written or are gone, and files of a run that are not what they were."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from run_records import assert_same_run, progress, records

from fastmmkd.engine import trainer
from fastmmkd.errors import CannotWrite, Interrupted, UserError
from fastmmkd.files import refuse_unwritable, replacing

Train = Callable[..., Path]
NESTED = "[" * 100_000


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can grow beyond a size, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def at_save(monkeypatch: pytest.MonkeyPatch, number: int, happens: Callable[[], Any]) -> None:
    """Have something happen just before the n-th checkpoint is saved."""
    save, count = trainer.save_checkpoint, iter(range(1, 100))

    def with_event(*arguments: Any) -> None:
        if next(count) == number:
            happens()
        save(*arguments)

    monkeypatch.setattr(trainer, "save_checkpoint", with_event)


class TestFullDisks:
    def test_a_checkpoint_that_does_not_fit_leaves_the_one_before(
        self, train_tiny: Train, tiny_config: dict, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        run = tmp_path / "run"
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        with monkeypatch.context() as patch:
            at_save(patch, 2, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, limits[1])))
            try:
                with pytest.raises(CannotWrite) as caught:
                    train_tiny(tiny_config, run)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert str(caught.value) == (
            f"{run / 'seed_1' / 'checkpoints' / 'epoch_2_step_0'}: cannot save this checkpoint (File too large); what "
            "was saved before is kept: continue with --resume once it can be written"
        )
        assert progress(run)["epoch"] == 1
        assert not (run / "seed_1" / "checkpoints" / "epoch_2_step_0").exists()
        assert_same_run(train_tiny(tiny_config, run, resume=True), trained)

    def test_one_that_never_fits_leaves_the_folder_free(
        self, train_tiny: Train, tiny_config: dict, tmp_path: Path
    ) -> None:
        with room_for(150_000), pytest.raises(CannotWrite, match=r"File too large\); nothing was saved before$"):
            train_tiny(tiny_config, tmp_path / "run")
        assert {path.name for path in (tmp_path / "run").iterdir()} == {"deepspeed.log", "run.lock"}

    @pytest.mark.parametrize("size", [10, 300, 20_000])
    def test_so_with_every_other_file(
        self, train_tiny: Train, tiny_config: dict, tmp_path: Path, size: int, capfd: pytest.CaptureFixture[str]
    ) -> None:
        """run.lock, run.json, TensorBoard's, model.safetensors."""
        with room_for(size), pytest.raises(UserError, match="File too large") as caught:
            train_tiny(tiny_config, tmp_path / "run")
        assert "\n" not in str(caught.value)
        assert "Traceback" not in "".join(capfd.readouterr())
        assert not (tmp_path / "run" / "run.json").exists()

    @pytest.mark.parametrize("log", ["metrics.jsonl", "tensorboard"])
    def test_a_log_that_cannot_be_written_is_named(
        self, train_tiny: Train, tiny_config: dict, tmp_path: Path, log: str
    ) -> None:
        run = tmp_path / "run"
        with pytest.raises(Interrupted):
            train_tiny(tiny_config, run, stop_after=7)
        path = run / "seed_1" / log
        if path.is_dir():
            shutil.rmtree(path)
            path.touch()
        else:
            path.unlink()
            path.mkdir()
        with pytest.raises(CannotWrite, match=f"^{path}: cannot write this file .*; what was saved before is kept: "):
            train_tiny(tiny_config, run, resume=True)
        assert progress(run)["epoch"] == 1


class TestFolders:
    @pytest.mark.parametrize("step", [1, 2])
    def test_one_that_is_removed_while_it_trains(
        self, train_tiny: Train, tiny_config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
    ) -> None:
        run = tmp_path / "run"
        at_save(monkeypatch, step, lambda: shutil.rmtree(run))
        with pytest.raises(CannotWrite) as caught:
            train_tiny(tiny_config, run)
        assert str(caught.value).endswith(f"(No such file or directory); {run} is gone, and what it held")
        assert not run.exists()

    def test_one_that_cannot_be_written(self, train_tiny: Train, tiny_config: dict) -> None:
        with pytest.raises(CannotWrite, match=r"^/proc: cannot write in this folder \("):
            train_tiny(tiny_config, Path("/proc"))

    def test_a_read_only_one_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def read_only(**_: Any) -> None:
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr("fastmmkd.files.TemporaryFile", read_only)
        with pytest.raises(CannotWrite, match=r"cannot write in this folder \(Read-only file system\)$"):
            refuse_unwritable(tmp_path)

    def test_a_log_of_deepspeed_that_cannot_be_opened(
        self, train_tiny: Train, tiny_config: dict, tmp_path: Path
    ) -> None:
        (tmp_path / "run" / "deepspeed.log").mkdir(parents=True)
        with pytest.raises(CannotWrite, match=r"deepspeed\.log: cannot write this file \(Is a directory\)$"):
            train_tiny(tiny_config, tmp_path / "run")

    def test_a_write_that_fails_keeps_the_file_that_was_there(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_text("before")
        with room_for(10), pytest.raises(CannotWrite, match="File too large"), replacing(path) as temporary:
            temporary.write_text("x" * 20)
        assert [file.name for file in tmp_path.iterdir()] == ["file"]
        assert path.read_text() == "before"


def test_what_a_kill_left_half_written_goes_with_the_next_start(
    train_tiny: Train, tiny_config: dict, tmp_path: Path
) -> None:
    run, dead = tmp_path / "run", subprocess.Popen(["true"])
    dead.wait()
    with pytest.raises(Interrupted):
        train_tiny(tiny_config, run, stop_after=2)
    half = [
        run / f".run.json.{dead.pid}.tmp",
        run / "seed_1" / f".model.safetensors.{dead.pid}.tmp",
        run / "seed_1" / "checkpoints" / f".latest.json.{os.getpid()}.tmp",
        run / f".results.md.{10**30}.tmp",
    ]
    others = [run / f".results.json.{os.getppid()}.tmp", run / ".mine.tmp", run / "seed_1" / "notes.1.tmp"]
    for path in (*half, *others):
        path.touch()
    train_tiny(tiny_config, run, resume=True)
    assert [path for path in (*half, *others) if path.exists()] == others


class TestFiles:
    @pytest.fixture
    def stopped(self, train_tiny: Train, tiny_config: dict, tmp_path: Path) -> Path:
        with pytest.raises(Interrupted):
            train_tiny(tiny_config, tmp_path / "run", stop_after=12)
        return tmp_path / "run"

    @pytest.mark.parametrize(
        "line",
        [b"", b"{", b"null", b"3", b'{"epoch": null}', b'{"epoch": "1"}', b'{"epoch": -5}', b"\xff", NESTED.encode()],
    )
    def test_a_damaged_line_of_the_journal_is_left_out(
        self,
        stopped: Path,
        train_tiny: Train,
        tiny_config: dict,
        trained: Path,
        line: bytes,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        path = stopped / "seed_1" / "metrics.jsonl"
        first, *others = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(line + b"\n" + b"".join(others))
        capsys.readouterr()
        train_tiny(tiny_config, stopped, resume=True)
        assert f"{path}: 1 damaged line left out" in capsys.readouterr().out.splitlines()
        assert [record["epoch"] for record in records(stopped)] == [2, 3]
        path.write_bytes(first + path.read_bytes())
        assert_same_run(stopped, trained)

    @pytest.mark.parametrize("content", [b"", b"\xff", b"\n\n\n"])
    def test_so_is_all_of_it(self, stopped: Path, train_tiny: Train, tiny_config: dict, content: bytes) -> None:
        (stopped / "seed_1" / "metrics.jsonl").write_bytes(content)
        train_tiny(tiny_config, stopped, resume=True)
        assert [record["epoch"] for record in records(stopped)] == [3]

    @pytest.mark.parametrize(
        "change",
        [
            "",
            "null",
            NESTED,
            {"seed": 2},
            {"seed": True},
            {"conditions": {}},
            {"conditions": None},
            {"sweep": []},
            {"sweep": [{"p": 0.0}]},
            {"sweep_samples": -14},
            {"sweep_samples": 13},
            {"at_floor": {"network": 3}},
            {"confusion": {"acc7": [[14]]}},
            {"confusion": {"acc3": [[14, 0, 0], [0, 0, 0], [0, 0, 0]]}},
        ],
    )
    def test_a_seed_whose_evaluation_is_damaged_is_evaluated_anew(
        self,
        trained: Path,
        train_tiny: Train,
        tiny_config: dict,
        tmp_path: Path,
        change: Any,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        run = tmp_path / "run"
        shutil.copytree(trained, run)
        path = run / "seed_1" / "evaluation.json"
        saved = json.loads(path.read_text())
        if "confusion" in change:
            saved["conditions"]["l"] |= change
        path.write_text(change if isinstance(change, str) else json.dumps(saved | change))
        tiny_config["train"]["seeds"] = [1, 2]
        train_tiny(tiny_config, run, resume=True)
        out = capsys.readouterr().out
        assert "; evaluating seed 1 anew\n" in out
        assert "seed 2: finished before\n" in out
        assert_same_run(run, trained)

    @pytest.mark.parametrize(
        "change",
        [
            "",
            NESTED,
            '{"config": ' + '{"a": ' * 500 + "1" + "}" * 501,
            {"config": None},
            {"config": []},
            {"data_hash": 3},
            {"precision": None},
        ],
    )
    def test_a_damaged_run_file_is_one_line(
        self, stopped: Path, train_tiny: Train, tiny_config: dict, change: Any
    ) -> None:
        path = stopped / "run.json"
        saved = json.loads(path.read_text())
        path.write_text(change if isinstance(change, str) else json.dumps(saved | change))
        with pytest.raises(UserError, match=f"^{path}: not a training run's run.json") as caught:
            train_tiny(tiny_config, stopped, resume=True)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 300

    @pytest.mark.parametrize("config", [{}, {"train": None}, {"train": {"seeds": 5}}, {"train": {"seeds": [[1]]}}])
    def test_another_config_in_it_is_refused_by_key(
        self, stopped: Path, train_tiny: Train, tiny_config: dict, config: dict
    ) -> None:
        path = stopped / "run.json"
        saved = json.loads(path.read_text())
        path.write_text(json.dumps(saved | {"config": saved["config"] | config if config else {}}))
        with pytest.raises(UserError, match=f"^{path}: --resume with another config: ") as caught:
            train_tiny(tiny_config, stopped, resume=True)
        assert "\n" not in str(caught.value)

    def test_an_odd_history_in_it_is_begun_anew(self, stopped: Path, train_tiny: Train, tiny_config: dict) -> None:
        path = stopped / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"resumed": None}))
        train_tiny(tiny_config, stopped, resume=True)
        assert len(json.loads(path.read_text())["resumed"]) == 1

    def test_a_group_of_other_seeds(self, train_tiny: Train, tiny_config: dict, tmp_path: Path) -> None:
        tiny_config["train"] |= {"seeds": [1, 2], "together": True}
        run = tmp_path / "run"
        with pytest.raises(Interrupted):
            train_tiny(tiny_config, run, stop_after=2)
        (run / "together_1" / "group.json").write_text('{"seeds": [7, 8]}')
        with pytest.raises(UserError, match=r"group\.json: seeds 7, 8; expected some of the run's$"):
            train_tiny(tiny_config, run, resume=True)
