"""The papers' tables as data, and runs held against them."""

from __future__ import annotations

import argparse
import csv
import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from fastmmkd.errors import UserError
from fastmmkd.evaluation import commands, plots, published, report, results, tables
from fastmmkd.evaluation.published import Distance, PaperRow, Published
from fastmmkd.evaluation.report import AgainstPapers
from fastmmkd.evaluation.schema import Results, Statistic
from fastmmkd.methods import METHODS
from fastmmkd.modalities import INCOMPLETE_CONDITIONS
from fastmmkd.tasks import Task

TEN = ["Self-MM", "CubeMLP", "DMD", "MCTN", "TransM", "SMIL", "GCNet", "UMDF", "CorrKD", "HRLF"]


@pytest.fixture
def mosi(simulate: Callable[..., Results]) -> Callable[..., Results]:
    """A run with as many test samples as MOSI has, not of generated data: `mosi(method, ...)`."""

    def run(method: str = "umdf", **wanted: object) -> Results:
        real: dict[str, object] = {"data": "MulT mosi_data.pkl", "known_posterior": False, "samples": 686}
        return simulate(method=method, **(real | wanted))

    return run


def rows(**wanted: object) -> list[PaperRow]:
    return [r for r in published.shipped().rows if all(getattr(r, key) == value for key, value in wanted.items())]


class TestTheData:
    """What can be checked without the papers: they repeat each other, and average."""

    def test_every_table_is_whole(self) -> None:
        content = published.shipped()
        assert content.methods == TEN
        assert {row.method for row in content.rows} == set(TEN)
        counts = Counter((row.paper, row.table) for row in content.rows)
        systems = {"UMDF": 7, "CorrKD": 8, "HRLF": 9}  # of each, on two and then on one data set with four emotions
        for paper, number in systems.items():
            assert counts[paper, 1] == number * 2 * (2 if paper == "UMDF" else 1)  # UMDF: MAE too
            assert counts[paper, 2] == number * 4
            assert counts[paper, 3] == 4  # three ablations and the full method; of UMDF four ablations
        assert sum(counts.values()) == len(content.rows) == 170

    def test_papers_that_print_a_row_agree(self) -> None:
        seen: dict[tuple[object, ...], dict[str, float]] = {}
        shared = 0
        for row in published.shipped().rows:
            key = (row.method, row.variant, row.data, row.metric)
            shared += key in seen
            assert seen.setdefault(key, row.values) == row.values, key
        # Six systems of UMDF's tables are in CorrKD's, eight of CorrKD's in HRLF's; two full rows of ablation tables.
        assert shared == 6 * 6 + 8 * 6 + 2

    def test_averages_are_the_means_of_their_conditions(self) -> None:
        for row in published.shipped().rows:
            mean = math.fsum(row.values[c] for c in INCOMPLETE_CONDITIONS) / 6
            digits = published.decimals(list(row.values.values()))
            assert digits == {"mae": 3, "f1_non0": 2}.get(row.metric, 1)
            assert abs(row.values["average"] - mean) <= 0.5001 * 10**-digits, row

    def test_some_cells_by_hand(self) -> None:
        (own,) = rows(method="HRLF", data="mosi", metric="f1_non0", table=1)
        assert list(own.values.values()) == [83.36, 69.47, 64.59, 83.82, 83.56, 75.62, 76.74, 84.15]
        (own,) = rows(method="UMDF", data="mosi", metric="mae")
        assert list(own.values.values()) == [0.832, 1.056, 1.117, 0.775, 0.816, 0.973, 0.928, 0.782]
        (sad,) = rows(method="CorrKD", data="iemocap", metric="f1_sad", paper="HRLF")
        assert list(sad.values.values()) == [82.7, 71.3, 67.6, 83.4, 82.2, 72.5, 76.6, 85.9]
        (without,) = rows(variant="w/o CPD")
        assert without.values["a"] == 63.72
        (dmd,) = rows(method="DMD", data="mosei", metric="f1_non0", paper="CorrKD")
        assert (dmd.values["v"], dmd.values["lav"]) == (39.84, 84.78)

    def test_ablations_are_named_as_methods_name_theirs(self) -> None:
        for row in published.shipped().rows:
            if row.variant is not None:
                (method,) = (m for m in METHODS.values() if published.same_method(m.name, row.method))
                assert row.variant in method.ablations

    def test_the_methods_here_are_among_them(self) -> None:
        found = {title for title in TEN if any(published.same_method(name, title) for name in METHODS)}
        assert found >= {"UMDF", "CorrKD", "HRLF"}
        assert published.same_method("Self-MM", "selfmm")
        assert not published.same_method("UMDF", "HRLF")


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("version",), 2, "version: Input should be 1"),
        (("rows", 0, "method"), "BERT", "rows.0.method is 'BERT', expected one of Self-MM"),
        (("rows", 1, "data"), "sims", "rows.1.data is 'sims', expected one of mosi"),
        (("rows", 1, "paper"), "GPT", "rows.1.paper is 'GPT', expected one of UMDF"),
        (("rows", 1, "table"), 9, "rows.1.table is 9, which papers.UMDF.tables does not have"),
        (("rows", 0, "metric"), "bleu", "rows.0.metric is 'bleu', which is no metric"),
        (("rows", 0, "values"), {"l": 1.0}, "rows.0.values has l, expected l, a, v, la, lv, av, average, lav"),
        (("rows", 1, "values", "av"), 471.2, "rows.1.values.av is 471.2, expected 0 to 100"),
        (("rows", 1, "method"), "CubeMLP", "rows.3: CubeMLP mosi f1_non0 UMDF 1 is there twice"),
        (("rows", 1, "extra"), 1, "rows.1.extra: Extra inputs are not permitted"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, where: tuple, value: object, message: str) -> None:
    content = json.loads(published.path().read_text(encoding="utf-8"))
    target = content
    for key in where[:-1]:
        target = target[key]
    target[where[-1]] = value
    file = tmp_path / "papers.json"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        published.read(file)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{file}: ")
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file or directory; expected published results"):
        published.read(tmp_path / "papers.json")


