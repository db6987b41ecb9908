"""The time that is left of a run: its phases, seeds and evaluations."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fastmmkd.config import parse_config
from fastmmkd.data.dataset import Dataset
from fastmmkd.engine.agenda import Agenda
from fastmmkd.engine.groups import plan_groups

SWEEP, BATCHES, EPOCHS = 3, 5, 2


@pytest.fixture
def agenda(
    distilled_config_of: Callable, tiny_store: Path, tiny_dataset: Callable[..., Dataset], tmp_path: Path
) -> Agenda:
    """Two seeds, teacher and student, of which the first seed's teacher is finished."""
    raw = distilled_config_of("corrkd", tiny_store)
    raw["train"]["seeds"] = [1, 2]
    config = parse_config(raw)
    (tmp_path / "seed_1" / "teacher").mkdir(parents=True)
    (tmp_path / "seed_1" / "teacher" / "teacher.json").touch()
    return Agenda(config, tiny_dataset(), plan_groups(config, tmp_path))


def test_phases_seeds_and_evaluations_count(agenda: Agenda) -> None:
    steps = EPOCHS * BATCHES
    assert agenda.left(((1,), "student"), steps=4, seconds=2.0) == 2 * (4 + steps + steps)
    agenda.predicted(12 * 7, seconds=6.0)
    evaluation = 6 / (12 * 7) * 14 * (7 + SWEEP)
    assert agenda.left(((1,), "student"), 4, 2.0) == pytest.approx(2 * (4 + 2 * steps) + 2 * evaluation)
    agenda.end_phase(((1,), "student"))
    agenda.end_evaluation(seconds=9.0)
    assert agenda.left(((2,), "teacher"), 3, 1.0) == 3 + 2 * steps + 9, "the student's steps take what they took before"
    agenda.end_phase(((2,), "teacher"))
    assert agenda.left(((2,), "student"), 1, 2.0) == 2 + 9


def test_nothing_is_left_of_a_finished_run(
    trained: Path, tiny_config: dict, tiny_dataset: Callable[..., Dataset]
) -> None:
    tiny_config["train"]["seeds"] = [1, 2]
    config = parse_config(tiny_config)
    assert Agenda(config, tiny_dataset(), plan_groups(config, trained)).left(((1,), "network"), 0, 1.0) == 0
