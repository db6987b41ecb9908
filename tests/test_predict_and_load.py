"""A trained run in use: `fastmmkd.load`, and the commands predict, eval, report and env."""

from __future__ import annotations

import csv
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

import fastmmkd
from fastmmkd.cli import main
from fastmmkd.data import store
from fastmmkd.data.dataset import Dataset, Split
from fastmmkd.errors import UserError
from fastmmkd.evaluation import metrics
from fastmmkd.evaluation.protocol import Scenario
from fastmmkd.modalities import MODALITIES
from fastmmkd.predictor import load_all
from fastmmkd.tasks import Task
from tests.handmade import lacking

WIDTHS = dict(zip(MODALITIES, (5, 4, 3), strict=True))
pytestmark = pytest.mark.usefixtures("process_state")


@pytest.fixture
def test_split(tiny_store: Path) -> Split:
    return store.read(tiny_store).splits["test"]


@pytest.fixture
def own_run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the trained run that a test may change."""
    return shutil.copytree(trained, tmp_path / "run")


def rolled(padded: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The same sequences with their zeros on the right."""
    return np.stack([np.roll(x, length, axis=0) for x, length in zip(padded, lengths, strict=True)])


def with_emotions(dataset: Dataset) -> Dataset:
    dataset.label_kind = "emotions"
    for split in dataset.splits.values():
        split.labels = np.eye(4, dtype=np.float32)[np.arange(len(split)) % 4]
    return dataset


def measured(split: Split, predictions: np.ndarray) -> dict[str, float]:
    """What an evaluation records of these predictions."""
    task = Task("regression")
    loss = metrics.loss(task, split.labels, predictions)
    return metrics.compute(task, split.labels, predictions) | {"loss": loss}


