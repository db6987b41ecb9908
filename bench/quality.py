"""Tables of results, and the records under `bench/results/quality` that they are made of."""

from __future__ import annotations

import shutil
from itertools import combinations
from pathlib import Path
from typing import TypeVar

import numpy as np

from fastmmkd.engine.suite import slug
from fastmmkd.errors import UserError
from fastmmkd.evaluation import folds, published, report, tables
from fastmmkd.evaluation.report import Run
from fastmmkd.evaluation.schema import Results
from fastmmkd.evaluation.significance import holm, paired_test
from fastmmkd.files import make_directory, read_json, write_json
from fastmmkd.methods import METHODS
from fastmmkd.run_folder import RESULTS_FILE, RUN_FILE

Key = TypeVar("Key")
RECORDS = Path(__file__).parent / "results" / "quality"
ABLATIONS = {name: method.ablations for name, method in METHODS.items() if method.ablations}
FULL = {method: next(iter(rows)) for method, rows in ABLATIONS.items()}
"""Method -> its name for people, which is the first row of its ablation table."""
STUDY, FRESH = "study", "fresh"
"""Folders of the ablations on two draws of the data."""
DRAWS = {STUDY: "", FRESH: FRESH}
"""The same, and where `make study` leaves them."""
ALONE, COMPLETE_TRAINING = "without distillation", "complete training"
NOT_YET = "Not yet run.\n"
COMPARED = "compare"
"""Folder of every method on synthetic MOSI, and the generated part."""
REAL = ("ict_mmmo", "cmu_mosi")
"""Real data, as configs and records name them."""
COMPARISONS = (*REAL, COMPARED)
"""Folders that hold every method on the same data."""


def take_study(folder: Path) -> None:
    """Take over what `make study` left in a folder: of both draws, every finished row of the methods that are there."""
    wanted = {(draw, method): folder / place / method for draw, place in DRAWS.items() for method in ABLATIONS}
    for (draw, method), runs in _present(wanted).items():
        for row in map(slug, ABLATIONS[method]):
            if (runs / row / RESULTS_FILE).exists():
                take(runs / row, RECORDS / draw / method / row)


def take_real(folder: Path) -> None:
    """Take over what `make real` left in a folder, of the methods and data that are there."""
    wanted = {(data, method): folder / data / f"{method}_{data}" for data in REAL for method in ABLATIONS}
    for (data, method), run in _present(wanted).items():
        take(run, RECORDS / data / method)


def take_compare(folder: Path) -> None:
    """Take over what `make compare` left in a folder on synthetic MOSI, of the methods that are there."""
    for method, run in _present({method: folder / f"{method}_mosi" for method in ABLATIONS}).items():
        take(run, RECORDS / COMPARED / method)


def _present(wanted: dict[Key, Path]) -> dict[Key, Path]:
    """The folders that are there.

    Raises:
        UserError: none is.
    """
    present = {key: path for key, path in wanted.items() if path.is_dir()}
    if not present:
        folder = next(iter(wanted.values())).parent
        raise UserError(f"{folder}: expected one of the folders {', '.join(path.name for path in wanted.values())}")
    return present


def take(run: Path, record: Path) -> None:
    """Copy a run's results into the records, after reading them once; of a run on several folds, each fold's."""
    folds.read(run)
    of_folds = folds.folders(run)
    if of_folds or folds.folders(record):  # a run on folds and one by itself do not mix
        shutil.rmtree(record, ignore_errors=True)
    for folder in of_folds or [run]:
        place = make_directory(record / folder.name if of_folds else record)
        shutil.copyfile(folder / RESULTS_FILE, place / RESULTS_FILE)
        facts = read_json(folder / RUN_FILE, "a run.json")
        facts.pop("hosts", None)  # whose machines they were is nobody's business
        write_json(place / RUN_FILE, facts)


def parts() -> dict[str, str]:
    """Every generated part about results, by name: what the records say."""
    studies = {f"{draw}_{method}": study_table(draw, method) for draw in DRAWS for method in ABLATIONS}
    compared = {"methods": methods_table(STUDY), "fresh": methods_table(FRESH)}
    f1 = {data: table_of_methods(data) for data in COMPARISONS}
    against_best = {f"{data}_differences": differences_of_methods(data) for data in COMPARISONS}
    errors = {f"{data}_mae": errors_of_methods(data) for data in COMPARISONS}
    of_folds = {"cmu_mosi_folds": folds_table("cmu_mosi")}
    return studies | compared | f1 | against_best | errors | of_folds | {"losses": losses_table()}


def study_table(draw: str, method: str) -> str:
    """A method, its ablations and its baselines on one draw of synthetic MOSI, and the method against each of them."""
    records = _recorded({name: RECORDS / draw / method / slug(name) for name in ABLATIONS[method]})
    if not records:
        return NOT_YET
    runs = _runs(records)
    return _table(records, "f1_non0") + "\n" + _differences([(runs[0], other) for other in runs[1:]], "f1_non0")


