import argparse
import csv
from pathlib import Path

import numpy as np
import pytest

from fastmmkd.errors import UserError
from fastmmkd.evaluation import commands, embedding, report, results, tables
from fastmmkd.evaluation.latex import escape
from fastmmkd.evaluation.significance import holm


@pytest.fixture
def make_run(tmp_path, simulate):
    """A run folder with nothing but results.json, all that a report reads."""

    def make(folder: str, **wanted: object) -> Path:
        run = tmp_path / folder
        run.mkdir(parents=True)
        (run / "results.json").write_text(simulate(**wanted).model_dump_json())
        return run

    return make


@pytest.fixture(scope="module")
def three_runs(tmp_path_factory, simulate) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    results.write(folder / "good", simulate(method="umdf", noise=0.2))
    results.write(folder / "poor", simulate(method="umdf", noise=1.5))
    results.write(folder / "other", simulate(method="corr_kd & co", noise=0.8))
    return [folder / "good", folder / "poor", folder / "other"]


def bold_rows(text: str, title: str) -> dict[str, list[bool]]:
    table = text.split(f"### {title}\n\n")[1].split("\n\n")[0].splitlines()[2:]
    return {r.split("|")[1].strip(): ["**" in cell for cell in r.split("|")[2:-1]] for r in table}


def test_three_runs_side_by_side(tmp_path, three_runs):
    groups, files = report.report(three_runs, tmp_path / "out")
    assert [f.name for f in files] == ["report.md", "report.csv", "report.tex", "curves.png"]
    assert all(f.stat().st_size > 0 for f in files)
    assert [[name for name, _ in g.runs] for g in groups] == [["umdf (good)", "umdf (poor)", "corr_kd & co"]]
    text = files[0].read_text()
    for title in ("F1 non0 (%)", "MAE (lower is better)"):
        bold = bold_rows(text, title)
        assert list(bold) == ["umdf (good)", "umdf (poor)", "corr_kd & co", "floor", "ideal", "samples"]
        assert all(bold["umdf (good)"])
        assert not any(bold["umdf (poor)"] + bold["floor"] + bold["ideal"])
    assert "![Metrics against the ratio of missing frames](curves.png)" in text


def test_significance_table_pairs_common_seeds(tmp_path, make_run):
    runs = [
        make_run("a", method="a", noise=0.2, seeds=(1, 2, 3, 4, 5, 6)),
        make_run("b", method="b", noise=1.5, seeds=(6, 5, 4, 3, 2, 1, 9)),
        make_run("c", method="c", noise=0.2, seeds=(1, 7)),
    ]
    groups, _ = report.report(runs, tmp_path / "out")
    by_pair = {(c.first, c.second): c.test for c in report.compare(groups[0]) if c.key == "f1_non0"}
    assert [by_pair[p].n for p in (("a", "b"), ("a", "c"), ("b", "c"))] == [6, 1, 1]
    assert by_pair["a", "b"].t_p < 0.01
    assert by_pair["a", "b"].wilcoxon_p == pytest.approx(2 / 2**6)
    # Paired by seed, not by position: the same models in another order do not differ.
    assert by_pair["a", "c"].mean_difference == 0.0
    text = (tmp_path / "out" / "report.md").read_text()
    assert "not enough seeds (2 needed)" in text
    assert "Not enough common seeds for some tests" in text


def test_other_data_or_labels_get_tables_of_their_own(tmp_path, make_run):
    runs = [
        make_run("a", noise=0.2),
        make_run("b", data_hash="cd" * 32),
        make_run("c", task="emotions-binary"),
        make_run("d", noise=0.4),
        make_run("e", task="emotions-4way"),
    ]
    groups, files = report.report(runs, tmp_path / "out")
    names = [[name for name, _ in g.runs] for g in groups]
    assert names == [["umdf (a)", "umdf (d)"], ["umdf (b)"], ["umdf (c)"], ["umdf (e)"]]
    assert [f.name for f in files[3:]] == ["curves.png", "curves-2.png", "curves-3.png", "curves-4.png"]
    text = files[0].read_text()
    assert "cannot be compared" in text
    assert text.count("### Significance on Avg.") == 1
    assert "had different tasks" not in text