class TestLoad:
    def test_it_predicts_what_the_evaluation_evaluated(self, trained: Path, test_split: Split) -> None:
        for seed in (1, 2):
            predictions = fastmmkd.load(trained, seed).predict(test_split)
            assert predictions.shape == (14,)
            assert predictions.dtype == np.float64
            evaluation = json.loads((trained / f"seed_{seed}" / "evaluation.json").read_text())
            assert measured(test_split, predictions) == evaluation["conditions"]["lav"]["metrics"]

    def test_missing_modalities_are_the_testing_conditions(self, trained: Path, test_split: Split) -> None:
        """A sample that lacks audio is predicted as under the condition {l,v}."""
        predictor = fastmmkd.load(trained)
        incomplete = predictor.predict(lacking(test_split, "audio", slice(None)))
        evaluation = json.loads((trained / "seed_1" / "evaluation.json").read_text())
        assert measured(test_split, incomplete) == evaluation["conditions"]["lv"]["metrics"]

    def test_one_sample_does_not_change_another(self, trained: Path, test_split: Split) -> None:
        predictor = fastmmkd.load(trained)
        complete = predictor.predict(test_split)
        mixed = predictor.predict(lacking(test_split, "language", slice(0, 5)))
        np.testing.assert_array_equal(mixed[5:], complete[5:])
        assert (mixed[:5] != complete[:5]).all()

    def test_neither_does_padding(self, trained: Path, test_split: Split) -> None:
        """Positions count from a sample's first frame, wherever an array has it."""
        predictor, split = fastmmkd.load(trained), lacking(test_split, "language", slice(0, 3))
        expected = predictor.predict(split)
        for longer, right in itertools.product((0, 1, 7), (False, True)):
            padded = {m: split.padded(m, 6 + longer) for m in MODALITIES}
            if right:
                padded = {m: rolled(x, split.lengths[:, i]) for i, (m, x) in enumerate(padded.items())}
            of_arrays = Split.from_padded(padded, split.lengths, split.present, split.labels, split.ids)
            np.testing.assert_array_equal(predictor.predict(of_arrays), expected)

    def test_nor_does_whoever_else_is_predicted(
        self, trained: Path, test_split: Split, tiny_dataset: Callable[..., Dataset]
    ) -> None:
        """Alone, in another order, beside one that is ten times as long, and unaligned: up to rounding."""
        predictor = fastmmkd.load(trained)
        for split in (test_split, tiny_dataset(steps=(6, 9, 4)).splits["test"], lacking(test_split, "audio", slice(5))):
            expected = predictor.predict(split)
            alone = [predictor.predict(split.take(np.array([i])))[0] for i in range(len(split))]
            np.testing.assert_allclose(alone, expected, rtol=1e-5, atol=1e-6)
            order = np.random.default_rng(0).permutation(len(split))
            np.testing.assert_allclose(predictor.predict(split.take(order)), expected[order], rtol=1e-5, atol=1e-6)
        long = {m: np.concatenate((test_split.features[m], np.ones((60, d), np.float32))) for m, d in WIDTHS.items()}
        joined = Split(
            long,
            np.concatenate((test_split.lengths, np.full((1, 3), 60, np.int32))),
            np.concatenate((test_split.present, np.ones((1, 3), bool))),
            np.append(test_split.labels, np.float32(0)),
            [*test_split.ids, "long"],
        )
        np.testing.assert_allclose(predictor.predict(joined)[:-1], predictor.predict(test_split), rtol=1e-5, atol=1e-6)

    def test_other_lengths_are_fine(self, trained: Path, tiny_dataset: Callable[..., Dataset]) -> None:
        split = tiny_dataset(steps=(9, 3, 12)).splits["valid"]
        predictions = fastmmkd.load(trained).predict(split)
        assert predictions.shape == (12,)
        assert np.isfinite(predictions).all()

    def test_another_feature_width_is_named(self, trained: Path, tiny_dataset: Callable[..., Dataset]) -> None:
        split = tiny_dataset(dims=(5, 6, 3)).splits["test"]
        with pytest.raises(UserError) as caught:
            fastmmkd.load(trained).predict(split, "other.h5")
        assert str(caught.value) == "other.h5: audio has 6 features, the model was trained on 4"

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    def test_features_that_are_not_finite(self, trained: Path, test_split: Split, value: float) -> None:
        start = int(test_split.starts("audio")[5])
        test_split.features["audio"][start + 1, 2] = value
        with pytest.raises(UserError) as caught:
            fastmmkd.load(trained).predict(test_split, "x.h5")
        assert str(caught.value) == (
            f"x.h5/features/audio[{start + 1}, 2] (sample 5, frame 1) is {np.float32(value)}, expected finite values "
            "(id 'test/5')"
        )

    def test_no_samples(self, trained: Path, test_split: Split) -> None:
        with pytest.raises(UserError, match=r"^data: has no samples, expected at least one to predict$"):
            fastmmkd.load(trained).predict(test_split.take(np.zeros(0, np.int64)))

    def test_lengths_that_do_not_fit(self, trained: Path, test_split: Split) -> None:
        test_split.lengths[2, 0] = 0
        with pytest.raises(UserError, match=r"^data/lengths\[2\] gives language 0 frames although present is True"):
            fastmmkd.load(trained).predict(test_split)

    def test_a_prediction_that_is_not_finite(self, trained: Path, test_split: Split) -> None:
        predictor = fastmmkd.load(trained)
        predictor.module.load_state_dict({k: v * np.inf for k, v in predictor.module.state_dict().items()})
        with pytest.raises(UserError, match=r"^data: sample 0 \('test/0'\) is predicted as nan, expected a finite"):
            predictor.predict(test_split)

    def test_it_is_ready_to_use(self, trained: Path) -> None:
        predictor = fastmmkd.load(trained)
        assert (predictor.seed, predictor.task, predictor.feature_dims) == (1, Task("regression"), (5, 4, 3))
        assert not predictor.module.training
        assert {p.dtype for p in predictor.module.parameters()} == {torch.float32}

    def test_the_export_is_plain(self, trained: Path, tiny_store: Path) -> None:
        """Names of the module's parameters, no wrapper's; the statistics of the data; what chose it."""
        with safe_open(trained / "seed_1" / "model.safetensors", "numpy") as file:
            names, facts = set(file.keys()), file.metadata()
            module = fastmmkd.load(trained).module
            statistics = {f"normalisation.{m}.{s}" for m in MODALITIES for s in ("mean", "std")}
            assert names == set(module.state_dict()) | statistics
            assert "head.weight" in names
            for modality, (mean, std) in store.read(tiny_store).normalisation.items():
                np.testing.assert_array_equal(file.get_tensor(f"normalisation.{modality}.mean"), mean)
                np.testing.assert_array_equal(file.get_tensor(f"normalisation.{modality}.std"), std)
        (latest,) = json.loads((trained / "seed_1" / "checkpoints" / "latest.json").read_text())["seeds"]
        floor = float(facts.pop("floor"))  # of the weighted F1, the metric that chose it
        assert len(facts.pop("sha256")) == 64
        assert facts == {
            "epoch": str(latest["best_epoch"]),
            "select": json.loads((trained / "run.json").read_text())["config"]["train"]["select"],
            "score": f"{latest['best']:.6f}",
            "at_floor": str(latest["best"] <= floor).lower(),
            "seed": "1",
        }


