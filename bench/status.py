"""The table of kernels in docs/gpu.md: what holds up each operation on each provider and architecture.

"parity" was measured on such a device; "interpreted" and "emulated" kernels are held to the same parity wall
without one (Triton's interpreter; csrc/cuda's threads as fibers of a CPU program), and compile for it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.cross_compile_cuda import kernels
from bench.gpu_check import RESULTS
from fastmmkd.evaluation import tables
from fastmmkd.ops import OPERATIONS
from fastmmkd.ops.operation import Op

ROOT = Path(__file__).parents[1]
BUDGETS = ROOT / "bench" / "budgets.json"
ARCHITECTURES = ("sm_70", "sm_80", "sm_90")


def status_table(budgets: Path = BUDGETS, results: Path = RESULTS) -> str:
    """Markdown: a row per operation that has kernels."""
    compiled: dict[str, dict[str, Any]] = json.loads(budgets.read_text(encoding="utf-8"))
    passed = measured(results)

    def cell(op: Op, provider: str, architecture: str) -> str:
        if provider not in op.kernels:
            return tables.NONE
        if (provider, architecture) in passed:
            return "parity"
        if (provider, architecture, op.name) in passed:
            return "parity at configs' sizes"
        names = budgeted(op, provider, compiled)
        if not names or any(architecture not in compiled.get(name, {}) for name in names):
            return tables.NONE
        return "interpreted, compiles" if provider == "triton" else "emulated, compiles"

    columns = [(provider, architecture) for provider in ("triton", "cuda") for architecture in ARCHITECTURES]
    rows = [
        [op.name, "parity" if "cpp" in op.kernels else tables.NONE, *(cell(op, *column) for column in columns)]
        for op in OPERATIONS.values()
        if op.kernels
    ]
    header = ["operation", "C++, CPU", *(f"{provider}, {arch}" for provider, arch in columns)]
    return tables.markdown_table(header, rows)


def budgeted(op: Op, provider: str, compiled: dict[str, Any]) -> list[str]:
    """The names that an operation's kernels have in the table of budgets."""
    if provider == "triton":
        return [name for name in compiled if name.startswith(op.name)]
    return [kernel.name.split("<")[0] for kernel in kernels() if kernel.header.startswith(op.name)]


def measured(results: Path = RESULTS) -> set[tuple[str, ...]]:
    """What passed on a device, by the records of `make gpu-check`: (provider, architecture) where the whole parity wall
    did, (provider, architecture, operation) where an operation did at the configs' sizes."""
    passed: set[tuple[str, ...]] = set()
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        if "sections" not in record:
            continue
        architecture = "sm_" + record["device"]["compute capability"].replace(".", "")
        for section in record["sections"]:
            name, _, provider = section["section"].partition(" ")
            if name == "parity" and section["status"] == "passed":
                passed.add((provider, architecture))
            for process, outcome in (section["found"] or {}).items() if name == "smoke" else ():
                if outcome["verdict"].startswith("right"):
                    provider, op = process.split()
                    passed.add((provider, architecture, op))
    return passed