def methods_table(draw: str) -> str:
    """The methods and their baselines on one draw of synthetic MOSI; each compared with its own, and with the others.

    Baselines: UMDF's network trained on complete samples, the others' trained without distillation.
    """
    folders = {
        (method, row): RECORDS / draw / method / slug(row)
        for method, rows in ABLATIONS.items()
        for row in (FULL[method], COMPLETE_TRAINING, ALONE)
        if row in rows
    }
    names = {key: key[1] if key[1] == FULL[key[0]] else f"{FULL[key[0]]} {key[1]}" for key in folders}
    records = _recorded({names[key]: folder for key, folder in folders.items()})
    runs = _runs(records)
    methods = [run for run in runs if run[0] in FULL.values()]
    if len(methods) < 2:
        return NOT_YET
    own = [(m, run) for m in methods for run in runs if run[0].startswith(f"{m[0]} ")]
    return _table(records, "f1_non0") + "\n" + _differences(own + list(combinations(methods, 2)), "f1_non0")


def losses_table() -> str:
    """What every row of the ablation tables lacks, by method: the full method against it, on both draws together, and
    what its paper has on real MOSI."""
    rows, tests, printed = [], [], _published_differences()
    for method, names in ABLATIONS.items():
        full, *others = names
        for name in others:
            by_draw = {draw: _differences_on(draw, method, full, name) for draw in DRAWS}
            if not any(by_draw.values()):
                continue
            together = [x for differences in by_draw.values() for x in differences]
            test = paired_test(together, [0.0] * len(together))
            means = [_signed(float(np.mean(x)) if x else None) for x in by_draw.values()]
            deviation = f"{np.std(together, ddof=1):.2f}" if len(together) > 1 else tables.NONE
            named = [f"{full} − {name}", _signed(printed.get((full, name)))]
            rows.append([*named, *means, _signed(test.mean_difference), deviation])
            tests.append(test)
    if not rows:
        return NOT_YET
    corrected = holm([test.t_p for test in tests])
    rows = [[*row, _p(test.t_p), _p(p), str(test.n)] for row, test, p in zip(rows, tests, corrected, strict=True)]
    header = ["difference on Avg.", "paper, MOSI", "a draw", "another", "both"]
    header += ["std of pairs", "t-test p", "Holm", "pairs"]
    return tables.markdown_table(header, rows)


def _published_differences() -> dict[tuple[str, str], float]:
    """(Method, row of its ablation table) -> how far the row is below the method on "Avg." in the method's paper."""
    rows = [row for row in published.shipped().rows if row.paper == row.method and row.metric == "f1_non0"]
    full = {(row.method, row.data): row.values["average"] for row in rows if row.variant is None}
    ablated = [(row, row.variant) for row in rows if row.variant is not None]
    return {(row.method, variant): full[row.method, row.data] - row.values["average"] for row, variant in ablated}


def _differences_on(draw: str, method: str, full: str, other: str) -> list[float]:
    """On "Avg.", of every seed that both have on a draw; none where either was not run."""
    records = _recorded({name: RECORDS / draw / method / slug(name) for name in (full, other)})
    if len(records) < 2:
        return []
    (_, a), (_, b) = _runs(records)
    return [x - y for _, x, y in report.pairs_on_average(a, b, "f1_non0") if x is not None and y is not None]


def table_of_methods(data: str) -> str:
    """F1 of every method that is recorded on the same data."""
    records = _records_on(data)
    return _table(records, "f1_non0") if records else NOT_YET


def differences_of_methods(data: str) -> str:
    """The best of many methods on a data set against each other one."""
    runs = runs_on(data)
    return _best_against_others(runs, "f1_non0") if len(runs) > report.MOST_PAIRED else NOT_YET


def errors_of_methods(data: str) -> str:
    """Mean absolute errors of the regressions among them."""
    records = _records_on(data)
    with_mae = [name for name, _ in tables.with_metric("mae", _runs(records))]
    return _table({name: records[name] for name in with_mae}, "mae") if with_mae else NOT_YET


def folds_table(data: str) -> str:
    """Every method's "Avg." on each fold, mean and standard deviation over its seeds; and the folds' means."""
    rows, means = [], []
    for name, content in runs_on(data):
        values = np.array(content.average.metrics["f1_non0"].per_seed, dtype=np.float64)
        names = sorted(set(content.folds))
        of_folds = [values[[fold == of for of in content.folds]] for fold in names]
        rows.append([name, *(f"{x.mean():.2f} ± {x.std(ddof=1):.2f}" for x in of_folds), f"{values.mean():.2f}"])
        means.append([*(x.mean() for x in of_folds), values.mean()])
    if not rows or not names:
        return NOT_YET
    rows.append(["mean", *(f"{x:.2f}" for x in np.mean(means, axis=0))])
    return tables.markdown_table(["F1 non0 (%), Avg.", *names, "all"], rows)


