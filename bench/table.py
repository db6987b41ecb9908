"""Tables of what `pytest bench --benchmark-json FILE` measured: `python -m bench.table FILE [--record]`.

Benchmarks name their group, themselves, and in `extra_info["baselines"]` the variants that they are held against.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import entry, records
from fastmmkd.errors import UserError
from fastmmkd.evaluation import tables
from fastmmkd.files import read_json

KIND = "kernels"
OURS = "ours"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.table", description="Print benchmark results as tables.")
    parser.add_argument("file", type=Path, metavar="FILE", help="JSON that pytest-benchmark wrote, or a record")
    parser.add_argument("--record", action="store_true", help="append a record under bench/results/speed")
    args = parser.parse_args(argv)
    content = read_json(args.file, "a pytest-benchmark JSON file")
    if not isinstance(content, dict) or "benchmarks" not in content:
        raise UserError(f"{args.file}: not a pytest-benchmark JSON file; expected the key benchmarks")
    body = content if content.get("kind") == KIND else summary(content)
    print(render(body))
    if args.record:
        print(records.append(KIND, body, torch.device("cpu"), day=content["datetime"][:10]))
    return 0


def summary(content: dict[str, Any]) -> dict[str, Any]:
    """What a pytest-benchmark file says about times."""
    return {
        "benchmarks": [
            {
                "group": member["group"],
                "name": member["name"],
                "baselines": member["extra_info"].get("baselines", []),
                **{key: member["stats"][key] for key in ("median", "q1", "q3", "rounds")},
            }
            for member in content["benchmarks"]
        ],
    }


def render(record: dict[str, Any]) -> str:
    """A Markdown table of one record: a row per group and variant."""
    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for member in record["benchmarks"]:
        groups.setdefault(member["group"], {})[member["name"]] = member
    rows = []
    for group, members in groups.items():
        ours = members.get(OURS)
        for name, member in members.items():
            spread = f"{_ms(member['q1'])} to {_ms(member['q3'])}"
            ratio = f"{member['median'] / ours['median']:.2f}" if ours and name != OURS else tables.NONE
            rows.append([group, name, _ms(member["median"]), spread, str(member["rounds"]), ratio])
    return tables.markdown_table(["what", "variant", "median ms", "p25 to p75", "runs", "times as long as ours"], rows)


def ratios(record: dict[str, Any]) -> str:
    """A Markdown table for people in a hurry: how many times as long as ours each baseline takes."""
    medians: dict[str, dict[str, float]] = {}
    for member in record["benchmarks"]:
        medians.setdefault(member["group"], {})[member["name"]] = member["median"]
    named = dict.fromkeys(b for member in record["benchmarks"] for b in member["baselines"])
    baselines = [b for b in named if any(b in of_group for of_group in medians.values())]
    rows = [
        [group, *(f"{of_group[b] / of_group[OURS]:.1f}" if b in of_group else tables.NONE for b in baselines)]
        for group, of_group in medians.items()
        if OURS in of_group
    ]
    return tables.markdown_table(["times as long as ours", *baselines], rows)


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"


if __name__ == "__main__":
    entry.run(main)