class TestScoresWithDifferentTasks:
    """A classifier and regressions on the same data share the tables of the metrics they have in common."""

    @pytest.fixture
    def out(self, tmp_path, make_run):
        seeds = (1, 2, 3, 4, 5, 6)
        runs = [
            make_run("c", method="corrkd", task="classification-2", noise=0.3, seeds=seeds),
            make_run("h", method="hrlf", noise=0.2, seeds=seeds),
            make_run("u", method="umdf", noise=1.0, seeds=seeds, known_posterior=False),
        ]
        self.groups, _ = report.report(runs, tmp_path / "out")
        return tmp_path / "out"

    def test_tables_hold_the_runs_that_have_the_metric(self, out):
        assert [[name for name, _ in g.runs] for g in self.groups] == [["corrkd", "hrlf", "umdf"]]
        text = (out / "report.md").read_text()
        assert list(bold_rows(text, "F1 non0 (%)")) == ["corrkd", "hrlf", "umdf", "floor", "ideal", "samples"]
        assert list(bold_rows(text, "MAE (lower is better)")) == ["hrlf", "umdf", "floor", "ideal", "samples"]
        assert text.count("### F1 non0 (%)") == 1

    def test_the_tasks_are_named(self, out):
        text = (out / "report.md").read_text()
        assert "## simulated MOSI (seed 0), regression and classification-2\n" in text
        runs_table = text.split("\n\n")[2].splitlines()
        rows = [[cell.strip() for cell in (line.split("|")[1], line.split("|")[-2])] for line in runs_table]
        assert rows[0] == ["run", "task"]
        assert rows[2:] == [["corrkd", "classification-2"], ["hrlf", "regression"], ["umdf", "regression"]]
        assert "Tasks: regression (hrlf, umdf); classification-2 (corrkd)." in (out / "report.tex").read_text()
        with (out / "report.csv").open() as file:
            lines = {(line["metric"], line["run"]): line["task"] for line in csv.DictReader(file)}
        assert lines["f1_non0", "corrkd"] == "classification-2"
        assert lines["f1_non0", "hrlf"] == "regression"
        assert lines["f1_non0", "floor"] == ""
        assert ("mae", "corrkd") not in lines

    def test_pairs_are_tested_on_what_both_have(self, out):
        pairs = [(c.first, c.second, c.key) for c in report.compare(self.groups[0])]
        assert pairs == [
            ("corrkd", "hrlf", "f1_non0"),
            ("corrkd", "umdf", "f1_non0"),
            ("hrlf", "umdf", "f1_non0"),
            ("hrlf", "umdf", "mae"),
        ]
        worst = next(c.test for c in report.compare(self.groups[0]) if (c.first, c.second) == ("hrlf", "umdf"))
        assert worst.n == 6
        assert worst.t_p < 0.01
        assert worst.wilcoxon_p == pytest.approx(2 / 2**6)

    @pytest.mark.usefixtures("out")
    def test_the_headline_is_printed_for_all(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "140")
        commands.print_headline(self.groups[0])
        printed = capsys.readouterr().out
        assert all(name in printed for name in ("F1 non0", "corrkd", "hrlf", "umdf", "floor", "ideal"))


def test_p_values_are_corrected_for_their_number(tmp_path, make_run):
    """Three runs, two metrics: six comparisons are one family; MAE and F1 of a pair are tests like any others."""
    seeds = (1, 2, 3, 4, 5, 6)
    runs = [make_run(name, method=name, noise=noise, seeds=seeds) for name, noise in (("a", 0.2), ("b", 0.4), ("c", 1))]
    groups, files = report.report(runs, tmp_path / "out")
    comparisons = report.compare(groups[0])
    assert len(comparisons) == 6
    assert [c.holm_t for c in comparisons] == holm([c.test.t_p for c in comparisons])
    assert [c.holm_wilcoxon for c in comparisons] == holm([c.test.wilcoxon_p for c in comparisons])
    text = files[0].read_text()
    table = text.split("### Significance on Avg.\n\n")[1].split("\n\n")[0].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    assert cells[0][4:] == ["t-test p", "Holm", "Wilcoxon p", "Holm"]
    smallest = min(comparisons, key=lambda c: c.test.wilcoxon_p)
    assert smallest.holm_wilcoxon == pytest.approx(6 * 2 / 2**6)
    assert cells[2 + comparisons.index(smallest)][6:] == ["0.031", "0.188"]
    assert "corrected for the 6 comparisons of this table" in text


def test_one_comparison_needs_no_correction(tmp_path, make_run):
    runs = [make_run("a", task="classification-2"), make_run("b", task="classification-2", noise=0.6)]
    groups, files = report.report(runs, tmp_path / "out")
    (comparison,) = report.compare(groups[0])
    assert comparison.holm_t == comparison.test.t_p
    assert "Holm" not in files[0].read_text()


