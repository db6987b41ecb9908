"""CH-SIMS: scores in [-1, 1] with metrics of their own, and scores beyond the limits of any set."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from layouts import dump, mmsa_split, random_clips

from fastmmkd.cli import main
from fastmmkd.data import store
from fastmmkd.data.dataset import SPLITS, Dataset
from fastmmkd.data.importers import import_dataset
from fastmmkd.errors import UserError
from fastmmkd.modalities import MODALITIES

STEPS = dict.fromkeys(MODALITIES, 5)
SIMS = {"train": [-1.0, -0.4, 0.0, 0.2] * 4, "valid": [0.2, 0.6, -0.8, -0.4] * 2, "test": [0.6, -0.8, 1.0, 0.0]}
OLD_MOSEI = {"train": [-3.0, 3.33, 1.5, -4.0], "valid": [0.2], "test": [3.0, 0.5]}


@pytest.fixture
def pickle_of(tmp_path: Path) -> Callable[[dict[str, list[float]]], Path]:
    """An MMSA file with these labels."""

    def write(labels: dict[str, list[float]]) -> Path:
        rng = np.random.default_rng(0)
        content = {name: mmsa_split(random_clips(rng, len(labels[name])), labels[name], name, STEPS) for name in SPLITS}
        return dump(content, tmp_path / "unaligned.pkl")

    return write


PickleOf = Callable[[dict[str, list[float]]], Path]


class TestImport:
    def test_scores_of_sims_are_not_taken_for_those_of_mosi(self, pickle_of: PickleOf) -> None:
        source = pickle_of(SIMS)
        with pytest.raises(UserError) as caught:
            import_dataset("mmsa", source)
        assert str(caught.value) == (
            f"{source}: all scores lie in [-1, 1], as those of CH-SIMS; expected --labels sims, which has its metrics, "
            "or --labels score where they are sentiment in [-3, 3]"
        )

    def test_the_kind_of_labels_is_kept(self, pickle_of: PickleOf, tmp_path: Path) -> None:
        store.write(import_dataset("mmsa", pickle_of(SIMS), labels="sims"), tmp_path / "a.h5")
        dataset = store.read(tmp_path / "a.h5")
        assert (dataset.label_kind, store.read_header(tmp_path / "a.h5").label_kind) == ("sims", "sims")
        np.testing.assert_array_equal(dataset.splits["test"].labels, np.float32(SIMS["test"]))
        assert import_dataset("mmsa", pickle_of(SIMS), labels="score").label_kind == "score"

    def test_whole_numbers_are_scores(self, pickle_of: PickleOf) -> None:
        assert import_dataset("mmsa", pickle_of({name: [-1.0, 0, 1] for name in SPLITS})).label_kind == "score"

    def test_a_store_holds_no_score_beyond_one(self, pickle_of: PickleOf, tmp_path: Path) -> None:
        dataset = import_dataset("mmsa", pickle_of(SIMS), labels="sims")
        dataset.splits["valid"].labels[1] = 1.5
        with pytest.raises(UserError, match=r"^valid/labels\[1\] is 1\.5, expected a score in \[-1, 1\]$"):
            store.write(dataset, tmp_path / "a.h5")

    def test_inspect_counts_its_five_classes(
        self, pickle_of: PickleOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = str(tmp_path / "a.h5")
        assert main(["data", "import", "--format", "mmsa", str(pickle_of(SIMS)), "--labels", "sims", "--out", out]) == 0
        capsys.readouterr()
        assert main(["data", "inspect", out]) == 0
        rows = [line.split("│")[1:5] for line in capsys.readouterr().out.splitlines() if "│ to " in line]
        assert [[cell.strip() for cell in row] for row in rows] == [
            ["to -0.7", "4", "2", "1"],
            ["to -0.1", "4", "2", "0"],
            ["to 0.1", "4", "0", "1"],
            ["to 0.7", "4", "4", "1"],
            ["to 1", "0", "0", "1"],
        ]


class TestClipping:
    def test_scores_beyond_are_refused_with_a_way_on(self, pickle_of: PickleOf) -> None:
        source = pickle_of(OLD_MOSEI)
        with pytest.raises(UserError) as caught:
            import_dataset("mmsa", source)
        assert str(caught.value) == (
            f"{source}: train label 1 is 3.33, expected a score in [-3, 3]; 2 of 7 lie beyond, up to -4 "
            "(--clip-labels sets them to the limits)"
        )

    def test_they_are_clipped_and_counted(
        self, pickle_of: PickleOf, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "a.h5"
        words = ["data", "import", "--format", "mmsa", str(pickle_of(OLD_MOSEI)), "--out", str(out), "--clip-labels"]
        assert main(words) == 0
        text = capsys.readouterr().out
        assert "labels stored as clipped to +-3\n" in text
        assert "2 of 7 labels lay beyond +-3, up to -4: set to the limits\n" in text
        dataset = store.read(out)
        assert dataset.splits["train"].labels.tolist() == [-3.0, 3.0, 1.5, -3.0]
        assert dataset.splits["test"].labels.tolist() == [3.0, 0.5]

    def test_nothing_to_clip_is_nothing_said(self, pickle_of: PickleOf) -> None:
        dataset = import_dataset("mmsa", pickle_of({**OLD_MOSEI, "train": [-3, 2]}), clip_labels=True)
        assert (dataset.label_map, dataset.report["notes"]) == ("identity", [])

    def test_sims_end_at_one(self, pickle_of: PickleOf) -> None:
        dataset = import_dataset("mmsa", pickle_of({**SIMS, "train": [-1.2, 0.4]}), labels="sims", clip_labels=True)
        assert dataset.splits["train"].labels.tolist() == [-1, np.float32(0.4)]
        assert dataset.label_map == "clipped to +-1"


def with_kind(dataset: Dataset, kind: str) -> Dataset:
    dataset.label_kind = kind
    for split in dataset.splits.values():
        split.labels = np.round(split.labels / 3, 1)
    return dataset


@pytest.mark.usefixtures("process_state")
class TestRuns:
    @pytest.fixture
    def config(self, tiny_config: dict, tiny_dataset: Callable[..., Dataset], tmp_path: Path) -> dict:
        store.write(with_kind(tiny_dataset(), "sims"), tmp_path / "sims.h5")
        tiny_config["data"]["path"] = str(tmp_path / "sims.h5")
        tiny_config["train"] |= {"task": "regression-sims", "epochs": 1, "select": None}
        return tiny_config

    def test_a_run_is_measured_as_sims_is(
        self, config: dict, tmp_path: Path, train_tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = train_tiny(config, tmp_path / "run", results=True)
        results = json.loads((run / "results.json").read_text())
        measured = results["conditions"]["lav"]["metrics"]
        assert list(measured) == ["f1_sims", "mae_sims", "corr_sims", "acc2_sims", "acc3_sims", "acc5_sims"]
        assert "Metrics of CH-SIMS, as MMSA computes them" in (run / "results.md").read_text()
        out = tmp_path / "predictions.csv"
        assert main(["predict", "--run", str(run), "--data", config["data"]["path"], "--out", str(out)]) == 0
        rows = [row for row in csv.DictReader(out.open(encoding="utf-8")) if row["split"] == "test"]
        scores, labels = (np.array([float(row["score"]) for row in rows]), store.read(config["data"]["path"]))
        error = np.abs(scores.clip(-1, 1) - labels.splits["test"].labels).mean()
        assert measured["mae_sims"]["mean"] == pytest.approx(error, abs=1e-5)
        assert main(["report", str(run), "--out", str(tmp_path / "report")]) == 0

    def test_another_task_names_it(self, config: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config["train"]["task"] = "regression"
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert main(["train", "--config", str(tmp_path / "config.json"), "--out", str(tmp_path / "run")]) == 2
        assert capsys.readouterr().err == (
            f"error: train.task: regression needs score labels, {tmp_path / 'sims.h5'} has sims labels; expected one "
            "of regression-sims\n"
        )
        assert not (tmp_path / "run").exists()
