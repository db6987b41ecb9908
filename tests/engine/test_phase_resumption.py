"""A run of two phases that is interrupted in either, or killed between them, continues exactly."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_records import assert_same_phase, assert_same_run, progress, records

from fastmmkd.engine import run as engine_run
from fastmmkd.engine import teachers
from fastmmkd.engine.phases import Phase, begin_phase
from fastmmkd.errors import Interrupted, UserError
from fastmmkd.methods.method import PhaseSpec
from tests.engine.conftest import only_corrkd

Train = Callable[..., Path]


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
    pointer = progress(run, phase=phase)
    assert (pointer["epoch"], pointer["step"]) == (epoch, step)
    assert (run / "seed_1" / "teacher" / "teacher.json").exists() == (phase == "")
    assert (run / "seed_1" / "checkpoints").exists() == (phase == "")
    train_tiny(raw, run, resume=True)
    assert_same_phase(run, distilled, phase="teacher")
    assert_same_run(run, distilled)


@pytest.mark.parametrize("step", ["finish", "load", "begin the student"])
def test_a_run_killed_between_its_phases_continues_exactly(
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
def test_a_teacher_that_was_damaged_meanwhile(train_tiny: Train, raw: dict, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        train_tiny(raw, run, stop_after=12)
    file = run / "seed_1" / "teacher" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(UserError, match=f"^{file}: not an exported model: .*$"):
        train_tiny(raw, run, resume=True)


@only_corrkd
def test_a_teacher_trains_as_long_as_its_student_unless_it_is_told_otherwise(
    train_tiny: Train, raw: dict, distilled: Path, tmp_path: Path
) -> None:
    """A run that goes on for longer does so with the teacher it has."""
    del raw["teacher"]["epochs"]
    run = train_tiny(raw, tmp_path / "run")
    assert_same_phase(run, distilled, phase="teacher")
    assert_same_run(run, distilled)
    raw["train"] |= {"epochs": 3, "seeds": [1, 2]}
    train_tiny(raw, run, resume=True)
    said = json.loads((run / "run.json").read_text())["config"]
    assert (said["teacher"]["epochs"], said["train"]["epochs"]) == (2, 3)
    for seed in (1, 2):
        assert_same_phase(run, distilled, seed=seed, phase="teacher")
        assert [record["epoch"] for record in records(run, seed)] == [1, 2, 3]
    train_tiny(raw, run, resume=True)
    raw["teacher"]["epochs"] = 3
    with pytest.raises(UserError, match=r"--resume with another config: teacher\.epochs was 2, is 3"):
        train_tiny(raw, run, resume=True)