@pytest.mark.parametrize(("task", "suffix"), [("emotions-binary", ""), ("emotions-4way", "_ovr")])
def test_each_emotion_is_compared(tmp_path, make_run, task, suffix):
    runs = [make_run("a", method="a", task=task, noise=0.2), make_run("b", method="b", task=task, noise=1.0)]
    groups, files = report.report(runs, tmp_path / "out")
    keys = [c.key for c in report.compare(groups[0])]
    assert keys[1:] == [f"f1_{emotion}{suffix}" for emotion in ("happy", "sad", "angry", "neutral")]
    assert files[0].read_text().split("### Significance on Avg.")[1].count("| a - b ") == 5


def test_maps_of_representations_share_a_picture(tmp_path, make_run):
    runs = [make_run("a", method="a"), make_run("b", method="b"), make_run("c", method="c", data_hash="cd" * 32)]
    points, labels = np.random.default_rng(0).normal(size=(12, 3)), np.repeat([-1.0, 0.0, 1.0], 4)
    for run in runs[:2]:
        embedding.write(
            run / "embedding.json", embedding.place(points, labels, np.arange(12), 4, "language only, p = 0.5")
        )
    _, files = report.report([runs[0], runs[1] / "results.json", runs[2]], tmp_path / "out")
    assert [f.name for f in files[3:]] == ["curves.png", "embedding.png", "curves-2.png"]
    text = files[0].read_text()
    assert "t-SNE, language only, p = 0.5; a map per run, each by itself." in text
    assert text.count("![Maps of joint representations](embedding.png)") == 1
    (runs[0] / "embedding.json").write_text("{}")
    with pytest.raises(UserError, match=r"a/embedding\.json: version: Field required"):
        report.report(runs, tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("key", ["f1_non0", "acc2_has0"])
def test_floor_and_ideal_do_not_depend_on_the_task(simulate, key):
    """What lets runs with different tasks share them."""
    tasks = ("regression", "classification-2", "classification-3", "classification-7")
    table = tables.metric_table(key, [(task, simulate(task=task)) for task in tasks])
    assert [row.name for row in table.references] == ["floor", "ideal"]
    first = simulate().conditions["la"]
    assert [row.cells[3].mean for row in table.references] == [first.floor[key], first.ideal[key]]


def test_references_that_disagree_name_their_runs(simulate):
    other = simulate().model_copy(deep=True)
    other.conditions["a"].floor["f1_non0"] += 1.0
    runs = [("a", simulate()), ("b", other), ("c", simulate(noise=0.5)), ("d", simulate(known_posterior=False))]
    table = tables.metric_table("f1_non0", runs)
    assert [row.name for row in table.references] == ["floor of a, c, d", "floor of b", "ideal"]
    assert [row.cells[1].mean for row in table.references[:2]] == [
        run.conditions["a"].floor["f1_non0"] for run in (simulate(), other)
    ]


def test_csv_in_the_papers_columns(tmp_path, three_runs):
    report.report(three_runs, tmp_path / "out")
    with (tmp_path / "out" / "report.csv").open() as f:
        lines = list(csv.DictReader(f))
    by_row = {(r["metric"], r["run"]): r for r in lines}
    good = results.read(three_runs[0])
    row = by_row["mae", "umdf (good)"]
    assert float(row["average"]) == good.average.metrics["mae"].mean
    assert float(row["lav_std"]) == good.conditions["lav"].metrics["mae"].std
    assert row["seeds"] == "3"
    assert float(by_row["mae", "floor"]["la"]) == good.conditions["la"].floor["mae"]
    assert by_row["mae", "ideal"]["la_std"] == ""


def test_latex_is_escaped_and_balanced(tmp_path, three_runs):
    report.report(three_runs, tmp_path / "out")
    text = (tmp_path / "out" / "report.tex").read_text()
    assert r"corr\_kd \& co" in text
    assert r"\{l,a,v\} \\" in text
    assert r"\textbf{" in text
    assert "±" not in text
    body = [line for line in text.splitlines() if line.endswith(r"\\")]
    assert {line.replace(r"\&", "").count("&") for line in body} == {8, 7}
    for environment in ("table*", "tabular"):
        assert text.count(rf"\begin{{{environment}}}") == text.count(rf"\end{{{environment}}}") > 0
    plain = text.replace(r"\{", "").replace(r"\}", "")
    assert plain.count("{") == plain.count("}")


def test_latex_escapes_every_special_character():
    assert escape("a_b & 5% #1 $x$ {y} ~^ \\") == (
        r"a\_b \& 5\% \#1 \$x\$ \{y\} \textasciitilde{}\textasciicircum{} \textbackslash{}"
    )
    assert escape("two\nlines") == "two lines"


def test_names_stay_apart(tmp_path, make_run):
    runs = [make_run("x/run", method="umdf"), make_run("y/run", method="umdf"), make_run("z", method="hrlf")]
    names = [name for name, _ in report.load(runs)]
    assert names[2] == "hrlf"
    assert names[0] == f"umdf ({runs[0] / 'results.json'})"
    assert len(set(names)) == 3


def test_a_run_given_twice_is_refused(make_run):
    run = make_run("x")
    with pytest.raises(UserError, match="given more than once"):
        report.load([run, run / "results.json"])


def test_errors_name_the_file(tmp_path, make_run):
    run, empty = make_run("x"), tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match=r"empty/results\.json: no such file"):
        report.report([run, empty], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match="taken: cannot create this folder"):
        report.report([run], tmp_path / "taken")


