"""Several runs side by side: `fastmmkd report RUN [RUN ...] --out DIR`."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from fastmmkd.errors import UserError
from fastmmkd.evaluation import metrics, plots, render, results, tables
from fastmmkd.evaluation.latex import escape, latex_metric
from fastmmkd.evaluation.schema import Results
from fastmmkd.evaluation.significance import MIN_T_PAIRS, MIN_WILCOXON_PAIRS, PairedTest, paired_test
from fastmmkd.files import make_directory, write_text
from fastmmkd.run_folder import CURVES_FILE, RESULTS_FILE
from fastmmkd.tasks import TASKS, Task

Run = tuple[str, Results]
"""Display name and the contents of its results.json."""


@dataclass(frozen=True)
class Comparable:
    """Runs on the same data (by hash) whose tasks share metrics: the only ones that may share a table.

    Tasks on scores do, as their common metrics compare the same labels of the same samples. The two emotion tasks have
    no common metric.
    """

    runs: list[Run]

    @property
    def reference(self) -> Results:
        """A run to read off what all share, with an ideal if any run knows it."""
        contents = [content for _, content in self.runs]
        return next((content for content in contents if content.average.ideal is not None), contents[0])

    @property
    def tasks(self) -> list[Task]:
        """Each task once, in the order of `fastmmkd.tasks`."""
        present = {content.task for _, content in self.runs}
        return [Task(name) for name in TASKS if name in present]

    @property
    def primary(self) -> str:
        """The headline metric, which all runs have."""
        return metrics.primary(self.tasks[0])

    @property
    def keys(self) -> list[str]:
        """Every metric that a run has."""
        return list(dict.fromkeys(key for task in self.tasks for key in metrics.keys(task)))

    @property
    def shown(self) -> list[str]:
        """The metrics that get a table."""
        return list(dict.fromkeys(key for task in self.tasks for key in tables.shown_metrics(task)))

    @property
    def title(self) -> str:
        return f"{self.reference.data}, {' and '.join(task.name for task in self.tasks)}"

    @property
    def task_note(self) -> str:
        """`" Tasks: regression (umdf, hrlf); classification-2 (corrkd)."`; nothing where all have the same."""
        if len(self.tasks) == 1:
            return ""
        parts = []
        for task in self.tasks:
            names = [name for name, content in self.runs if content.task == task.name]
            parts.append(f"{task.name} ({', '.join(names)})")
        return f" Tasks: {'; '.join(parts)}."


@dataclass(frozen=True)
class Comparison:
    first: str
    second: str
    key: str
    test: PairedTest


def report(runs: Sequence[Path], out: Path, names: Sequence[str] | None = None) -> tuple[list[Comparable], list[Path]]:
    """Compare finished runs; writes report.md, report.csv, report.tex and curves.png into `out` (created if missing).

    Runs that are not comparable (see `Comparable`) never share a table: each set gets its own tables and its own curves
    (curves.png, curves-2.png, ...). A metric that only some runs of a set have is tabled for those.

    Args:
        runs: run folders, or their results.json.
        names: what to call them, in place of the method's name.

    Returns:
        The comparable sets, in order of first appearance, and the files that were written.

    Raises:
        UserError: a run without readable results, the same run twice, or an `out` that cannot be written.
    """
    sets = comparable(load(runs, names))
    make_directory(out)
    pictures = [out / (CURVES_FILE if i == 0 else f"curves-{i + 1}.png") for i in range(len(sets))]
    for members, picture in zip(sets, pictures, strict=True):
        plots.curves(picture, members.runs)
    texts = {
        "report.md": markdown(sets, [p.name for p in pictures]),
        "report.csv": as_csv(sets),
        "report.tex": as_latex(sets),
    }
    for name, text in texts.items():
        write_text(out / name, text)
    return sets, [out / name for name in texts] + pictures


def load(paths: Sequence[Path], names: Sequence[str] | None = None) -> list[Run]:
    """Read every run and name it: as given, else by the method, with its folder or whole path where that is not unique.

    Raises:
        UserError: a run without readable results, or given twice.
    """
    files = [(p / RESULTS_FILE if p.is_dir() else p) for p in paths]
    twice = [str(p) for p, n in Counter(f.resolve() for f in files).items() if n > 1]
    if twice:
        raise UserError(f"{twice[0]}: given more than once, each run can be listed only once")
    contents = [results.read(p) for p in paths]
    if names is not None:
        return list(zip(names, contents, strict=True))
    folders = [f.resolve().parent for f in files]
    methods = [c.method for c in contents]
    named = [f"{m} ({folder.name})" for m, folder in zip(methods, folders, strict=True)]
    full = [f"{m} ({file})" for m, file in zip(methods, files, strict=True)]
    unique = [next((c[i] for c in (methods, named) if c.count(c[i]) == 1), full[i]) for i in range(len(contents))]
    return list(zip(unique, contents, strict=True))


def comparable(runs: Sequence[Run]) -> list[Comparable]:
    """Split runs by data hash and kind of labels, emotions by task too; keeps their order."""
    sets: dict[tuple[str, str], list[Run]] = {}
    for name, content in runs:
        kind = Task(content.task).label_kind
        together = kind if kind == "score" else content.task
        sets.setdefault((content.data_hash, together), []).append((name, content))
    return [Comparable(members) for members in sets.values()]


def compare(members: Comparable) -> list[Comparison]:
    """Paired tests on "Avg." for each two runs of a set: the headline metric, and MAE for two that have it."""
    keys = [members.primary, *(metrics.error(task) for task in members.tasks if task.is_regression)]
    return [
        Comparison(a_name, b_name, key, paired_on_average(a, b, key))
        for key in keys
        for (a_name, a), (b_name, b) in combinations(tables.with_metric(key, members.runs), 2)
    ]


def paired_on_average(a: Results, b: Results, key: str) -> PairedTest:
    """Paired tests of two results on a metric's "Avg.", over the seeds they have in common."""
    common = [seed for seed in a.seeds if seed in b.seeds]

    def values(content: Results) -> list[float | None]:
        statistic = content.average.metrics.get(key)  # unknown to whoever evaluated it, perhaps
        return [statistic.per_seed[content.seeds.index(seed)] if statistic else None for seed in common]

    return paired_test(values(a), values(b))


