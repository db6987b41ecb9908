"""The README's table of kernels: what holds up each operation on each provider and architecture.

"parity" was measured on such a device; "interpreted" and "emulated" kernels are held to the same parity wall in `make
test` without one (Triton's interpreter; csrc/cuda's threads as fibers of a CPU program), and compile for it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from bench.gpu_check import RESULTS
from fastmmkd.evaluation import tables
from fastmmkd.ops import OPERATIONS
from fastmmkd.ops.extension import CUDA_OPERATIONS

ROOT = Path(__file__).parents[1]
BUDGETS = ROOT / "bench" / "budgets.json"
ARCHITECTURES = ("sm_70", "sm_80", "sm_90")
CUDA_KERNEL = "attend_rows"
"""One of the kernels of csrc/cuda, which are compiled together."""


def status_table(budgets: Path = BUDGETS, results: Path = RESULTS) -> str:
    """Markdown: a row per operation."""
    compiled: dict[str, dict[str, Any]] = json.loads(budgets.read_text(encoding="utf-8"))
    passed = measured(results)

    def cell(op: str, provider: str, architecture: str) -> str:
        if (provider, architecture) in passed and (provider == "triton" or op in CUDA_OPERATIONS):
            return "parity"
        if provider == "triton":
            kernels = [name for name in compiled if name.startswith(op)]
            held = kernels and all(architecture in compiled[name] for name in kernels)
            return "interpreted, compiles" if held else tables.NONE
        held = op in CUDA_OPERATIONS and architecture in compiled.get(CUDA_KERNEL, {})
        return "emulated, compiles" if held else tables.NONE

    columns = [(provider, architecture) for provider in ("triton", "cuda") for architecture in ARCHITECTURES]
    rows = [[op, "parity", *(cell(op, *column) for column in columns)] for op in OPERATIONS]
    header = ["operation", "C++, CPU", *(f"{provider}, {arch}" for provider, arch in columns)]
    return tables.markdown_table(header, rows)


def measured(results: Path = RESULTS) -> set[tuple[str, str]]:
    """(provider, architecture) whose whole parity wall passed on a device, by the records of `make gpu-check`."""
    found = set()
    for path in sorted(results.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        architecture = "sm_" + record["device"]["compute capability"].replace(".", "")
        for section in record["sections"]:
            name, _, provider = section["section"].partition(" ")
            if name == "parity" and section["status"] == "passed":
                found.add((provider, architecture))
    return found