class TestRecognised:
    @pytest.mark.parametrize(
        ("samples", "task", "name"),
        [
            (686, "regression", "mosi"),
            (686, "classification-3", "mosi"),
            (4659, "classification-2", "mosei"),
            (4643, "regression", "mosei"),
            (938, "emotions-binary", "iemocap"),
        ],
    )
    def test_by_the_test_split(self, mosi: Callable[..., Results], samples: int, task: str, name: str) -> None:
        run = mosi(samples=120, task=task, seeds=(1,)).model_copy(deep=True)
        for entry in run.conditions.values():
            entry.samples = samples
        found = published.recognise(published.shipped(), run)
        assert found is not None
        assert found.data == name
        assert f"matched by {samples} test samples" in found.reason

    def test_not_by_another_number_or_kind_of_labels(self, mosi: Callable[..., Results]) -> None:
        assert published.recognise(published.shipped(), mosi(samples=685, seeds=(1,))) is None
        assert published.recognise(published.shipped(), mosi(task="emotions-binary", seeds=(1,))) is None
        assert published.recognise(published.shipped(), mosi(task="regression-sims", seeds=(1,))) is None

    def test_never_what_was_generated(self, mosi: Callable[..., Results]) -> None:
        """Neither by what it says of itself, nor by the ideal that is known for it."""
        imitated = mosi(data="synthetic, like mosi, fraction 1, seed 1", seeds=(1,))
        assert published.recognise(published.shipped(), imitated) is None
        assert published.recognise(published.shipped(), mosi(known_posterior=True, seeds=(1,))) is None

    def test_unless_told(self, simulate: Callable[..., Results]) -> None:
        found = published.as_told(published.shipped(), simulate(), "mosei")
        assert found is not None
        assert "because that was asked for" in found.legend(["f1_non0"])
        assert published.as_told(published.shipped(), simulate(), "iemocap") is None


