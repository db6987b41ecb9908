"""Several runs side by side: `fastmmkd report RUN [RUN ...] --out DIR`."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from fastmmkd.errors import UserError
from fastmmkd.evaluation import embedding, folds, metrics, plots, published, render, tables
from fastmmkd.evaluation.embedding import Embedding
from fastmmkd.evaluation.latex import escape, latex_metric
from fastmmkd.evaluation.published import Published
from fastmmkd.evaluation.schema import Results
from fastmmkd.evaluation.significance import MIN_T_PAIRS, MIN_WILCOXON_PAIRS, PairedTest, holm, paired_test
from fastmmkd.evaluation.tables import MetricTable
from fastmmkd.files import make_directory, write_text
from fastmmkd.run_folder import CURVES_FILE, EMBEDDING_FILE, EMBEDDING_PICTURE, RESULTS_FILE
from fastmmkd.tasks import TASKS, Task

MOST_PAIRED = 4
"""Of more runs than that, not each two are compared."""
Run = tuple[str, Results]
"""Display name and the contents of its results.json."""


@dataclass(frozen=True)
class Comparable:
    """Runs on the same data (by hash) whose tasks share metrics: the only ones that may share a table.

    Tasks on scores do, as their common metrics compare the same labels of the same samples. The two emotion tasks have
    no common metric.
    """

    runs: list[Run]
    published: Published | None = None
    """The papers' rows on the same data, where they are asked for."""
    variants: Mapping[str, str] = field(default_factory=dict)
    """Runs that are a row of an ablation table -> which."""
    without_papers: str = ""
    """Where the papers' rows are asked for and there are none: why."""
    folds: Mapping[str, Comparable] = field(default_factory=dict)
    """Fold -> the runs on it, where each run stands for several."""

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

    def table(self, key: str) -> MetricTable:
        """One metric of the runs that have it, with the published rows."""
        rows = self.published.table_rows(key, self.reference) if self.published else []
        return tables.metric_table(key, self.runs, rows)

    def papers_note(self, keys: Sequence[str]) -> str:
        """What the published rows in the tables of some metrics are, or why there are none; empty if not asked for."""
        return self.published.legend(keys) if self.published else self.without_papers

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
    holm_t: float | None
    holm_wilcoxon: float | None
    """p values corrected for the number of comparisons that `compare` makes."""
    over_folds: PairedTest | None = None
    """The same of the folds' means, which are independent of each other as models of a fold are not."""
    holm_folds: float | None = None


@dataclass(frozen=True)
class AgainstPapers:
    """How published rows are to be shown."""

    data: str | None = None
    """Whose: a key of `PaperResults.data_sets`; None: of the data set that each run's data are recognised as."""
    variants: Sequence[str | None] | None = None
    """Per run, the row of its method's ablation table that it is, None for the full method; None: all are that. The
    ablation tables of methods that have such a run are shown."""


def report(
    runs: Sequence[Path],
    out: Path,
    names: Sequence[str] | None = None,
    papers: AgainstPapers | None = None,
    others: Sequence[Run] = (),
) -> tuple[list[Comparable], list[Path]]:
    """Compare finished runs; writes report.md, report.csv, report.tex, curves.png and, of runs that have stored their
    maps of representations, embedding.png into `out` (created if missing).

    Runs that are not comparable (see `Comparable`) never share a table: each set gets its own tables and its own curves
    (curves.png, curves-2.png, ...). A metric that only some runs of a set have is tabled for those.

    Args:
        runs: run folders, or their results.json, or folders of runs on several folds (`evaluation.folds`), which count
            as one run each.
        names: what to call them, in place of the method's name.
        papers: show the papers' rows on the same data, and how far the runs are from them.
        others: results that are in no folder, of names that no run has.

    Returns:
        The comparable sets, in order of first appearance, and the files that were written.

    Raises:
        UserError: a run without readable results, the same run twice, or an `out` that cannot be written.
    """
    loaded = load(runs, names)
    paths = {name: path for (name, _), path in zip(loaded, runs, strict=True)}
    for name, content in others:
        if name in [known for known, _ in loaded]:
            raise UserError(f"{name}: is what a run is called too; expected another name (--external NAME=CSV)")
        loaded.append((name, content))
    parts = {name: folds.read_each(paths[name]) if name in paths else {} for name, _ in loaded}
    sets = [with_folds(members, parts) for members in comparable(loaded)]
    if papers is not None:
        sets = against_papers(sets, [name for name, _ in loaded], papers)
    maps = _maps(sets, paths)
    make_directory(out)
    pictures = []
    for i, (members, of_set) in enumerate(zip(sets, maps, strict=True)):
        curves, embedded = (out / _numbered(name, i) for name in (CURVES_FILE, EMBEDDING_PICTURE))
        plots.curves(curves, members.runs)
        pictures.append(curves)
        if of_set:
            embedding.draw(embedded, of_set)
            pictures.append(embedded)
    texts = {
        "report.md": markdown(sets, maps),
        "report.csv": as_csv(sets),
        "report.tex": as_latex(sets),
    }
    for name, text in texts.items():
        write_text(out / name, text)
    return sets, [out / name for name in texts] + pictures