def markdown(sets: Sequence[Comparable], pictures: Sequence[str]) -> str:
    """`report.md`."""
    parts = ["# Comparison of runs\n"]
    if len(sets) > 1:
        parts.append("Runs on different data or labels cannot be compared; each has its own section.\n")
    for members, picture in zip(sets, pictures, strict=True):
        parts += [f"## {members.title}\n", _runs_table(members)]
        parts += [f"{name}: {note}\n" for name, content in members.runs if (note := render.floor_note(content))]
        parts.append(render.legend(members.reference))
        if len(members.tasks) > 1:
            parts.append(
                "The runs had different tasks. A metric that several have compares the same labels of the same "
                "samples; runs whose task lacks a metric are not in its table.\n"
            )
        for key in members.shown:
            table = tables.metric_table(key, members.runs)
            parts += [f"### {table.title}\n", tables.markdown_metric(table)]
        parts += ["### Frames missing at ratio p\n", f"![Metrics against the ratio of missing frames]({picture})\n"]
        if len(members.runs) > 1:
            parts += ["### Significance on Avg.\n", _significance(members)]
    return "\n".join(parts)


def as_csv(sets: Sequence[Comparable]) -> str:
    """`report.csv`: one line per metric and row; the papers' columns (`l` ... `lav`), then `<column>_std`.

    `task` is the run's; that of a floor or ideal is empty where runs had different ones.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["data", "data_hash", "task", "metric", "run", "seeds"]
    writer.writerow([*head, *tables.COLUMNS, *(f"{c}_std" for c in tables.COLUMNS)])
    for members in sets:
        facts = [members.reference.data, members.reference.data_hash]
        known = {name: (content.task, len(content.seeds)) for name, content in members.runs}
        shared = members.tasks[0].name if len(members.tasks) == 1 else ""
        for key in members.keys:
            table = tables.metric_table(key, members.runs)
            for row in table.runs + table.references:
                task, count = known[row.name] if row in table.runs else (shared, "")
                cells = [*(c.mean for c in row.cells), *(c.std for c in row.cells)]
                writer.writerow([*facts, task, key, row.name, count, *cells])
    return out.getvalue()


def as_latex(sets: Sequence[Comparable]) -> str:
    """`report.tex`: tables to be `\\input` into a document that loads booktabs."""
    parts = ["% Needs \\usepackage{booktabs} and \\usepackage[T1]{fontenc}.\n"]
    for members in sets:
        for key in members.shown:
            table = tables.metric_table(key, members.runs)
            note = tables.average_note(members.reference)
            caption = f"{table.title} on {members.title}.{members.task_note}" + f" {note}." * bool(note)
            parts.append(latex_metric(table, caption))
        if len(members.runs) > 1:
            rows = [" & ".join(map(escape, row)) + r" \\" for row in _significance_rows(members)]
            head = " & ".join(rf"\textbf{{{escape(h)}}}" for h in _SIGNIFICANCE_HEADER) + r" \\"
            parts.append(
                "\n".join(
                    [
                        r"\begin{table*}[t]",
                        r"\centering",
                        rf"\caption{{Paired tests on Avg., {escape(members.title + '.' + members.task_note)}}}",
                        r"\begin{tabular}{llcccc}",
                        *(r"\toprule", head, r"\midrule", *rows, r"\bottomrule"),
                        r"\end{tabular}",
                        r"\end{table*}",
                    ]
                )
                + "\n"
            )
    return "\n".join(parts)


_SIGNIFICANCE_HEADER = ("runs (first - second)", "metric", "common seeds", "mean difference", "t-test p", "Wilcoxon p")


def _runs_table(members: Comparable) -> str:
    header, tasks_differ = ["run", "seeds", "which", "data hash"], len(members.tasks) > 1
    rows = [
        [name, str(len(content.seeds)), ", ".join(map(str, content.seeds)), content.data_hash[:12]]
        + [content.task] * tasks_differ
        for name, content in members.runs
    ]
    return tables.markdown_table(header + ["task"] * tasks_differ, rows)


def _significance(members: Comparable) -> str:
    comparisons = compare(members)
    notes = ["Paired over common seeds, two-sided."]
    if any(c.test.n < MIN_T_PAIRS for c in comparisons):
        notes.append(f"Not enough common seeds for some tests: the t-test needs {MIN_T_PAIRS}.")
    if any(c.test.n < MIN_WILCOXON_PAIRS for c in comparisons):
        notes.append(f"The Wilcoxon test needs {MIN_WILCOXON_PAIRS} common seeds to be able to fall below p = 0.05.")
    if len(members.runs) > 2:
        notes.append("p values are not corrected for the number of comparisons.")
    return tables.markdown_table(_SIGNIFICANCE_HEADER, _significance_rows(members)) + "\n" + " ".join(notes) + "\n"


def _significance_rows(members: Comparable) -> list[list[str]]:
    return [
        [
            f"{c.first} - {c.second}",
            metrics.title(c.key),
            str(c.test.n),
            tables.NONE if c.test.mean_difference is None else _signed(c.key, c.test.mean_difference),
            _p(c.test.t_p, c.test.n, MIN_T_PAIRS),
            _p(c.test.wilcoxon_p, c.test.n, MIN_WILCOXON_PAIRS),
        ]
        for c in compare(members)
    ]


def _signed(key: str, value: float) -> str:
    text = tables.format_number(key, value)
    return text if value < 0 else f"+{text}"


def _p(value: float | None, pairs: int, needed: int) -> str:
    if value is not None:
        return "< 0.001" if value < 0.001 else f"{value:.3f}"
    return f"not enough seeds ({needed} needed)" if pairs < needed else "no variance"