class TestRows:
    def test_one_for_every_system_in_its_order(self, mosi: Callable[..., Results]) -> None:
        found = Published(published.shipped(), "mosi", "because")
        assert [row.name for row in found.table_rows("f1_non0", mosi())] == [f"{name}, published" for name in TEN]
        with_mae = [name for name in TEN if name not in ("DMD", "CorrKD", "HRLF")]
        assert [row.name for row in found.table_rows("mae", mosi())] == [f"{name}, published" for name in with_mae]
        assert found.table_rows("acc7", mosi()) == []

    def test_ablations_only_where_they_are_asked_for(self, mosi: Callable[..., Results]) -> None:
        found = Published(published.shipped(), "mosi", "because", ["umdf", "corrkd", "hrlf"])
        names = [row.name for row in found.table_rows("f1_non0", mosi())]
        assert len(names) == 10 + 4 + 3 + 3
        assert names.count("HRLF, published") == 1
        assert "UMDF w/o L_fea, published" in names

    def test_papers_that_disagree_have_a_row_each(self, mosi: Callable[..., Results]) -> None:
        content = published.shipped().model_copy(deep=True)
        row = next(r for r in content.rows if (r.method, r.paper, r.data) == ("GCNet", "HRLF", "mosi"))
        row.values["v"] += 0.01
        names = [r.name for r in Published(content, "mosi", "because").table_rows("f1_non0", mosi())]
        assert [name for name in names if name.startswith("GCNet")] == [
            "GCNet, published in UMDF",
            "GCNet, published in HRLF",
        ]

    def test_what_the_floor_betters_is_marked(self, mosi: Callable[..., Results]) -> None:
        """MOSI has 379 negative and 277 positive test samples: always negative reaches 42.31, whatever the run's own
        floor is; of MAE nothing but that is known."""
        run = mosi(samples=120)
        found = Published(published.shipped(), "mosi", "because")
        share = 379 / 656
        assert found.floor("f1_non0", "v", run) == pytest.approx(100 * share * 2 * share / (1 + share))
        assert found.floor("mae", "v", run) == run.conditions["v"].floor["mae"]
        printed = {row.name.split(",")[0]: [c.printed for c in row.cells] for row in found.table_rows("f1_non0", run)}
        assert printed["DMD"] == ["68.97", "43.33", "42.26 †", "70.51", "68.45", "50.47", "57.33", "84.50"]
        assert printed["CubeMLP"][1:3] == ["38.91 †", "43.24"]
        assert sum("†" in cell for cells in printed.values() for cell in cells) == 4  # and Self-MM's {a} and {v}
        emotions = Published(published.shipped(), "iemocap", "because")
        run = mosi(task="emotions-binary", samples=120)
        row = emotions.table_rows("f1_neutral", run)[0]
        floor = [run.conditions[c].floor["f1_neutral"] for c in ("l", "a", "v")]
        assert [c.printed for c in row.cells[:3]] == [
            f"{value:.1f}" + " †" * (value < limit) for value, limit in zip((55.8, 48.2, 50.4), floor, strict=True)
        ]