def with_folds(members: Comparable, parts: Mapping[str, Mapping[str, Results]]) -> Comparable:
    """The set with what its runs have reached on each fold.

    Args:
        parts: run -> fold -> results; no folds where it is one run.
    """
    names = dict.fromkeys(fold for name, _ in members.runs for fold in parts[name])
    of_folds = {fold: [(name, parts[name][fold]) for name, _ in members.runs if fold in parts[name]] for fold in names}
    return replace(members, folds={fold: Comparable(runs) for fold, runs in of_folds.items()})


def against_papers(sets: Sequence[Comparable], names: Sequence[str], papers: AgainstPapers) -> list[Comparable]:
    """The sets with the published rows on their data; without, where no paper reports on them.

    Args:
        names: of all runs, in the order of `papers.variants`.

    Raises:
        UserError: there are no published results.
    """
    content = published.shipped()
    variants = {n: v for n, v in zip(names, papers.variants or [None] * len(names), strict=True) if v is not None}
    found = []
    for members in sets:
        reference = members.reference
        ablated = list(dict.fromkeys(results.method for name, results in members.runs if name in variants))
        if papers.data is None:
            rows = published.recognise(content, reference, ablated)
        else:
            rows = published.as_told(content, reference, papers.data, ablated)
        known = [content.data_sets[papers.data]] if papers.data else list(content.data_sets.values())
        why = "" if rows else f"No published numbers are shown: {published.why_not(known, reference)}."
        found.append(replace(members, published=rows, variants=variants, without_papers=why))
    return found


def _numbered(name: str, i: int) -> str:
    """Of the i-th set: `curves.png`, `curves-2.png`, ..."""
    return name if i == 0 else f"{Path(name).stem}-{i + 1}{Path(name).suffix}"


def _maps(sets: Sequence[Comparable], paths: Mapping[str, Path]) -> list[list[tuple[str, Embedding]]]:
    """Per set, title and map of representations of every run that has stored one beside its results; of folds the
    first's."""
    of_sets = []
    for members in sets:
        of_set = []
        for name in (name for name, _ in members.runs if name in paths):
            path = paths[name]
            parts = folds.folders(path)
            folder = parts[0] if parts else path if path.is_dir() else path.parent
            if (folder / EMBEDDING_FILE).exists():
                stored = embedding.read(folder / EMBEDDING_FILE)
                where = f"{folder.name}, seed {stored.seed}" if parts else f"seed {stored.seed}"
                of_set.append((f"{name} ({where})", stored))
        of_sets.append(of_set)
    return of_sets