def test_a_model_of_raw_features_predicts_on_raw_features(
    tmp_path: Path, tiny_config: dict, tiny_store: Path, train_tiny: Callable[..., Path], test_split: Split
) -> None:
    tiny_config["data"] |= {"standardise": False, "clip": None}
    run = train_tiny(tiny_config, tmp_path / "raw")
    predictor = fastmmkd.load(run)
    for modality, (mean, std) in predictor.normalisation.items():
        assert not mean.any()
        assert (std == 1).all()
        assert (store.read(tiny_store).normalisation[modality][1] != 1).all()
    evaluation = json.loads((run / "seed_1" / "evaluation.json").read_text())
    assert measured(test_split, predictor.predict(test_split)) == evaluation["conditions"]["lav"]["metrics"]


def test_a_model_masks_missing_frames_where_it_was_trained_to(
    tmp_path: Path, tiny_config: dict, train_tiny: Callable[..., Path], test_split: Split
) -> None:
    """In its first layer alone, in validation, evaluation and prediction alike."""
    tiny_config["model"] |= {"mcim_layers": 2, "masked_layers": "first"}
    run = train_tiny(tiny_config, tmp_path / "first")
    predictor = fastmmkd.load(run)
    assert predictor.evaluator(test_split).resident.masked_layers == "first"
    evaluation = json.loads((run / "seed_1" / "evaluation.json").read_text())
    assert measured(test_split, predictor.predict(test_split)) == evaluation["conditions"]["lav"]["metrics"]
    evaluator = predictor.evaluator(lacking(test_split, "language", slice(None)))
    first = evaluator.run(predictor.module, Scenario((True, True, True)), np.arange(14))[0]
    evaluator.resident.masked_layers = "all"
    every = evaluator.run(predictor.module, Scenario((True, True, True)), np.arange(14))[0]
    assert (first != every).all()


class TestLoadRefuses:
    def test_a_seed_that_is_not_there(self, trained: Path) -> None:
        with pytest.raises(UserError) as caught:
            fastmmkd.load(trained, seed=7)
        assert str(caught.value) == f"{trained}: no trained model of seed 7; it has 1, 2"

    def test_a_folder_that_is_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(
            UserError, match=r"run\.json: No such file or directory; expected a training run's run\.json"
        ):
            fastmmkd.load(tmp_path)

    @pytest.mark.parametrize("device", ["banana", "", "cuda:99", "meta:x", 1.5])
    def test_a_device_that_is_none(self, trained: Path, device: str) -> None:
        with pytest.raises(UserError) as caught:
            fastmmkd.load(trained, device=device)
        assert str(caught.value).startswith(f"device {device!r}: cannot be used (")
        assert "\n" not in str(caught.value)

    def test_a_run_without_a_model(self, own_run: Path) -> None:
        for seed in (1, 2):
            (own_run / f"seed_{seed}" / "model.safetensors").unlink()
        with pytest.raises(UserError, match="no trained model of any seed; it has none"):
            fastmmkd.load(own_run)

    def test_another_json_file(self, own_run: Path) -> None:
        (own_run / "run.json").write_text("[]")
        with pytest.raises(UserError, match=r"not a training run's run\.json; expected the keys config, data_hash"):
            fastmmkd.load(own_run)

    def test_a_damaged_model(self, own_run: Path) -> None:
        path = own_run / "seed_1" / "model.safetensors"
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(UserError, match=r"model\.safetensors: not an exported model: "):
            fastmmkd.load(own_run)

    def test_a_model_of_another_config(self, own_run: Path) -> None:
        record = json.loads((own_run / "run.json").read_text())
        record["config"]["model"]["width"] = 16
        (own_run / "run.json").write_text(json.dumps(record))
        with pytest.raises(UserError, match=r"seed_1: the model is not of the config in .*run\.json"):
            fastmmkd.load(own_run)


