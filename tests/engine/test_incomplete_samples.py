"""Samples that lack modalities: the teacher leaves them out, unless it is to take them with what they have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmmkd.data.batches import ResidentSplit, View
from fastmmkd.data.dataset import Dataset
from fastmmkd.errors import UserError
from tests.engine.conftest import only_corrkd, stored, without_language

Train = Callable[..., Path]
pytestmark = only_corrkd


@pytest.fixture
def incomplete(raw: dict, tiny_dataset: Callable[..., Dataset], tmp_path: Path) -> dict:
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
    training_batch, evaluate = ResidentSplit.training_batch, ResidentSplit.evaluation_batch

    def recording_batch(self: Any, rows: torch.Tensor, seeds: Any, epoch: Any, views: Any) -> Any:
        batches.append((views, rows.flatten().tolist()))
        return training_batch(self, rows, seeds, epoch, views)

    def recording_rows(self: Any, sample: torch.Tensor, *how: Any) -> Any:
        validated.append(sample.tolist())
        return evaluate(self, sample, *how)

    monkeypatch.setattr(ResidentSplit, "training_batch", recording_batch)
    monkeypatch.setattr(ResidentSplit, "evaluation_batch", recording_rows)
    train_tiny(incomplete, tmp_path / "run")
    steps = len(trained_on) // 8
    of_teacher, of_student = batches[:steps], batches[steps:]
    assert sorted(row for _, rows in of_teacher for row in rows) == list(trained_on)
    assert {views for views, _ in of_teacher} == {(View.COMPLETE,)}
    assert {views for views, _ in of_student} == {(View.MISSING,)}
    assert sorted(row for _, rows in of_student for row in rows) == list(range(40))
    assert validated[:2] == [list(selected_on), list(range(4, 12))]


@pytest.mark.parametrize("phase", ["teacher", "network"])
def test_nothing_complete_to_validate_on(
    train_tiny: Train, raw: dict, tiny_dataset: Callable[..., Dataset], tmp_path: Path, phase: str
) -> None:
    path = stored(without_language(tiny_dataset(), train=8, valid=12), tmp_path / "incomplete.h5")
    raw["data"]["path"] = path
    raw["train"]["select_on"] = "complete"
    raw["teacher"] = raw["teacher"] if phase == "teacher" else None
    with pytest.raises(UserError) as caught:
        train_tiny(raw, tmp_path / "run")
    assert str(caught.value).startswith(
        f"train.select_on: no validation sample of {path} has what the checkpoint of the {phase} is chosen on (lav); "
    )
    assert not (tmp_path / "run" / "run.json").exists()


def test_too_few_complete_ones(
    train_tiny: Train, raw: dict, tiny_dataset: Callable[..., Dataset], tmp_path: Path
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