def load(paths: Sequence[Path], names: Sequence[str] | None = None) -> list[Run]:
    """Read every run and name it: as given, else by the method, with its folder or whole path where that is not unique.

    Raises:
        UserError: a run without readable results, or given twice; folds that do not belong together.
    """
    files = [(p / RESULTS_FILE if p.is_dir() else p) for p in paths]
    twice = [str(p) for p, n in Counter(f.resolve() for f in files).items() if n > 1]
    if twice:
        raise UserError(f"{twice[0]}: given more than once, each run can be listed only once")
    contents = [folds.read(p) for p in paths]
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
    """Paired tests on "Avg." for each two runs of a set: the headline metric, F1 of each emotion, and MAE for two that
    have it. Of more than `MOST_PAIRED` runs, the best one of each metric against every other. All of them are one
    family, for whose size p values are corrected."""
    keys = [members.primary, *(metrics.error(task) for task in members.tasks if task.is_regression)]
    keys += [key for task in members.tasks for key in metrics.of_emotions(task)]
    pairs = [(a, b, key) for key in keys for a, b in _paired(tables.with_metric(key, members.runs), key)]
    tests = [paired_on_average(a, b, key) for (_, a), (_, b), key in pairs]
    corrected = zip(holm([test.t_p for test in tests]), holm([test.wilcoxon_p for test in tests]), strict=True)
    comparisons = [
        Comparison(a, b, key, test, *p_values)
        for ((a, _), (b, _), key), test, p_values in zip(pairs, tests, corrected, strict=True)
    ]
    if not members.reference.folds:
        return comparisons
    over_folds = [paired_over_folds(a, b, key) for (_, a), (_, b), key in pairs]
    return [
        replace(comparison, over_folds=test, holm_folds=p)
        for comparison, test, p in zip(comparisons, over_folds, holm([test.t_p for test in over_folds]), strict=True)
    ]


def _paired(runs: Sequence[Run], key: str) -> Iterable[tuple[Run, Run]]:
    """Each two runs, or, of many, the best and each other."""
    if len(runs) <= MOST_PAIRED:
        return combinations(runs, 2)
    reached = {name: content.average.metrics[key].mean for name, content in runs if key in content.average.metrics}
    known = {name: value for name, value in reached.items() if value is not None}
    if not known:
        return []
    best = (max if metrics.higher_is_better(key) else min)(known, key=lambda name: known[name])
    (winner,) = (run for run in runs if run[0] == best)
    return [(winner, run) for run in runs if run is not winner]


def paired_on_average(a: Results, b: Results, key: str) -> PairedTest:
    """Paired tests of two results on a metric's "Avg.", over the seeds (of each fold) that they have in common."""
    pairs = pairs_on_average(a, b, key)
    return paired_test([x for _, x, _ in pairs], [y for _, _, y in pairs])


def paired_over_folds(a: Results, b: Results, key: str) -> PairedTest:
    """The same over the folds' means."""
    of_folds: dict[str, list[tuple[float, float]]] = {}
    for fold, x, y in pairs_on_average(a, b, key):
        if x is not None and y is not None:
            of_folds.setdefault(fold, []).append((x, y))
    means = [np.mean(values, axis=0).tolist() for values in of_folds.values()]
    return paired_test([x for x, _ in means], [y for _, y in means])


def pairs_on_average(a: Results, b: Results, key: str) -> list[tuple[str, float | None, float | None]]:
    """Fold and both values on "Avg." of every model that two results have in common."""
    common = [model for model in a.models if model in b.models]

    def values(content: Results) -> list[float | None]:
        statistic = content.average.metrics.get(key)  # unknown to whoever evaluated it, perhaps
        return [statistic.per_seed[content.models.index(model)] if statistic else None for model in common]

    return [(fold, x, y) for (fold, _), x, y in zip(common, values(a), values(b), strict=True)]


def markdown(sets: Sequence[Comparable], maps: Sequence[Sequence[tuple[str, Embedding]]]) -> str:
    """`report.md`.

    Args:
        maps: per set, what its picture of representations shows.
    """
    parts = ["# Comparison of runs\n"]
    if len(sets) > 1:
        parts.append("Runs on different data or labels cannot be compared; each has its own section.\n")
    for i, (members, of_set) in enumerate(zip(sets, maps, strict=True)):
        parts += [f"## {members.title}\n", _runs_table(members)]
        parts += [f"{name}: {note}\n" for name, content in members.runs if (note := render.floor_note(content))]
        parts.append(render.legend(members.reference))
        if note := members.papers_note(members.shown):
            parts.append(note + "\n")
        if len(members.tasks) > 1:
            parts.append(
                "The runs had different tasks. A metric that several have compares the same labels of the same "
                "samples; runs whose task lacks a metric are not in its table.\n"
            )
        for key in members.shown:
            table = members.table(key)
            parts += [f"### {table.title}\n", tables.markdown_metric(table)]
        parts += _reproduction(members)
        picture = _numbered(CURVES_FILE, i)
        parts += ["### Frames missing at ratio p\n", f"![Metrics against the ratio of missing frames]({picture})\n"]
        if of_set:
            parts += ["### Representations\n", f"t-SNE, {of_set[0][1].condition}; a map per run, each by itself.\n"]
            parts.append(f"![Maps of joint representations]({_numbered(EMBEDDING_PICTURE, i)})\n")
        if len(members.runs) > 1:
            parts += ["### Significance on Avg.\n", _significance(members)]
    for members in sets:
        parts += _appendix(members)
    return "\n".join(parts)