class TestPredictCommand:
    def test_one_row_per_sample(
        self, trained: Path, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        dataset = store.read(tiny_store)
        dataset.splits["test"] = lacking(dataset.splits["test"], "language", slice(0, 3))
        store.write(dataset, tmp_path / "incomplete.h5")
        out = tmp_path / "predictions.csv"
        command = ["predict", "--run", str(trained), "--data", str(tmp_path / "incomplete.h5"), "--out", str(out)]
        assert main([*command, "--seed", "1"]) == 0
        assert capsys.readouterr().out == f"{out}: 66 predictions of umdf, seed 1\n"
        rows = list(csv.reader(out.open(encoding="utf-8")))
        assert rows[0] == [
            "split",
            "id",
            "present",
            "frames_language",
            "frames_audio",
            "frames_visual",
            "score",
            "label",
        ]
        assert [row[0] for row in rows[1:]] == ["train"] * 40 + ["valid"] * 12 + ["test"] * 14
        assert [row[2] for row in rows if row[0] == "test"] == ["av"] * 3 + ["lav"] * 11
        assert [row[1] for row in rows if row[0] == "test"] == dataset.splits["test"].ids
        expected = fastmmkd.load(trained).predict(dataset.splits["test"])
        of_test = [row for row in rows if row[0] == "test"]
        assert [float(row[6]) for row in of_test] == pytest.approx(expected, abs=1e-6)
        assert [list(map(int, row[3:6])) for row in of_test] == dataset.splits["test"].lengths.tolist()
        assert [float(row[7]) for row in of_test] == pytest.approx(dataset.splits["test"].labels.tolist(), abs=1e-5)

    def test_several_seeds_and_no_labels(
        self, trained: Path, test_split: Split, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """Arrays of one's own; the audio is missing altogether."""
        arrays = {m: test_split.padded(m, 9) for m in ("language", "visual")}
        np.savez(tmp_path / "new.npz", **arrays, ids=np.array(test_split.ids))
        out = tmp_path / "predictions.csv"
        assert main(["predict", "--run", str(trained), "--data", str(tmp_path / "new.npz"), "--out", str(out)]) == 0
        seeds = [p.seed for p in load_all(trained)]
        assert len(seeds) > 1
        said = f"seeds {', '.join(map(str, seeds))}, their means"
        assert capsys.readouterr().out == f"{out}: 14 predictions of umdf, {said}\n"
        header, *rows = csv.reader(out.open(encoding="utf-8"))
        assert header[6:] == ["score", "spread"]
        split = lacking(test_split, "audio", slice(None))
        expected = np.stack([p.predict(split) for p in load_all(trained)])
        assert [float(row[6]) for row in rows] == pytest.approx(expected.mean(0), abs=1e-5)
        assert [float(row[7]) for row in rows] == pytest.approx(expected.std(0), abs=1e-5)
        assert [row[:3] for row in rows] == [["samples", name, "lv"] for name in test_split.ids]
        assert {row[4] for row in rows} == {"0"}

    def test_it_is_written_whole_or_not_at_all(
        self,
        trained: Path,
        tiny_dataset: Callable[..., Dataset],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        store.write(tiny_dataset(dims=(5, 4, 2)), tmp_path / "narrow.h5")
        out = tmp_path / "predictions.csv"
        out.write_text("before")
        assert main(["predict", "--run", str(trained), "--data", str(tmp_path / "narrow.h5"), "--out", str(out)]) == 2
        assert capsys.readouterr().err == (
            f"error: {tmp_path / 'narrow.h5'}: visual has 2 features, the model was trained on 3\n"
        )
        assert out.read_text() == "before"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["narrow.h5", "predictions.csv"]

    def test_a_folder_that_is_not_there(
        self, trained: Path, tiny_store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "nowhere" / "predictions.csv"
        assert main(["predict", "--run", str(trained), "--data", str(tiny_store), "--out", str(out)]) == 2
        assert capsys.readouterr().err == f"error: {out}: cannot write this file (No such file or directory)\n"

    def test_classes_have_a_column_each(
        self, train_tiny: Callable[..., Path], tiny_config: dict, tiny_store: Path, tmp_path: Path
    ) -> None:
        tiny_config["train"] |= {"task": "classification-3", "epochs": 1}
        run = train_tiny(tiny_config, tmp_path / "run")
        out = tmp_path / "predictions.csv"
        assert main(["predict", "--run", str(run), "--data", str(tiny_store), "--out", str(out)]) == 0
        rows = list(csv.DictReader(out.open(encoding="utf-8")))
        columns = ["p_negative", "p_zero", "p_positive"]
        frames = [f"frames_{m}" for m in MODALITIES]
        assert list(rows[0]) == ["split", "id", "present", *frames, "class", *columns, "label"]
        assert {row["class"] for row in rows} <= {"negative", "zero", "positive"}
        assert all(float(row[f"p_{row['class']}"]) == max(float(row[c]) for c in columns) for row in rows)
        assert all(sum(float(row[c]) for c in columns) == pytest.approx(1, abs=2e-6) for row in rows)

    def test_labels_play_no_part(
        self,
        train_tiny: Callable[..., Path],
        tiny_config: dict,
        tiny_store: Path,
        tiny_dataset: Callable[..., Dataset],
        tmp_path: Path,
    ) -> None:
        """A model of emotions predicts a data set that has scores."""
        dataset = with_emotions(tiny_dataset())
        store.write(dataset, tmp_path / "emotions.h5")
        tiny_config["data"]["path"] = str(tmp_path / "emotions.h5")
        tiny_config["train"] |= {"task": "emotions-binary", "epochs": 1, "select": None}
        run = train_tiny(tiny_config, tmp_path / "run")
        for data in (tmp_path / "emotions.h5", tiny_store):
            out = tmp_path / f"{data.stem}.csv"
            assert main(["predict", "--run", str(run), "--data", str(data), "--out", str(out)]) == 0
        first, second = (
            list(csv.reader((tmp_path / f"{name}.csv").open(encoding="utf-8"))) for name in ("emotions", "tiny")
        )
        assert [row[:-1] for row in first] == [row[:-1] for row in second]
        assert first[0][6:] == ["p_happy", "p_sad", "p_angry", "p_neutral", "label"]
        assert {row[-1] for row in first[1:]} == {"happy", "sad", "angry", "neutral"}
        assert all(-3 <= float(row[-1]) <= 3 for row in second[1:])


class TestEvalCommand:
    def test_it_reproduces_what_training_wrote(self, trained: Path, own_run: Path) -> None:
        pictures = ("curves.png", "confusion.png", "embedding.png")
        for name in ("results.json", "results.md", "results.csv", "embedding.json", *pictures):
            (own_run / name).unlink()
        assert main(["eval", "--run", str(own_run)]) == 0
        for name in ("results.json", "results.md", "results.csv", "embedding.json"):
            assert (own_run / name).read_text() == (trained / name).read_text()
        assert all((own_run / name).stat().st_size > 0 for name in pictures)

    def test_data_that_are_not_there(self, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["eval", "--run", str(trained), "--data", str(tmp_path / "mosi.h5")]) == 2
        assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'mosi.h5'}: no such data file; ")

    def test_other_data_need_a_folder_of_their_own(
        self,
        trained: Path,
        own_run: Path,
        tiny_dataset: Callable[..., Dataset],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        other = tiny_dataset()
        other.splits["test"].labels[0] *= -1
        store.write(other, tmp_path / "other.h5")
        command = ["eval", "--run", str(own_run), "--data", str(tmp_path / "other.h5")]
        assert main(command) == 2
        assert "expected --out DIR, to keep the run's own results" in capsys.readouterr().err
        assert main([*command, "--out", str(tmp_path / "elsewhere")]) == 0
        assert (own_run / "results.json").read_text() == (trained / "results.json").read_text()
        found = json.loads((tmp_path / "elsewhere" / "results.json").read_text())
        assert found["data_hash"] != json.loads((trained / "results.json").read_text())["data_hash"]

    def test_labels_of_another_kind(
        self,
        trained: Path,
        tiny_dataset: Callable[..., Dataset],
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        store.write(with_emotions(tiny_dataset()), tmp_path / "emotions.h5")
        assert main(["eval", "--run", str(trained), "--data", str(tmp_path / "emotions.h5")]) == 2
        assert capsys.readouterr().err == (
            f"error: {tmp_path / 'emotions.h5'}: has emotions labels, the model was trained on score labels\n"
        )


class TestReportCommand:
    def test_two_runs_side_by_side(
        self,
        trained: Path,
        train_tiny: Callable[..., Path],
        tiny_config: dict,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        tiny_config["missing"] = {"enabled": False}
        tiny_config["train"]["seeds"] = [1, 2]
        other = train_tiny(tiny_config, tmp_path / "complete", results=True)
        capsys.readouterr()
        assert main(["report", str(trained), str(other), "--out", str(tmp_path / "report")]) == 0
        out = capsys.readouterr().out
        assert "F1 non0 (%) on tiny test data, regression" in out
        for line in out.splitlines():
            if line.startswith(str(tmp_path)):
                assert Path(line).stat().st_size > 0
        assert {path.suffix for path in (tmp_path / "report").iterdir()} >= {".md", ".csv", ".tex", ".png"}

    def test_a_folder_without_results(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["report", str(tmp_path), "--out", str(tmp_path / "report")]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {tmp_path / 'results.json'}: no such file")
        assert err.count("\n") == 1


def test_env_says_what_there_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for expected in ("python", f"torch {torch.__version__.partition('+')[0]}", "deepspeed", "cross_attention", "cpu"):
        assert expected in " ".join(out.split())
    for title in ("versions", "devices", "operations", "environment variables"):
        assert title in out