def runs_on(data: str) -> list[Run]:
    """The results of every method that is recorded on a data set, under its name."""
    return _runs(_records_on(data))


def _records_on(data: str) -> dict[str, Path]:
    return _recorded({name: RECORDS / data / method for method, name in FULL.items()})


def _best_against_others(runs: list[Run], key: str) -> str:
    """Paired over seeds (of every fold), p values corrected for the number of comparisons."""
    (members,) = report.comparable(runs)
    comparisons = [c for c in report.compare(members) if c.key == key]
    corrected = holm([c.test.t_p for c in comparisons])
    over_folds = holm([c.over_folds.t_p if c.over_folds else None for c in comparisons])
    header = ["difference on Avg., paired", "mean", "t-test p, Holm", "over folds, Holm", "pairs"]
    rows = [
        [f"{c.first} − {c.second}", _signed(c.test.mean_difference), _p(p), _p(q), str(c.test.n)]
        for c, p, q in zip(comparisons, corrected, over_folds, strict=True)
    ]
    if not members.reference.folds:
        header, rows = header[:3] + header[4:], [row[:3] + row[4:] for row in rows]
    return tables.markdown_table(header, rows)


def _recorded(wanted: dict[str, Path]) -> dict[str, Path]:
    """Those whose results have been taken over."""
    return {name: folder for name, folder in wanted.items() if _of_runs(folder)}


def _of_runs(record: Path) -> list[Path]:
    """The folders of a record that hold results: one, or one for each fold."""
    return [record] if (record / RESULTS_FILE).exists() else folds.folders(record)


def _runs(records: dict[str, Path]) -> list[Run]:
    return [(name, folds.read(folder)) for name, folder in records.items()]


def _differences(pairs: list[tuple[Run, Run]], key: str) -> str:
    """The first run of each pair against the second on "Avg.", paired over seeds."""
    tests = [report.paired_on_average(a, b, key) for (_, a), (_, b) in pairs]
    header = ["difference on Avg., paired over seeds", "mean", "t-test p", "Holm", "Wilcoxon p", "Holm", "seeds"]
    corrected = zip(holm([test.t_p for test in tests]), holm([test.wilcoxon_p for test in tests]), strict=True)
    rows = [
        [f"{a} − {b}", _signed(test.mean_difference), _p(test.t_p), _p(t), _p(test.wilcoxon_p), _p(w), str(test.n)]
        for ((a, _), (b, _)), test, (t, w) in zip(pairs, tests, corrected, strict=True)
    ]
    if all(test.wilcoxon_p is None for test in tests):  # it needs more seeds than the t-test
        header, rows = header[:4] + header[6:], [row[:4] + row[6:] for row in rows]
    return tables.markdown_table(header, rows)


def _signed(value: float | None) -> str:
    return tables.NONE if value is None else f"{value:+.2f}"


def _p(value: float | None) -> str:
    if value is None:
        return tables.NONE
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _table(records: dict[str, Path], key: str) -> str:
    """A caption that says what was run on what, and one metric of all records, which must be on the same data."""
    runs = _runs(records)
    if len(report.comparable(runs)) != 1:
        raise UserError(f"{', '.join(records)} were not evaluated on the same data; they cannot share a table")
    table = tables.metric_table(key, runs)
    made = {name: read_json(_of_runs(folder)[0] / RUN_FILE, "a run.json") for name, folder in records.items()}
    seeds = {name: report.which(content) for name, content in runs}
    machines = {
        name: f"{run['precision']} on {run['device']}, torch {run['versions']['torch']}" for name, run in made.items()
    }
    facts = [f"mean ± standard deviation over seeds {_stated(seeds)}", _stated(machines)]
    tasks = {name: content.task for name, content in runs}
    if len(set(tasks.values())) > 1:
        facts.append(f"trained for {_stated(tasks)}")
    learnt_nothing = [
        f"{name} {_at_floor(content)} of {len(content.seeds)}" for name, content in runs if _at_floor(content)
    ]
    if learnt_nothing:
        facts.append(f"no better than a constant on validation: {', '.join(learnt_nothing)}")
    return f"{table.title} on {runs[0][1].data}; {'; '.join(facts)}.\n\n{tables.markdown_metric(table)}"


def _at_floor(content: Results) -> int:
    """How many models have a phase that ended at the floor."""
    return sum(any(of_model) for of_model in zip(*content.at_floor.values(), strict=True))


def _stated(facts: dict[str, str]) -> str:
    """`"x"` where all have the same fact, else `"x (a, b) and y (c)"`."""
    named: dict[str, list[str]] = {}
    for name, fact in facts.items():
        named.setdefault(fact, []).append(name)
    if len(named) == 1:
        return next(iter(named))
    return " and ".join(f"{fact} ({', '.join(names)})" for fact, names in named.items())
