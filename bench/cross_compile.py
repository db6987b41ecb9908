"""What every GPU kernel occupies on every architecture, without a GPU: `python -m bench.cross_compile`.

`--write-budgets` keeps the largest values of each kernel and architecture in `bench/budgets.json`; a test holds the
kernels to them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from bench import entry
from bench.cross_compile_cuda import compile_cuda, missing
from bench.cross_compile_triton import compile_triton
from bench.resources import Resources
from fastmmkd.evaluation import tables
from fastmmkd.files import read_json, write_json
from fastmmkd.ops import OPERATIONS
from fastmmkd.testing.specimens import DTYPES, specimens

BUDGETS = Path(__file__).with_name("budgets.json")
LIMITED = ("registers", "spill_bytes", "shared_bytes")
ARCHS = (70, 80, 90)
PROVIDERS = ("triton", "cuda")

Budgets = dict[str, dict[str, dict[str, int]]]
"""Kernel -> architecture -> the most that it may take of what `LIMITED` names."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.cross_compile", description="Compile kernels without a GPU.")
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHS, default=ARCHS, help="architectures")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="dtypes of the inputs (Triton)"
    )
    parser.add_argument("--op", nargs="+", choices=OPERATIONS, default=OPERATIONS, help="operations (Triton)")
    parser.add_argument("--provider", nargs="+", choices=PROVIDERS, default=PROVIDERS, help="whose kernels")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--write-budgets", action="store_true", help=f"raise or lower what {BUDGETS.name} allows")
    args = parser.parse_args(argv)
    compiled: list[Resources] = []
    if "triton" in args.provider:
        chosen = [specimen for specimen in specimens() if specimen.op in args.op]
        compiled += compile_triton(chosen, args.arch, args.dtype, args.workers)
    if "cuda" in args.provider:
        compiled += _cuda(args.arch)
    print(render(compiled))
    if args.write_budgets:
        write_json(BUDGETS, merged(read_budgets(), budgets(compiled)))
    return 0


def _cuda(archs: Iterable[int]) -> list[Resources]:
    if missing():
        print(f"CUDA kernels left out: {missing()}", file=sys.stderr)
        return []
    return [resources for arch in archs for resources in compile_cuda(arch)]


def render(resources: Iterable[Resources]) -> str:
    """A Markdown table, a row per kernel, architecture, dtype and shape."""
    header = ["kernel", "provider", "arch", "dtype", "shape", "registers", "spills", "shared", "threads", "occupancy"]
    rows = [
        [
            *(r.kernel, r.provider, f"sm_{r.arch}", r.dtype, r.shape),
            *map(str, (r.registers, r.spill_bytes, r.shared_bytes, r.threads)),
            f"{r.occupancy():.0%}",
        ]
        for r in resources
    ]
    return tables.markdown_table(header, rows)


def budgets(compiled: Iterable[Resources]) -> Budgets:
    """The largest values of each kernel and architecture."""
    most: Budgets = {}
    for resources in compiled:
        of_arch = most.setdefault(resources.kernel, {}).setdefault(f"sm_{resources.arch}", dict.fromkeys(LIMITED, 0))
        for name in LIMITED:
            of_arch[name] = max(of_arch[name], asdict(resources)[name])
    return most


def merged(old: Budgets, new: Budgets) -> Budgets:
    """`old` with the entries of `new` in place of its own, in a fixed order."""
    names = sorted({*old, *new})
    return {name: dict(sorted((old.get(name, {}) | new.get(name, {})).items())) for name in names}


def excesses(resources: Iterable[Resources], allowed: Budgets) -> list[str]:
    """In words, each value above its budget; a kernel without one has a budget of nothing."""
    return [
        f"{r.kernel}, sm_{r.arch}, {r.dtype}, {r.shape}: {value} {name}, allowed {limit}"
        for r in resources
        for name in LIMITED
        for value, limit in [(asdict(r)[name], allowed.get(r.kernel, {}).get(f"sm_{r.arch}", {}).get(name, 0))]
        if value > limit
    ]


def read_budgets() -> Budgets:
    """What `bench/budgets.json` allows; nothing where there is none."""
    return read_json(BUDGETS, "a table of budgets") if BUDGETS.exists() else {}


if __name__ == "__main__":
    entry.run(main)
