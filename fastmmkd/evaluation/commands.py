"""`fastmmkd report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

    from fastmmkd.evaluation.report import Comparable


def register(subparsers: argparse._SubParsersAction) -> None:
    """Add `report` to the command line; its handler is `args.run(args) -> exit code`."""
    parser = subparsers.add_parser(
        "report",
        help="compare finished runs in the papers' table layout",
        description="Compare finished runs: tables (Markdown, CSV, LaTeX), curves on shared axes, and paired "
        "significance tests on Avg. Runs on different data or labels get separate tables.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder (or its results.json)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write the report to")
    parser.set_defaults(run=run_report)


def run_report(args: argparse.Namespace) -> int:
    """Write the report, print its headline tables and where everything lies.

    Raises:
        UserError: as `report.report`.
    """
    from fastmmkd.evaluation.report import report

    groups, files = report(args.runs, args.out)
    for members in groups:
        print_headline(members)
    print("\n".join(str(f) for f in files))
    return 0


def print_headline(members: Comparable, console: Console | None = None) -> None:
    """Print the headline metric of comparable runs as a table."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from fastmmkd.evaluation import tables

    console = console or Console()
    # Eight columns of "81.20±0.41" and a name; a narrower terminal gets the means alone.
    spread = console.width >= 120
    plus_minus = "+-" if console.options.ascii_only else "±"
    headline = tables.metric_table(members.primary, members.runs)
    table = Table(title=Text(f"{headline.title} on {members.title}"), box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("run", overflow="fold")
    for header in tables.HEADERS:
        table.add_column(header, justify="right", no_wrap=True)
    for row in headline.runs + headline.references:
        texts = [
            Text(
                tables.format_cell(headline.key, c.mean, c.std if spread else None, plus_minus),
                style="bold" if c.best else "",
            )
            for c in row.cells
        ]
        table.add_row(Text(row.name), *texts, style="" if row in headline.runs else "dim")
    console.print(table)
    if note := tables.average_note(members.reference):
        console.print(f"  {note}.", markup=False, highlight=False, soft_wrap=True)