class TestDistance:
    def test_by_hand(self) -> None:
        """Four seeds, a deviation of 3; the published mean is over five: an error of 3 sqrt(1/4 + 1/5) = 2.012, and
        3.182 is Student's 97.5% quantile with three degrees of freedom. Half of the last digit comes on top."""
        ours = Statistic(mean=80.0, std=3.0, per_seed=[77.0, 80.0, 80.0, 83.0])
        found = published.distance(ours, 74.25, 5)
        assert found is not None
        assert found.difference == pytest.approx(5.75)
        assert found.margin == pytest.approx(3.18245 * 3 * math.sqrt(0.45) + 0.005, rel=1e-5)
        assert found.within is True
        assert published.distance(ours, 73.5, 5).within is False  # the margin is 6.41 with one decimal

    def test_one_seed_decides_nothing(self) -> None:
        found = published.distance(Statistic(mean=80.0, std=None, per_seed=[80.0]), 79.0, 5)
        assert found == Distance(1.0, None)
        assert found.within is None

    def test_no_value(self) -> None:
        assert published.distance(Statistic(mean=None, std=None, per_seed=[None, 80.0]), 79.0, 5) is None

    def test_it_covers_as_often_as_it_says(self) -> None:
        """Where both are of one distribution, 95 of 100 means are within."""
        import numpy as np

        rng = np.random.default_rng(0)
        within = 0
        for _ in range(2000):
            ours, theirs = rng.normal(70, 2, 3), rng.normal(70, 2, 5).mean()
            statistic = Statistic(mean=float(ours.mean()), std=float(ours.std(ddof=1)), per_seed=ours.tolist())
            within += bool(published.distance(statistic, float(theirs), 5).within)
        assert 0.935 < within / 2000 < 0.965


def test_verdicts_know_what_is_better(mosi: Callable[..., Results]) -> None:
    """A run that is far better than published, in F1 and in MAE."""
    run = mosi(noise=0.0, samples=120)
    found = Published(published.shipped(), "mosi", "because")
    for key in ("f1_non0", "mae"):
        difference, margin, verdict = published.reproduction_rows(found, key, [("mine", run, None)])
        assert difference[0] == "mine − UMDF, published"
        assert (margin[0], verdict[0]) == ("seeds explain up to", "reproduced")
        for column, text in zip(tables.COLUMNS, verdict[1:], strict=True):
            entry = run.average if column == "average" else run.conditions[column]
            (row,) = rows(method="UMDF", data="mosi", metric=key, variant=None)
            ours, value = entry.metrics[key].mean, row.values[column]
            if text != "yes":
                assert text == ("no: better" if (ours > value) == (key == "f1_non0") else "no: worse")
    assert published.reproduction_rows(found, "f1_non0", [("without", run, "complete training")]) == []
    ablated = published.reproduction_rows(
        Published(published.shipped(), "mosi", "because", ["umdf"]), "f1_non0", [("w/o MCIM", run, "w/o MCIM")]
    )
    assert ablated[0][0] == "w/o MCIM − UMDF w/o MCIM, published"


