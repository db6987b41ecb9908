"""Render the tables of the documents from the records under `bench/results`: `python -m bench.readme`.

python -m bench.readme                          rewrite the tables
python -m bench.readme --check                  exit 1 if they are not what the records say
python -m bench.readme --study runs/study       first take over the results of `make study`
python -m bench.readme --real runs/ict_mmmo     first take over the results of `make real`

Results are taken of the methods that are there; the records of others stay.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from itertools import combinations
from pathlib import Path

from bench import table
from fastmmkd.engine.ablation import ABLATIONS, slug
from fastmmkd.errors import UserError
from fastmmkd.evaluation import report, results, tables
from fastmmkd.evaluation.report import Run
from fastmmkd.files import make_directory, read_json, write_text

ROOT = Path(__file__).parents[1]
DOCUMENTS = {
    ROOT / "README.md": ("methods", "fresh", "ict_mmmo", "speed"),
    ROOT / "docs" / "speed.md": ("speed_all",),
    ROOT / "docs" / "ablations.md": tuple(f"study_{method}" for method in ABLATIONS),
}
"""File -> its generated parts, in `<!-- begin: NAME ... -->` marks."""
RECORDS = ROOT / "bench" / "results" / "quality"
FILES = ("results.json", "run.json")
HEADLINES = ("cross_attention", "pairwise_contrastive", "UMDF step")
"""Groups of benchmarks that the README shows."""
SPEED = ROOT / "bench" / "results" / "speed" / "cpu.json"

FULL = {method: next(iter(rows)) for method, rows in ABLATIONS.items()}
"""Method -> its name for people, which is the first row of its ablation table."""
FRESH = "fresh"
"""Folder of the comparisons that were repeated on another draw of the data."""
ALONE, COMPLETE = "without distillation", "complete training"
NOT_YET = "Not yet run.\n"


def main(argv: list[str] | None = None) -> int:
    """Rewrite or check the documents; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description="Render the documents' tables.")
    parser.add_argument("--check", action="store_true", help="only say whether the documents are up to date")
    parser.add_argument("--study", type=Path, metavar="DIR", help="folder of `make study` to take results from")
    parser.add_argument("--real", type=Path, metavar="DIR", help="folder of `make real` to take results from")
    args = parser.parse_args(argv)
    if args.study:
        for method, runs in methods_in(args.study, "").items():
            for name in ABLATIONS[method]:
                take(runs / slug(name), _study_record(method, name))
        for found in sorted((args.study / FRESH).glob(f"*/*/{results.FILE_NAME}")):
            run = found.parent
            take(run, RECORDS / FRESH / run.parent.name / run.name)
    if args.real:
        for method, run in methods_in(args.real, "_ict_mmmo").items():
            take(run, _real_record(method))
    bodies = parts()
    stale = False
    for path, names in DOCUMENTS.items():
        old = path.read_text(encoding="utf-8")
        new = render(old, {name: bodies[name] for name in names}, path.name)
        stale |= new != old
        if args.check:
            print(f"{path.name} is up to date" if new == old else f"{path.name} is stale: run `make readme`")
        else:
            write_text(path, new)
    return int(args.check and stale)


def methods_in(folder: Path, suffix: str) -> dict[str, Path]:
    """Method -> its folder `<method><suffix>`, of the methods that are there.

    Raises:
        UserError: none is.
    """
    wanted = {method: folder / f"{method}{suffix}" for method in ABLATIONS}
    found = {method: path for method, path in wanted.items() if path.is_dir()}
    if not found:
        raise UserError(f"{folder}: expected one of the folders {', '.join(path.name for path in wanted.values())}")
    return found


def take(run: Path, record: Path) -> None:
    """Copy a run's results into the records, after reading them once."""
    results.read(run)
    make_directory(record)
    for name in FILES:
        shutil.copyfile(run / name, record / name)


def parts() -> dict[str, str]:
    """Every generated part, by name: what the records say."""
    studies = {f"study_{method}": study_table(method) for method in ABLATIONS}
    quality = {"methods": methods_table("study"), "fresh": methods_table(FRESH), "ict_mmmo": real_table()}
    return studies | quality | {"speed": speed_table(HEADLINES), "speed_all": speed_table(None)}