def _appendix(members: Comparable) -> list[str]:
    """The headline metric, and errors where there are any, on every fold by itself."""
    if not members.folds:
        return []
    parts = [f"## Appendix: the folds of {members.title}\n"]
    for fold, on_fold in members.folds.items():
        parts.append(f"### {fold}\n\n{on_fold.reference.data}, data {on_fold.reference.data_hash[:12]}.\n")
        errors = [metrics.error(task) for task in on_fold.tasks if task.is_regression]
        for key in dict.fromkeys([on_fold.primary, *errors]):
            table = on_fold.table(key)
            parts += [f"{table.title}:\n", tables.markdown_metric(table)]
    return parts


def as_csv(sets: Sequence[Comparable]) -> str:
    """`report.csv`: one line per metric and row; the papers' columns (`l` ... `lav`), then `<column>_std`.

    `task` is the run's; that of a floor or ideal is empty where runs had different ones. Each fold by itself follows.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["data", "data_hash", "task", "metric", "run", "seeds"]
    writer.writerow([*head, *tables.COLUMNS, *(f"{c}_std" for c in tables.COLUMNS)])
    for members in [*sets, *(on_fold for of_set in sets for on_fold in of_set.folds.values())]:
        facts = [members.reference.data, members.reference.data_hash]
        known = {name: (content.task, len(content.seeds)) for name, content in members.runs}
        shared = members.tasks[0].name if len(members.tasks) == 1 else ""
        for key in members.keys:
            table = members.table(key)
            averaged = members.published.seeds(key) if members.published else {}
            for row in table.runs + table.published + table.references:
                task, count = known[row.name] if row in table.runs else (shared, averaged.get(row.name, ""))
                cells = [*(c.mean for c in row.cells), *(c.std for c in row.cells)]
                writer.writerow([*facts, task, key, row.name, count, *cells])
    return out.getvalue()


def as_latex(sets: Sequence[Comparable]) -> str:
    """`report.tex`: tables to be `\\input` into a document that loads booktabs."""
    parts = ["% Needs \\usepackage{booktabs} and \\usepackage[T1]{fontenc}.\n"]
    for members in sets:
        for key in members.shown:
            table = members.table(key)
            note = tables.average_note(members.reference)
            caption = f"{table.title} on {members.title}.{members.task_note}" + f" {note}." * bool(note)
            parts.append(latex_metric(table, caption))
        if len(members.runs) > 1:
            header, cells = _significance_table(members)
            rows = [" & ".join(map(escape, row)) + r" \\" for row in cells]
            head = " & ".join(rf"\textbf{{{escape(h)}}}" for h in header) + r" \\"
            parts.append(
                "\n".join(
                    [
                        r"\begin{table*}[t]",
                        r"\centering",
                        rf"\caption{{Paired tests on Avg., {escape(members.title + '.' + members.task_note)}}}",
                        rf"\begin{{tabular}}{{ll{'c' * (len(header) - 2)}}}",
                        *(r"\toprule", head, r"\midrule", *rows, r"\bottomrule"),
                        r"\end{tabular}",
                        r"\end{table*}",
                    ]
                )
                + "\n"
            )
    return "\n".join(parts)


def _runs_table(members: Comparable) -> str:
    header, tasks_differ = ["run", "seeds", "which", "data hash"], len(members.tasks) > 1
    rows = [
        [name, str(len(content.seeds)), which(content), content.data_hash[:12]] + [content.task] * tasks_differ
        for name, content in members.runs
    ]
    return tables.markdown_table(header + ["task"] * tasks_differ, rows)


def which(content: Results) -> str:
    """The seeds: `"1, 2, 3"`, of folds `"1, 2, 3 on each of 4 folds"`, or fold by fold where they differ."""
    of_folds: dict[str, list[str]] = {}
    for fold, seed in content.models:
        of_folds.setdefault(fold, []).append(str(seed))
    texts = [", ".join(seeds) for seeds in of_folds.values()]
    if not content.folds:
        return texts[0]
    if len(set(texts)) == 1:
        return f"{texts[0]} on each of {len(texts)} folds"
    return "; ".join(f"{fold}: {seeds}" for fold, seeds in zip(of_folds, texts, strict=True))


def _significance(members: Comparable) -> str:
    comparisons = compare(members)
    notes = ["Paired over common seeds, two-sided."]
    if members.reference.folds:
        notes = [
            "Paired over common seeds of every fold, two-sided. Models of a fold share its samples, so these p values "
            "are too small where folds differ; *over folds* is a paired t-test of the folds' means."
        ]
    if any(c.test.n < MIN_T_PAIRS for c in comparisons):
        notes.append(f"Not enough common seeds for some tests: the t-test needs {MIN_T_PAIRS}.")
    if any(c.test.n < MIN_WILCOXON_PAIRS for c in comparisons):
        notes.append(f"The Wilcoxon test needs {MIN_WILCOXON_PAIRS} common seeds to be able to fall below p = 0.05.")
    if len(members.runs) > MOST_PAIRED:
        notes.append("The run with the best mean of each metric is compared with every other.")
    if len(comparisons) > 1:
        notes.append(f"*Holm*: the p value before it, corrected for the {len(comparisons)} comparisons of this table.")
    header, rows = _significance_table(members)
    return tables.markdown_table(header, rows) + "\n" + " ".join(notes) + "\n"


def _significance_table(members: Comparable) -> tuple[list[str], list[list[str]]]:
    """Header and rows; p values corrected for the number of comparisons where there are several."""
    comparisons = compare(members)
    several = len(comparisons) > 1
    header = ["runs (first - second)", "metric", "common seeds", "mean difference"]
    header += ["t-test p", *["Holm"] * several, "Wilcoxon p", *["Holm"] * several]
    folded = bool(members.reference.folds)
    header += ["p over folds", *["Holm"] * several] * folded
    rows = [
        [
            f"{c.first} - {c.second}",
            metrics.title(c.key),
            str(c.test.n),
            tables.signed(c.key, c.test.mean_difference),
            _p(c.test.t_p, c.test.n, MIN_T_PAIRS),
            *[_corrected(c.holm_t)] * several,
            _p(c.test.wilcoxon_p, c.test.n, MIN_WILCOXON_PAIRS),
            *[_corrected(c.holm_wilcoxon)] * several,
            *_over_folds(c, several),
        ]
        for c in comparisons
    ]
    return header, rows


def _over_folds(comparison: Comparison, several: bool) -> list[str]:
    """p over the folds' means, and corrected where there are several comparisons; nothing where there are no folds."""
    test = comparison.over_folds
    return [_p(test.t_p, test.n, MIN_T_PAIRS), *[_corrected(comparison.holm_folds)] * several] if test else []


def _reproduction(members: Comparable) -> list[str]:
    """How far runs are from the published rows of their own methods; nothing where papers were not asked for, or where
    nothing can be reproduced, as the data were generated or are folds."""
    if members.published is None or published.is_synthetic(members.reference) or members.reference.folds:
        return []
    runs = [(name, content, members.variants.get(name)) for name, content in members.runs]
    parts = []
    for key in members.shown:
        if rows := published.reproduction_rows(members.published, key, runs):
            parts += [f"{metrics.title(key)}:\n", tables.markdown_table(["", *tables.HEADERS], rows)]
    return ["### Against the papers\n", published.METHOD_NOTE + "\n", *parts] if parts else []


def _corrected(value: float | None) -> str:
    return tables.NONE if value is None else _p(value, 0, 0)


def _p(value: float | None, pairs: int, needed: int) -> str:
    if value is not None:
        return "< 0.001" if value < 0.001 else f"{value:.3f}"
    return f"not enough seeds ({needed} needed)" if pairs < needed else "no variance"
