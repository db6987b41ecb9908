"""Render the README's tables from the records under `bench/results`: `python -m bench.readme`.

python -m bench.readme                          rewrite the tables
python -m bench.readme --check                  exit 1 if they are not what the records say
python -m bench.readme --study runs/study       first take over the results of `make study`
python -m bench.readme --real runs/ict_mmmo     first take over the results of `make real`
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path
from typing import Any

from fastmmkd.engine.ablation import ABLATIONS, slug
from fastmmkd.evaluation import results, tables
from fastmmkd.evaluation.significance import paired_test
from fastmmkd.files import make_directory, read_json, write_text

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
RECORDS = ROOT / "bench" / "results" / "quality"
FILES = ("results.json", "run.json")


def main(argv: list[str] | None = None) -> int:
    """Rewrite or check the README; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description="Render the README's tables.")
    parser.add_argument("--check", action="store_true", help="only say whether the README is up to date")
    parser.add_argument("--study", type=Path, metavar="DIR", help="folder of `make study` to take results from")
    parser.add_argument("--real", type=Path, metavar="DIR", help="folder of `make real` to take results from")
    args = parser.parse_args(argv)
    if args.study:
        for name in ABLATIONS["umdf"]:
            take(args.study / slug(name), RECORDS / "study" / slug(name))
    if args.real:
        take(args.real, RECORDS / "ict_mmmo")
    old = README.read_text(encoding="utf-8")
    new = render(old)
    if args.check:
        print("README.md is up to date" if new == old else "README.md is stale: run `make readme`")
        return int(new != old)
    write_text(README, new)
    return 0


def take(run: Path, record: Path) -> None:
    """Copy a run's results into the records, after reading them once."""
    results.read(run)
    make_directory(record)
    for name in FILES:
        shutil.copyfile(run / name, record / name)


def render(text: str) -> str:
    """The README with every generated part replaced by what the records say."""
    parts = {"study": study_table(), "ict_mmmo": real_table()}
    for name, body in parts.items():
        pattern = re.compile(rf"(<!-- begin: {name} [^\n]*-->\n).*?(<!-- end: {name} -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, body=body: match.group(1) + body + match.group(2), text)
        if found != 1:
            raise ValueError(f"README.md has {found} parts named {name}; expected one")
    return text


def study_table() -> str:
    """UMDF, its ablations and the complete-training baselines on synthetic MOSI."""
    runs = [(name, RECORDS / "study" / slug(name)) for name in ABLATIONS["umdf"]]
    found = [(name, results.read(folder)) for name, folder in runs if (folder / "results.json").exists()]
    if not found:
        return "Not yet run.\n"
    return _table(found, "f1_non0", RECORDS / "study" / slug(found[0][0])) + "\n" + _differences(found, "f1_non0")


def _differences(runs: list[tuple[str, dict[str, Any]]], key: str) -> str:
    """The first run against each other one on "Avg.", paired over seeds."""
    (name, first), *others = runs
    mine = first["average"]["metrics"][key]["per_seed"]
    rows = []
    for other, found in others:
        test = paired_test(mine, found["average"]["metrics"][key]["per_seed"])
        p = "–" if test.t_p is None else f"{test.t_p:.3f}"
        rows.append([f"{name} − {other}", f"{test.mean_difference:+.2f}", p, str(test.n)])
    return tables.markdown_table(["difference on Avg., paired over seeds", "mean", "t-test p", "seeds"], rows)


def real_table() -> str:
    """UMDF on the re-split ICT-MMMO."""
    folder = RECORDS / "ict_mmmo"
    if not (folder / "results.json").exists():
        return "Not yet run.\n"
    found = [("UMDF", results.read(folder))]
    return _table(found, "f1_non0", folder) + "\n" + _table(found, "mae", folder)


def _table(runs: list[tuple[str, dict[str, Any]]], key: str, folder: Path) -> str:
    table = tables.metric_table(key, runs)
    run, first = read_json(folder / "run.json", "a run.json"), runs[0][1]
    seeds = ", ".join(map(str, first["seeds"]))
    facts = (
        f"{table.title} on {first['data']}; mean ± standard deviation over seeds {seeds}; "
        f"{run['precision']} on {run['device']}, torch {run['versions']['torch']}."
    )
    return f"{facts}\n\n{tables.markdown_metric(table)}"


if __name__ == "__main__":
    sys.exit(main())
