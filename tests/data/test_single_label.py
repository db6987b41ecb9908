"""Data for a task with one label of four: samples that hold none of the emotions, or several."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from fastmmkd.cli import main
from fastmmkd.data import store
from fastmmkd.data.dataset import Dataset
from fastmmkd.data.single_label import emotions_held, single_labelled
from fastmmkd.errors import UserError
from fastmmkd.tasks import TASKS, Task

Make = Callable[..., Dataset]
FOUR_WAY = Task("emotions-4way")


@pytest.fixture
def dataset(make_dataset: Make) -> Dataset:
    """One label each, but for two training samples with none, one with several, and a test sample with several."""
    mixed = make_dataset(kind="emotions")
    for split in mixed.splits.values():
        split.labels = np.eye(4, dtype=np.float32)[np.arange(len(split)) % 4]
    mixed.splits["train"].labels[[1, 5, 7]] = [[0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 0]]
    mixed.splits["test"].labels[4] = 1
    mixed.path = Path("x.h5")
    return mixed


def test_they_are_counted_and_refused(dataset: Dataset) -> None:
    with pytest.raises(UserError) as caught:
        single_labelled(dataset, FOUR_WAY, "refuse")
    assert str(caught.value) == (
        "train.task: emotions-4way is for samples that hold one emotion; of 23 samples in x.h5 2 hold none and 2 "
        "several (train 3, valid 0, test 1); expected emotions-binary, or data.ambiguous=drop"
    )


def test_they_are_dropped_from_every_split(dataset: Dataset) -> None:
    single = single_labelled(dataset, FOUR_WAY, "drop")
    kept = np.setdiff1d(np.arange(12), [1, 5, 7])
    train, whole = single.splits["train"], dataset.splits["train"]
    assert train.ids == [whole.ids[i] for i in kept]
    for modality, x in train.features.items():
        np.testing.assert_array_equal(x, whole.features[modality][np.isin(whole.row_samples(modality), kept)])
    for name in ("lengths", "present", "labels"):
        np.testing.assert_array_equal(getattr(train, name), getattr(whole, name)[kept])
    assert [len(split) for split in single.splits.values()] == [9, 6, 4]
    assert all((emotions_held(split) == 1).all() for split in single.splits.values())
    assert single.source == f"{dataset.source}, without 4 of 23 samples that hold no or several emotions"
    assert single.content_hash == dataset.content_hash


def test_exported_masks_are_those_of_what_is_left(dataset: Dataset, tmp_path: Path) -> None:
    store.write(dataset, tmp_path / "x.h5")
    raw = json.loads(Path("configs/umdf_iemocap.json").read_text())
    raw["train"]["task"], raw["data"] = "emotions-4way", raw["data"] | {"ambiguous": "drop"}
    (tmp_path / "c.json").write_text(json.dumps(raw))
    arguments = ["--config", tmp_path / "c.json", "--data", tmp_path / "x.h5", "--out", tmp_path / "masks.h5"]
    assert main(["data", "masks", *map(str, arguments)]) == 0
    with h5py.File(tmp_path / "masks.h5") as file:
        ids = [i.decode() for i in file["ids"][()]]
    assert ids == single_labelled(dataset, FOUR_WAY, "drop").splits["test"].ids


def test_nothing_is_left_of_a_split(dataset: Dataset) -> None:
    dataset.splits["valid"].labels[:] = 0
    with pytest.raises(UserError, match=r"^data\.ambiguous: drop leaves nothing of split valid in x\.h5$"):
        single_labelled(dataset, FOUR_WAY, "drop")


@pytest.mark.parametrize("task", [name for name in TASKS if name != "emotions-4way"])
def test_other_tasks_take_data_as_they_are(dataset: Dataset, task: str) -> None:
    assert single_labelled(dataset, Task(task), "refuse") is dataset


def test_data_without_such_samples_stay_as_they_are(dataset: Dataset) -> None:
    dataset.splits = {"valid": dataset.splits["valid"]}
    assert single_labelled(dataset, FOUR_WAY, "refuse") is dataset
    assert single_labelled(dataset, FOUR_WAY, "drop") is dataset
