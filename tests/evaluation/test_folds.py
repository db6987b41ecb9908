"""Runs on the folds of one data set: what they come to together, and how they are compared."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastmmkd.errors import UserError
from fastmmkd.evaluation import embedding, folds, published, report
from fastmmkd.evaluation.report import AgainstPapers
from fastmmkd.evaluation.schema import Results

FOLDS = {f"fold_{i}": {"data_hash": str(i) * 64, "samples": 100 + 20 * i, "data": f"MOSI, fold {i}"} for i in range(3)}


@pytest.fixture
def make_folds(tmp_path: Path, simulate: Callable[..., Results]) -> Callable[..., Path]:
    """A folder of runs on three folds of different sizes."""

    def make(folder: str, **wanted: object) -> Path:
        for fold, facts in FOLDS.items():
            run = tmp_path / folder / fold
            run.mkdir(parents=True)
            (run / "results.json").write_text(simulate(**wanted, **facts).model_dump_json())
        return tmp_path / folder

    return make


def test_every_model_of_every_fold_counts_once(make_folds: Callable[..., Path]) -> None:
    folder = make_folds("umdf", seeds=(1, 2))
    each, together = folds.read_each(folder), folds.read(folder)
    assert list(each) == list(FOLDS)
    assert together.models == [(fold, seed) for fold in FOLDS for seed in (1, 2)]
    values = [v for part in each.values() for v in part.conditions["l"].metrics["f1_non0"].per_seed]
    statistic = together.conditions["l"].metrics["f1_non0"]
    assert statistic.per_seed == values
    assert statistic.mean == pytest.approx(np.mean(values))
    assert statistic.std == pytest.approx(np.std(values, ddof=1))
    assert together.conditions["l"].samples == 100 + 120 + 140
    assert together.average.floor["mae"] == pytest.approx(np.mean([x.average.floor["mae"] for x in each.values()]))
    assert [point.p for point in together.sweep] == [point.p for point in each["fold_0"].sweep]
    assert together.data == "MOSI, fold, 3 folds"


def test_a_run_is_what_it_is(make_folds: Callable[..., Path]) -> None:
    run = make_folds("umdf") / "fold_0"
    assert folds.folders(run) == []
    assert folds.read(run).folds == []
    assert folds.read(run) == folds.read(run / "results.json")


def test_the_same_folds_are_the_same_data_in_any_order(make_folds: Callable[..., Path]) -> None:
    each = folds.read_each(make_folds("umdf"))
    reversed_ = dict(reversed(each.items()))
    assert folds.pooled(each).data_hash == folds.pooled(reversed_).data_hash
    del each["fold_0"]
    assert folds.pooled(each).data_hash != folds.pooled(reversed_).data_hash


def test_folds_that_do_not_belong_together(tmp_path: Path, simulate: Callable[..., Results]) -> None:
    for name, wanted in {"a": {"method": "umdf"}, "b": {"method": "hrlf", "data_hash": "cd" * 32}}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(simulate(**wanted).model_dump_json())
    with pytest.raises(UserError, match=r": b has the method hrlf, a has umdf; expected runs on the folds of one data"):
        folds.read(tmp_path)
    (tmp_path / "b" / "results.json").write_text(simulate().model_dump_json())
    with pytest.raises(UserError, match=r": a and b are runs on the same data, expected one on each fold$"):
        folds.read(tmp_path)


def test_a_report_over_folds(tmp_path: Path, make_folds: Callable[..., Path]) -> None:
    runs = [make_folds("good", method="good", noise=0.2), make_folds("poor", method="poor", noise=0.6)]
    (members,), _ = report.report(runs, tmp_path / "out")
    assert list(members.folds) == list(FOLDS)
    text = (tmp_path / "out" / "report.md").read_text()
    assert re.search(r"\| good +\| +9 \|", text)
    assert "| 1, 2, 3 on each of 3 folds |" in text
    head, appendix = text.split("## Appendix: the folds of MOSI, fold, 3 folds, regression\n")
    assert [line for line in appendix.splitlines() if line.startswith("### ")] == [f"### {fold}" for fold in FOLDS]
    assert "p over folds" in head
    with (tmp_path / "out" / "report.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "mae" and row["run"] == "good"]
    assert [row["data"] for row in rows] == ["MOSI, fold, 3 folds", *(facts["data"] for facts in FOLDS.values())]
    assert float(rows[0]["average"]) == pytest.approx(np.mean([float(row["average"]) for row in rows[1:]]))


def test_pairs_are_models_of_the_same_fold_and_seed(make_folds: Callable[..., Path]) -> None:
    a, b = (folds.read(make_folds(name, noise=noise)) for name, noise in (("a", 0.2), ("b", 0.6)))
    test = report.paired_on_average(a, b, "mae")
    assert test.n == 9
    differences = np.subtract(a.average.metrics["mae"].per_seed, b.average.metrics["mae"].per_seed)
    assert test.mean_difference == pytest.approx(differences.mean())
    over_folds = report.paired_over_folds(a, b, "mae")
    assert over_folds.n == 3
    means = differences.reshape(3, 3).mean(1)
    t = means.mean() / (means.std(ddof=1) / np.sqrt(3))
    from scipy import stats

    assert over_folds.t_p == pytest.approx(2 * stats.t.sf(abs(t), 2))


def test_the_floor_note_names_the_fold(make_folds: Callable[..., Path]) -> None:
    from fastmmkd.evaluation import render

    together = folds.read(make_folds("umdf", seeds=(1, 2)))
    together.at_floor = {"student": [False, True, False, False, False, True]}
    assert render.floor_note(together).endswith("split: student of seeds 2 (fold_0), 2 (fold_2).")


def test_folds_are_no_test_split_of_the_papers(make_folds: Callable[..., Path], tmp_path: Path) -> None:
    """Not even where their test samples happen to add up to as many."""
    together = folds.read(make_folds("umdf", known_posterior=False, seeds=(1, 2))).model_copy(deep=True)
    for entry in together.conditions.values():
        entry.samples = 686
    assert published.recognise(published.shipped(), together) is None
    report.report([tmp_path / "umdf"], tmp_path / "out", papers=AgainstPapers())
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert (
        "No published numbers are shown: MOSI, fold, 3 folds are another division of the data than the papers'." in text
    )
    report.report([tmp_path / "umdf"], tmp_path / "out", papers=AgainstPapers("mosi"))
    text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    assert "HRLF, published" in text
    assert "Against the papers" not in text


def test_the_first_folds_map_is_shown(make_folds: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_folds("umdf", seeds=(1,))
    points, labels = np.random.default_rng(0).normal(size=(8, 3)), np.repeat([-1.0, 1.0], 4)
    embedding.write(
        folder / "fold_0" / "embedding.json", embedding.place(points, labels, np.arange(8), 1, "language only")
    )
    _, files = report.report([folder], tmp_path / "out")
    assert "embedding.png" in [file.name for file in files]