class TestReport:
    @pytest.fixture(autouse=True)
    def without_pictures(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(plots, "curves", lambda path, runs: path.touch())
        monkeypatch.setattr(plots, "confusion", lambda path, results: path.touch())

    @pytest.fixture
    def runs(self, tmp_path: Path, mosi: Callable[..., Results]) -> list[Path]:
        made = [mosi("umdf", samples=120), mosi("corrkd", task="classification-3", samples=120)]
        for run in made:
            copy = json.loads(run.model_dump_json())
            for part in copy["conditions"].values():
                part["samples"], part["used"], part["confusion"] = 686, None, None
            (tmp_path / run.method).mkdir()
            (tmp_path / run.method / "results.json").write_text(json.dumps(copy))
        return [tmp_path / run.method for run in made]

    def test_published_rows_beside_the_runs(self, tmp_path: Path, runs: list[Path]) -> None:
        (members,), _ = report.report(runs, tmp_path / "out", papers=AgainstPapers())
        text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
        table = text.split("### F1 non0 (%)\n\n")[1].split("\n\n")[0].splitlines()
        names = [line.split("|")[1].strip() for line in table[2:]]
        assert names == ["umdf", "corrkd", *(f"{name}, published" for name in TEN), "floor", "samples"]
        assert (
            "from UMDF (AAAI 2024), table 1; CorrKD (CVPR 2024), tables 1 and 3; HRLF (NeurIPS 2024), tables 1 and 3."
            in text
        )
        assert "Matched by 686 test samples (as the papers state), labelled with scores" in text
        assert (
            "features: 42.31 of F1 non0 (%), by the 379 negative and 277 positive test samples of MOSI; of other "
            "metrics the row *floor*."
        ) in text
        against = text.split("### Against the papers")[1]
        assert "umdf − UMDF, published" in against
        assert "corrkd − CorrKD, published" in against
        assert against.index("F1 non0") < against.index("MAE")
        latex = (tmp_path / "out" / "report.tex").read_text(encoding="utf-8")
        assert "CorrKD, published & 81.20 &" in latex
        assert r"38.52$^\dagger$" in latex
        with (tmp_path / "out" / "report.csv").open(encoding="utf-8") as file:
            lines = {(line["metric"], line["run"]): line for line in csv.DictReader(file)}
        assert lines["f1_non0", "HRLF, published"]["average"] == "76.74"
        assert lines["f1_non0", "HRLF, published"]["seeds"] == "5"
        assert lines["mae", "UMDF, published"]["l_std"] == ""
        assert not any(name.endswith("published") for name, _ in members.runs)

    def test_nothing_of_it_unless_asked(self, tmp_path: Path, runs: list[Path]) -> None:
        report.report(runs, tmp_path / "out")
        assert "published" not in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")

    def test_generated_data_are_told_apart(self, tmp_path: Path, simulate: Callable[..., Results]) -> None:
        results.write(tmp_path / "run", simulate(seeds=(1, 2), data="synthetic, like mosi, fraction 1, seed 1"))
        report.report([tmp_path / "run"], tmp_path / "out", papers=AgainstPapers())
        text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
        assert "No published numbers are shown: synthetic, like mosi, fraction 1, seed 1 was generated." in text
        assert "HRLF, published" not in text
        report.report([tmp_path / "run"], tmp_path / "out", papers=AgainstPapers("mosi"))
        text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
        assert "HRLF, published" in text
        assert "Set beside synthetic, like mosi, fraction 1, seed 1 because that was asked for" in text
        assert "Against the papers" not in text  # what was generated reproduces nothing

    @pytest.mark.parametrize("columns", ["80", "160"])
    def test_the_command(
        self,
        tmp_path: Path,
        runs: list[Path],
        columns: str,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setenv("COLUMNS", columns)
        parser = argparse.ArgumentParser()
        commands.register(parser.add_subparsers())
        args = parser.parse_args(["report", *map(str, runs), "--paper", "--out", str(tmp_path / "out")])
        assert args.run(args) == 0
        printed = capsys.readouterr().out
        assert "38.52 †" in printed
        assert "Matched by 686 test samples" in printed
        args = parser.parse_args(["report", *map(str, runs), "--paper-data", "sims", "--out", str(tmp_path / "no")])
        with pytest.raises(
            UserError, match="--paper-data sims: no such data set; expected one of mosi, mosei, iemocap"
        ):
            args.run(args)
        assert not (tmp_path / "no").exists()

    def test_rows_of_an_ablation_table(self, tmp_path: Path, runs: list[Path]) -> None:
        papers = AgainstPapers(variants=[None, "w/o SCD"])
        report.report(runs, tmp_path / "out", ["UMDF", "w/o SCD"], papers)
        text = (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
        assert "w/o SCD − CorrKD w/o SCD, published" in text
        assert "UMDF − UMDF, published" in text
        assert "| CorrKD w/o CPD, published " in text
        assert "HRLF w/o HAL" not in text
        assert "tables 1 and 3" in text


def test_a_task_that_papers_do_not_report(mosi: Callable[..., Results]) -> None:
    run = mosi(task="classification-7", samples=120, seeds=(1,))
    found = Published(published.shipped(), "iemocap", "because")
    reported = "F1 happy (%), F1 sad (%), F1 angry (%), F1 neutral (%)"
    assert found.legend(["acc7"]) == f"The papers do not print Acc-7 (%) on IEMOCAP, but {reported}."
    assert found.table_rows("acc7", run) == []
    assert Task(run.task).has_scores
