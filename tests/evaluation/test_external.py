"""Other programs under the protocol: the masks that they get, and what becomes of their predictions."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest

from fastmmkd.cli import main
from fastmmkd.data import store
from fastmmkd.data.dataset import Dataset, Split
from fastmmkd.errors import UserError
from fastmmkd.evaluation import external, results
from fastmmkd.modalities import CONDITIONS, MODALITIES, condition_modalities
from fastmmkd.predictor import Predictor, load


@pytest.fixture(scope="module")
def predictor(trained: Path) -> Predictor:
    return load(trained)


@pytest.fixture(scope="module")
def dataset(tiny_store: Path) -> Dataset:
    return store.read(tiny_store)


@pytest.fixture(scope="module")
def masks(trained: Path, tiny_store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `fastmmkd data masks` writes for the config of the trained run."""
    import json

    folder = tmp_path_factory.mktemp("masks")
    config = json.loads((trained / "run.json").read_text())["config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["data", "masks", "--config", str(folder / "config.json"), "--out", str(folder / "masks.h5")]) == 0
    return folder / "masks.h5"


def shown(test: Split, masks: Path, condition: str) -> Split:
    """The test split as another program would see it: what is missing is zero, or absent."""
    features = {m: x.copy() for m, x in test.features.items()}
    present = test.present.copy()
    with h5py.File(masks) as file:
        if condition in CONDITIONS:
            present &= file[f"conditions/{condition}/kept"][()]
            features = {m: x[np.repeat(present[:, i], test.lengths[:, i])] for i, (m, x) in enumerate(features.items())}
        else:
            (group,) = (of for of in file["sweep"].values() if of.attrs["p"] == float(condition.removeprefix("p=")))
            for m, x in features.items():
                x[~group[m][()]] = 0
    return replace(test, features=features, present=present, lengths=np.where(present, test.lengths, 0))


def write_predictions(path: Path, predictor: Predictor, test: Split, masks: Path, sweep: list[float]) -> Path:
    """A program that uses the exported masks and writes its predictions."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "condition", "seed", "score"])
        for condition in [*CONDITIONS, *(f"p={p:g}" for p in sweep)]:
            said = predictor.predict(shown(test, masks, condition))
            for sample, score in zip(test.ids, said, strict=True):
                writer.writerow([sample, condition, predictor.seed, repr(float(score))])
    return path


def test_the_masks_are_those_of_the_protocol(masks: Path, dataset: Dataset) -> None:
    test = dataset.splits["test"]
    with h5py.File(masks) as file:
        assert file.attrs["data_hash"].decode() == dataset.content_hash
        assert file["ids"].asstr()[()].tolist() == test.ids
        for condition in CONDITIONS:
            kept = np.array(condition_modalities(condition))
            assert file[f"conditions/{condition}/kept"][()].tolist() == kept.tolist()
            has = [i for i in range(len(test)) if test.present[i, kept].all()]
            assert file[f"conditions/{condition}/samples"][()].tolist() == has
        ratios = [of.attrs["p"] for of in file["sweep"].values()]
        assert ratios == sorted(ratios)
        for i, m in enumerate(MODALITIES):
            there = [of[m][()].mean() for of in file["sweep"].values()]
            assert file[f"sweep/0/{m}"].shape == (test.lengths[:, i].sum(),)
            assert there[0] == test.frame_mask(m).mean()
            assert there == sorted(there, reverse=True) or len(set(np.round(there, 1))) > 1


def test_predictions_of_another_program_get_the_numbers_of_our_own(
    predictor: Predictor, masks: Path, dataset: Dataset, trained: Path, tmp_path: Path
) -> None:
    ours = results.read(trained)
    sweep = [point.p for point in ours.sweep]
    path = write_predictions(tmp_path / "theirs.csv", predictor, dataset.splits["test"], masks, sweep)
    theirs = external.read(path, dataset, "theirs")
    at = ours.seeds.index(predictor.seed)
    for condition, entry in ours.conditions.items():
        for key, statistic in entry.metrics.items():
            said = theirs.conditions[condition].metrics[key].per_seed
            assert said == pytest.approx([statistic.per_seed[at]], abs=1e-3, nan_ok=True), (condition, key)
        assert theirs.conditions[condition].floor == entry.floor
    for mine, other in zip(ours.sweep, theirs.sweep, strict=True):
        assert other.metrics["mae"].per_seed == pytest.approx([mine.metrics["mae"].per_seed[at]], abs=1e-4)
    assert theirs.data_hash == ours.data_hash


def test_they_stand_in_the_same_report(
    predictor: Predictor, masks: Path, tiny_store: Path, dataset: Dataset, trained: Path, tmp_path: Path
) -> None:
    path = write_predictions(tmp_path / "theirs.csv", predictor, dataset.splits["test"], masks, [])
    arguments = ["report", str(trained), "--external", f"Theirs={path}", "--data", str(tiny_store)]
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| Theirs " in text
    assert f"| {predictor.config.method} - Theirs " in text


@pytest.fixture
def lines(dataset: Dataset) -> list[list[str]]:
    """A file in which everything is right: all zeros."""
    test = dataset.splits["test"]
    return [["id", "condition", "score"], *([i, c, "0.0"] for c in CONDITIONS for i in test.ids)]


def say(path: Path, lines: list[list[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(lines)
    return path


def test_where_no_sample_has_everything_ratios_say_nothing(
    lines: list[list[str]], dataset: Dataset, tmp_path: Path
) -> None:
    test = dataset.splits["test"]
    present, lengths = test.present.copy(), test.lengths.copy()
    present[:, 2], lengths[:, 2] = False, 0
    features = test.features | {"visual": test.features["visual"][:0]}
    blind = replace(test, features=features, present=present, lengths=lengths)
    shown_to_them = [line for line in lines if line[1] in ("condition", "l", "a", "la")]
    shown_to_them += [[i, "p=0.5", "0.0"] for i in test.ids]
    without = replace(dataset, splits=dataset.splits | {"test": blind})
    content = external.read(say(tmp_path / "a.csv", shown_to_them), without, "zeros")
    assert content.conditions["la"].metrics["mae"].mean is not None
    assert content.conditions["lav"].metrics["mae"].mean is None
    assert [entry.metrics["mae"].mean for entry in content.sweep] == [None]


def test_seed_and_ratios_may_be_left_out(lines: list[list[str]], dataset: Dataset, tmp_path: Path) -> None:
    content = external.read(say(tmp_path / "a.csv", lines), dataset, "zeros")
    assert (content.seeds, content.sweep) == ([1], [])


@pytest.mark.parametrize(
    ("line", "cells", "said"),
    [
        (
            0,
            ["id", "condition", "value"],
            r"has the columns id, condition, value; expected id, condition, perhaps seed",
        ),
        (1, ["x", "l", "0"], r"1 ids are not of the test split, such as 'x'"),
        (1, None, r"condition l, seed 1, lacks 1 of \d+ samples of the test split, such as "),
        (
            2,
            ["", "xyz", "0"],
            r"line 3: condition is 'xyz', expected one of l, a, v, la, lv, av, lav, or a ratio such as",
        ),
        (2, ["", "p=1.5", "0"], r"line 3: condition is 'p=1.5'"),
        (2, ["", "l", "nan"], r"line 3: score is 'nan', expected a finite number"),
        (2, ["", "l"], r"line 3 has 2 cells, the header 3"),
    ],
)
def test_a_wrong_line_is_named(
    line: int, cells: list[str] | None, said: str, lines: list[list[str]], dataset: Dataset, tmp_path: Path
) -> None:
    if cells is None:
        del lines[line]
    else:
        lines[line] = [cells[0] or lines[line][0], *cells[1:]]
    with pytest.raises(UserError, match=said):
        external.read(say(tmp_path / "a.csv", lines), dataset, "a")


def test_a_line_twice(lines: list[list[str]], dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line \d+: .* is there twice under l, seed 1"):
        external.read(say(tmp_path / "a.csv", [*lines, lines[1]]), dataset, "a")


def test_what_is_no_csv(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="cannot be read as CSV"):
        external.read(tmp_path / "a.csv", dataset, "a")
    with pytest.raises(UserError, match="cannot be read as CSV"):
        external.read(tmp_path / "none.csv", dataset, "a")
    (tmp_path / "a.csv").write_text("id,condition,score\n")
    with pytest.raises(UserError, match="has no predictions"):
        external.read(tmp_path / "a.csv", dataset, "a")


@pytest.mark.parametrize("arguments", [[], ["--external", "a.csv"], ["--data", "a.h5"]])
def test_arguments_that_do_not_fit(arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", *arguments, "--out", str(tmp_path)]) == 2
    assert "expected" in capsys.readouterr().err