def render(text: str, bodies: dict[str, str], document: str) -> str:
    """A document with its generated parts replaced.

    Raises:
        ValueError: a part is not there exactly once.
    """
    for name, body in bodies.items():
        pattern = re.compile(rf"(<!-- begin: {name} [^\n]*-->\n).*?(<!-- end: {name} -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, body=body: match.group(1) + body + match.group(2), text)
        if found != 1:
            raise ValueError(f"{document} has {found} parts named {name}; expected one")
    return text


def study_table(method: str) -> str:
    """A method, its ablations and its baselines on synthetic MOSI, and the method against each of them."""
    records = _recorded({name: _study_record(method, name) for name in ABLATIONS[method]})
    if not records:
        return NOT_YET
    runs = _runs(records)
    return _table(records, "f1_non0") + "\n" + _differences([(runs[0], other) for other in runs[1:]], "f1_non0")


def methods_table(study: str) -> str:
    """The methods and their baselines on the same synthetic MOSI; each compared with its own, and with the others.

    Baselines: UMDF's network trained on complete samples, the others' trained without distillation.
    """
    folders = {
        (method, row): RECORDS / study / method / slug(row)
        for method, rows in ABLATIONS.items()
        for row in (FULL[method], COMPLETE, ALONE)
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


def real_table() -> str:
    """The methods on the re-split ICT-MMMO."""
    records = _recorded({name: _real_record(method) for method, name in FULL.items()})
    if not records:
        return NOT_YET
    with_mae = [name for name, _ in tables.with_metric("mae", _runs(records))]
    parts = [_table(records, "f1_non0")]
    if with_mae:
        parts.append(_table({name: records[name] for name in with_mae}, "mae"))
    return "\n".join(parts)


def speed_table(groups: tuple[str, ...] | None) -> str:
    """How many times as long as ours the baselines take, on a CPU, in groups of these names; None: all, with times."""
    if not SPEED.exists():
        return NOT_YET
    record = read_json(SPEED, "a record of bench.table")
    chosen = [member for member in record["benchmarks"] if groups is None or member["group"].startswith(groups)]
    body = table.ratios(record | {"benchmarks": chosen}) if groups else table.render(record)
    facts = f"{record['cpu']}, {record['threads']} threads, {record['instruction set']}, torch {record['torch']}"
    return f"Medians of at least 30 runs in one process on {facts}, {record['date']}.\n\n{body}"


def _study_record(method: str, row: str) -> Path:
    return RECORDS / "study" / method / slug(row)


def _real_record(method: str) -> Path:
    return RECORDS / "ict_mmmo" / method


def _recorded(wanted: dict[str, Path]) -> dict[str, Path]:
    """Those whose results have been taken over."""
    return {name: folder for name, folder in wanted.items() if (folder / results.FILE_NAME).exists()}


def _runs(records: dict[str, Path]) -> list[Run]:
    return [(name, results.read(folder)) for name, folder in records.items()]


def _differences(pairs: list[tuple[Run, Run]], key: str) -> str:
    """The first run of each pair against the second on "Avg.", paired over seeds."""
    tests = [report.paired_on_average(a, b, key) for (_, a), (_, b) in pairs]
    header = ["difference on Avg., paired over seeds", "mean", "t-test p", "Wilcoxon p", "seeds"]
    rows = [
        [f"{a} − {b}", _signed(test.mean_difference), _p(test.t_p), _p(test.wilcoxon_p), str(test.n)]
        for ((a, _), (b, _)), test in zip(pairs, tests, strict=True)
    ]
    if all(test.wilcoxon_p is None for test in tests):  # it needs more seeds than the t-test
        header, rows = header[:3] + header[4:], [row[:3] + row[4:] for row in rows]
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
    if len(report.group(runs)) != 1:
        raise ValueError(f"{', '.join(records)} were not evaluated on the same data; they cannot share a table")
    table = tables.metric_table(key, runs)
    made = {name: read_json(folder / "run.json", "a run.json") for name, folder in records.items()}
    seeds = {name: ", ".join(map(str, found["seeds"])) for name, found in runs}
    machines = {
        name: f"{run['precision']} on {run['device']}, torch {run['versions']['torch']}" for name, run in made.items()
    }
    facts = [f"mean ± standard deviation over seeds {_stated(seeds)}", _stated(machines)]
    tasks = {name: found["task"] for name, found in runs}
    if len(set(tasks.values())) > 1:
        facts.append(f"trained for {_stated(tasks)}")
    return f"{table.title} on {runs[0][1]['data']}; {'; '.join(facts)}.\n\n{tables.markdown_metric(table)}"


def _stated(facts: dict[str, str]) -> str:
    """`"x"` where all have the same fact, else `"x (a, b) and y (c)"`."""
    named: dict[str, list[str]] = {}
    for name, fact in facts.items():
        named.setdefault(fact, []).append(name)
    if len(named) == 1:
        return next(iter(named))
    return " and ".join(f"{fact} ({', '.join(names)})" for fact, names in named.items())


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
