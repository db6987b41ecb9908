"""`fastmmkd report`."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from fastmmkd.evaluation.report import AgainstPapers, Comparable
    from fastmmkd.evaluation.schema import Results


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add `report` to the command line; its handler is `args.run(args) -> exit code`."""
    parser = subparsers.add_parser(
        "report",
        help="compare finished runs in the papers' table layout",
        description="Compare finished runs: tables (Markdown, CSV, LaTeX), curves on shared axes, and paired "
        "significance tests on Avg. Runs on different data or labels get separate tables.",
    )
    parser.add_argument(
        "runs", nargs="*", type=Path, metavar="RUN", help="run folder (or its results.json), or folder of runs on folds"
    )
    parser.add_argument(
        "--external",
        action="append",
        default=[],
        metavar="[NAME=]CSV",
        help="predictions of another program on the same samples, see docs/protocol.md (may be repeated); with --data",
    )
    parser.add_argument("--data", type=Path, metavar="FILE.h5", help="the data that --external predicts")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write the report to")
    add_paper_arguments(parser)
    parser.set_defaults(run=run_report)


def add_paper_arguments(parser: argparse.ArgumentParser, of_configs: bool = False) -> None:
    """The arguments that `papers_asked_for` reads; `of_configs`: `--paper` may name the data set of the configs."""
    shown = "show the papers' numbers on the same data (real MOSI, MOSEI, IEMOCAP), and whether they are reproduced"
    if of_configs:
        parser.add_argument(
            "--paper",
            nargs="?",
            const="",
            metavar="NAME",
            help=f"{shown}; NAME, in place of --config: every method's configs/<method>_NAME.json, such as mosi",
        )
    else:
        parser.add_argument("--paper", action="store_true", help=shown)
    parser.add_argument(
        "--paper-data", metavar="NAME", help="show those on mosi, mosei or iemocap whatever the runs were evaluated on"
    )


def papers_asked_for(args: argparse.Namespace) -> AgainstPapers | None:
    """What a command's arguments say about published rows.

    Raises:
        UserError: there are none on the data set that is named.
    """
    if args.paper in (None, False) and not args.paper_data:
        return None

    from fastmmkd.evaluation.published import refuse_unknown
    from fastmmkd.evaluation.report import AgainstPapers

    if args.paper_data:
        refuse_unknown(args.paper_data)
    return AgainstPapers(args.paper_data)


def run_report(args: argparse.Namespace) -> int:
    """Write the report, print its headline tables and where everything lies.

    Raises:
        UserError: as `report.report`.
    """
    from fastmmkd.errors import UserError
    from fastmmkd.evaluation.report import report

    if bool(args.external) != bool(args.data):
        raise UserError("--external and --data: expected both, predictions and the data that they are of")
    if not args.runs and not args.external:
        raise UserError("report: expected a RUN, or --external")
    groups, files = report(args.runs, args.out, papers=papers_asked_for(args), others=_others(args))
    for members in groups:
        print_headline(members)
    print("\n".join(str(f) for f in files))
    return 0


def _others(args: argparse.Namespace) -> list[tuple[str, Results]]:
    """What `--external` names, evaluated."""
    if not args.external:
        return []

    from fastmmkd.data.training_file import read_data
    from fastmmkd.evaluation import external

    dataset, others = read_data(args.data), []
    for told in args.external:
        name, equals, file = told.partition("=")
        path = Path(file) if equals and not Path(told).exists() else Path(told)
        name = name if path != Path(told) else path.stem
        others.append((name, external.read(path, dataset, name)))
    return others


def print_headline(members: Comparable, console: Console | None = None) -> None:
    """Print the headline metric of comparable runs as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fastmmkd.evaluation import tables
    from fastmmkd.evaluation.published import BELOW_FLOOR

    console = console or Console()

    def said(text: str) -> str:
        return text.replace(BELOW_FLOOR, "*") if console.options.ascii_only else text

    # Eight columns of "81.20±0.41" and a name; a narrower terminal gets the means alone.
    spread = console.width >= 120
    plus_minus = "+-" if console.options.ascii_only else "±"
    headline = members.table(members.primary)
    table = Table(title=Text(f"{headline.title} on {members.title}"), box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold")
    for header in tables.HEADERS:
        table.add_column(header, justify="right", no_wrap=True)
    for row in headline.runs + headline.published + headline.references:
        cells = row.cells if spread else [replace(cell, std=None) for cell in row.cells]
        texts = [
            Text(said(tables.cell_text(headline.key, cell, plus_minus)), style="bold" if cell.best else "")
            for cell in cells
        ]
        table.add_row(Text(row.name), *texts, style="" if row in headline.runs else "dim")
    console.print(table)
    if note := members.papers_note([headline.key]):
        console.print(f"  {said(note.replace('*', ''))}", markup=False, highlight=False, soft_wrap=True)
    if note := tables.average_note(members.reference):
        console.print(f"  {note}.", markup=False, highlight=False, soft_wrap=True)
