"""A phase that learnt nothing says so, in the open and in the results; a student does not learn from such a teacher."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from fastmmkd.cli import main
from fastmmkd.engine.bookkeeping import SeedBook
from fastmmkd.engine.checkpoint import Progress
from fastmmkd.engine.groups import alone
from fastmmkd.engine.teachers import is_at_floor, phases_at_floor
from fastmmkd.errors import UserError
from fastmmkd.evaluation import results
from fastmmkd.model_file import serialised
from fastmmkd.predictor import load

Train = Callable[..., Path]
LITERAL = {"lambda_frf": 100.0, "frf_gradient": "everything"}
CRIED = "AT THE FLOOR: hrlf seed 1 {} has learnt nothing: its best validation mae, "


@pytest.fixture(scope="module")
def config_of(tiny_store: Path, distilled_config_of: Callable[[str, Path], dict]) -> Callable[..., dict]:
    """`config_of(epochs, **loss)`: HRLF, whose teacher must leave the floor."""

    def make(epochs: int, **loss: float | str) -> dict:
        raw = distilled_config_of("hrlf", tiny_store)
        raw["teacher"] = {"epochs": epochs}
        raw["train"]["epochs"] = epochs
        raw["loss"] |= loss
        raw["deepspeed"]["optimizer"]["params"]["lr"] = 0.03
        return raw

    return make


@pytest.fixture(scope="module")
def collapsed(train_tiny: Train, config_of: Callable[..., dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after its teacher, which the paper's L_FRF made a constant; shared, so do not change it."""
    folder = tmp_path_factory.mktemp("floor") / "collapsed"
    with pytest.raises(UserError, match="a student is not trained from this teacher: it ended at the floor"):
        train_tiny(config_of(3, **LITERAL), folder)
    return folder


@pytest.fixture(scope="module")
def learnt(train_tiny: Train, config_of: Callable[..., dict], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the collapsed one, but for the loss, and with a student that has no time to learn."""
    raw = config_of(3)
    raw["train"]["epochs"] = 1
    return train_tiny(raw, tmp_path_factory.mktemp("floor") / "learnt", results=True)


def teacher_says(run: Path) -> dict:
    return json.loads((run / "seed_1" / "teacher" / "teacher.json").read_text())


class TestACollapsedTeacher:
    def test_it_is_a_constant(self, collapsed: Path) -> None:
        assert teacher_says(collapsed)["at_floor"] is True
        assert not (collapsed / "seed_1" / "model.safetensors").exists()

    def test_the_command_ends_with_one_line(
        self, config_of: Callable[..., dict], tmp_path: Path, process_state: None, capfd: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "tiny.json").write_text(json.dumps(config_of(3, **LITERAL)))
        assert main(["train", "--config", str(tmp_path / "tiny.json"), "--out", str(tmp_path / "run")]) == 2
        out, err = capfd.readouterr()
        assert sum(CRIED.format("teacher") in line for line in out.splitlines()) == 1
        assert err.startswith(f"error: {tmp_path / 'run' / 'seed_1' / 'teacher'}: a student is not trained from this ")
        assert err.count("\n") == 1
        assert "teacher.accept_floor=true" in err

    def test_a_student_learns_from_it_where_that_is_accepted(
        self, train_tiny: Train, config_of: Callable[..., dict], collapsed: Path, tmp_path: Path
    ) -> None:
        """By `--teacher`, and by resuming; the results say which phases learnt nothing, and so does another report."""
        raw = config_of(3, **LITERAL)
        with pytest.raises(UserError, match="it ended at the floor"):
            train_tiny(raw, tmp_path / "refused", teacher=collapsed)
        assert not (tmp_path / "refused" / "run.json").exists()
        raw["teacher"]["accept_floor"] = True
        run = train_tiny(raw, tmp_path / "run", teacher=collapsed, results=True)
        assert results.read(run).at_floor == {"teacher": [True], "student": [True]}
        note = "**At the floor**, no better than a constant prediction on the validation split: teacher of seed 1; "
        assert note + "student of seed 1." in (run / "results.md").read_text()
        assert main(["eval", "--run", str(run), "--out", str(tmp_path / "again")]) == 0
        assert results.read(tmp_path / "again").at_floor == {"teacher": [True], "student": [True]}
        assert main(["report", str(run), "--out", str(tmp_path / "report")]) == 0
        assert note in (tmp_path / "report" / "report.md").read_text()


def test_a_run_goes_on_when_its_teacher_is_accepted(
    train_tiny: Train, config_of: Callable[..., dict], tmp_path: Path
) -> None:
    raw = config_of(2, **LITERAL)
    with pytest.raises(UserError, match="it ended at the floor"):
        train_tiny(raw, tmp_path / "run")
    raw["teacher"]["accept_floor"] = True
    train_tiny(raw, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "seed_1" / "evaluation.json").exists()


class TestATeacherThatLearnt:
    def test_each_phase_is_told_apart(self, learnt: Path) -> None:
        assert teacher_says(learnt)["at_floor"] is False
        assert results.read(learnt).at_floor == {"teacher": [False], "student": [True]}
        assert json.loads((learnt / "seed_1" / "evaluation.json").read_text())["at_floor"]["student"] is True

    def test_a_teacher_of_an_earlier_version_has_to_be_accepted(
        self, train_tiny: Train, config_of: Callable[..., dict], learnt: Path, tmp_path: Path
    ) -> None:
        said = teacher_says(learnt)
        del said["at_floor"]
        old = tmp_path / "old"
        old.mkdir()
        (old / "teacher.json").write_text(json.dumps(said))
        (old / "model.safetensors").write_bytes((learnt / "seed_1" / "teacher" / "model.safetensors").read_bytes())
        raw = config_of(1)
        with pytest.raises(
            UserError, match=r"its teacher\.json does not say at_floor, as an earlier version wrote it; "
        ):
            train_tiny(raw, tmp_path / "run", teacher=old)
        raw["teacher"]["accept_floor"] = True
        train_tiny(raw, tmp_path / "run", teacher=old)


def test_a_network_by_itself(trained: Path) -> None:
    """Its floor is that of the seven conditions, in the metric that selects."""
    config = load(trained).config
    for seed in (1, 2):
        assert set(phases_at_floor(config, trained / f"seed_{seed}")) == {"network"}
    at_floor = results.read(trained).at_floor
    assert at_floor == {"network": [phases_at_floor(config, trained / f"seed_{s}")["network"] for s in (1, 2)]}
    assert None not in at_floor["network"]


def test_a_model_that_is_gone_or_says_nothing_is_unknown(trained: Path, tmp_path: Path) -> None:
    """As a teacher that was removed to save space is, and a model that an earlier version wrote."""
    assert is_at_floor(tmp_path) is None
    tensors = load_file(str(trained / "seed_1" / "model.safetensors"))
    (tmp_path / "model.safetensors").write_bytes(serialised(tensors, {}))
    assert is_at_floor(tmp_path) is None


@pytest.mark.parametrize(("select", "direction"), [("mae", -1), ("loss", -1), ("f1_non0", 1), ("corr", 1)])
def test_it_takes_a_thousandth_to_be_off_the_floor(select: str, direction: int) -> None:
    """In the metric that selects, whichever way is up."""

    def at_floor(best: float | None) -> bool:
        session, phase = SimpleNamespace(select=select), SimpleNamespace(group=alone(1, Path()))
        return SeedBook(session, phase, 0, Progress(best=best), 0.25).is_at_floor

    assert at_floor(None)
    assert [at_floor(0.25 + direction * gain) for gain in (-0.1, 0.0, 0.0001, 0.001)] == [True, True, True, False]