def test_equal_printed_values_are_all_bold(simulate):
    run = simulate(seeds=(1,))
    table = tables.metric_table("f1_non0", [("a", run), ("b", run)])
    assert all(cell.best for row in table.runs for cell in row.cells)
    assert not any(cell.best for cell in tables.metric_table("f1_non0", [("a", run)]).runs[0].cells)


def test_markdown_cells_cannot_break_the_table(tmp_path, make_run):
    run = make_run("x", method="a|b")
    report.report([run], tmp_path / "out")
    assert "| a\\|b " in (tmp_path / "out" / "report.md").read_text()


@pytest.mark.parametrize("columns", ["80", "140"])
def test_the_command_prints_the_headline_table_and_the_files(tmp_path, three_runs, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    parser = argparse.ArgumentParser()
    commands.register(parser.add_subparsers())
    args = parser.parse_args(["report", *map(str, three_runs), "--out", str(tmp_path / "out")])
    assert args.run(args) == 0
    printed = capsys.readouterr().out
    mean = results.read(three_runs[0]).average.metrics["f1_non0"].mean
    assert f"{mean:.2f}" in printed
    assert "{l,a,v}" in printed
    assert "…" not in printed
    assert ("±" in printed) == (columns == "140")
    assert str(tmp_path / "out" / "report.md") in printed


def test_results_of_before_a_metric_was_known_show_a_dash_for_it(tmp_path, simulate):
    """`old` was evaluated by a version without Acc-5; its other metrics are compared as ever."""
    old = simulate(seeds=(1, 2), noise=0.5).model_copy(deep=True)
    measured = [*old.conditions.values(), old.average, *old.sweep]
    for entry in measured:
        del entry.metrics["acc5"]
    for entry in (*old.conditions.values(), old.average):
        del entry.floor["acc5"], entry.ideal["acc5"]
    results.write(tmp_path / "old", old)
    assert results.read(tmp_path / "old") == old
    assert "| old |" not in (tmp_path / "old" / "results.md").read_text()
    results.write(tmp_path / "new", simulate(seeds=(1, 2)))
    groups, files = report.report([tmp_path / "old", tmp_path / "new"], tmp_path / "out")
    assert len(groups) == 1
    rows = {}
    for key in ("acc5", "acc7"):
        table = tables.metric_table(key, groups[0].runs)
        rows[key] = dict(zip(("old", "new"), table.runs, strict=True))
        assert [row.name for row in table.references] == ["floor", "ideal"]
    assert all(cell.mean is None for cell in rows["acc5"]["old"].cells)
    assert all(cell.best for cell in rows["acc5"]["new"].cells)
    assert all(cell.mean is not None for cell in rows["acc7"]["old"].cells)
    assert "| umdf (old) |   " in files[0].read_text()


def test_of_many_runs_the_best_is_compared_with_every_other(tmp_path, make_run):
    noises = {"a": 0.9, "b": 0.3, "c": 0.8, "d": 0.7, "e": 0.6}
    runs = [make_run(name, method=name, noise=noise) for name, noise in noises.items()]
    (members,), _ = report.report(runs, tmp_path / "out")
    comparisons = report.compare(members)
    for key in ("f1_non0", "mae"):
        of_key = [c for c in comparisons if c.key == key]
        means = {name: content.average.metrics[key].mean for name, content in members.runs}
        best = (max if key == "f1_non0" else min)(means, key=means.__getitem__)
        assert {c.first for c in of_key} == {best}
        assert sorted(c.second for c in of_key) == sorted(set(noises) - {best})
    assert "is compared with every other" in (tmp_path / "out" / "report.md").read_text()
    (few,), _ = report.report(runs[:4], tmp_path / "few")
    assert len([c for c in report.compare(few) if c.key == "mae"]) == 6
