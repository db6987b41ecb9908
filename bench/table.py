"""Print what `pytest bench --benchmark-json FILE` measured: `python -m bench.table FILE [FILE ...]`.

One table per group: median, spread, and how many times faster than each baseline. Benchmarks name their group and, in
`extra_info["baselines"]`, the variants they are held against.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmmkd.errors import UserError
from fastmmkd.evaluation import tables
from fastmmkd.files import read_json


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.table", description="Print benchmark results as tables.")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="JSON that pytest-benchmark wrote")
    args = parser.parse_args(argv)
    for file in args.files:
        record = read_json(file, "a pytest-benchmark JSON file")
        if not isinstance(record, dict) or "benchmarks" not in record:
            raise UserError(f"{file}: not a pytest-benchmark JSON file; expected the key benchmarks")
        print(render(record))
    return 0


def render(record: dict[str, Any]) -> str:
    """Markdown tables of one record, a group each."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for benchmark in record["benchmarks"]:
        groups.setdefault(benchmark["group"] or "other", []).append(benchmark)
    return "\n".join(f"**{name}**\n\n{_table(members)}" for name, members in groups.items())


def _table(members: list[dict[str, Any]]) -> str:
    medians = {member["name"]: member["stats"]["median"] for member in members}
    baselines = list(dict.fromkeys(b for m in members for b in m["extra_info"].get("baselines", []) if b in medians))
    header = ["variant", "median ms", "p25 to p75", "rounds", *(f"times faster than {name}" for name in baselines)]
    rows = []
    for member in members:
        stats, name = member["stats"], member["name"]
        spread = f"{_ms(stats['q1'])} to {_ms(stats['q3'])}"
        ratios = [f"{medians[baseline] / medians[name]:.2f}" for baseline in baselines]
        rows.append([name, _ms(stats["median"]), spread, str(stats["rounds"]), *ratios])
    return tables.markdown_table(header, rows)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
