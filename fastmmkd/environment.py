"""What this installation has: versions, devices, and which implementation every operation would use."""

from __future__ import annotations

import os
import platform

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from fastmmkd.errors import UserError
from fastmmkd.ops import OPERATIONS, explain, extension
from fastmmkd.provenance import PACKAGES, commit, package_version, python_version

ENVIRONMENT_VARIABLES = (
    "FASTMMKD_PROVIDER",
    "FASTMMKD_ISA",
    "TRITON_INTERPRET",
    "DS_ACCELERATOR",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)


def print_environment() -> None:
    """Print the report of `fastmmkd env`."""
    console = Console()
    facts = titled_table("versions", "", "")
    facts.add_row("python", python_version())
    for name in PACKAGES:
        facts.add_row(name, package_version(name) or "not installed")
    facts.add_row("commit", commit() or "not a checkout")
    facts.add_row("compiled extension", extension.missing or "loaded")
    for name, value in extension.build_info().items():
        facts.add_row(f"  {name}", value)
    console.print(facts)
    console.print(_devices())
    console.print(_operations())
    deepspeed = titled_table("deepspeed", "", "")
    for name, value in _deepspeed_state():
        deepspeed.add_row(name, value)
    console.print(deepspeed)
    variables = titled_table("environment variables", "", "")
    for name in ENVIRONMENT_VARIABLES:
        variables.add_row(name, os.environ.get(name, "not set"))
    console.print(variables)


def _devices() -> Table:
    table = titled_table("devices", "device", "what")
    table.add_row(
        "cpu", f"{platform.machine()}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        table.add_row(
            f"cuda:{i}",
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{properties.total_memory / 2**30:.0f} GiB",
        )
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        table.add_row("cuda", f"none (torch is {built})")
    return table


def _operations() -> Table:
    table = titled_table("operations", "operation", "implementation", "why")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for op in OPERATIONS:
        try:
            choice = explain(op, device)
            table.add_row(op, choice.provider, choice.reason)
        except UserError as error:
            table.add_row(op, "[red]none[/]", str(error))
    return table


def _deepspeed_state() -> list[tuple[str, str]]:
    if package_version("deepspeed") is None:
        return [("state", "not installed: training needs it, predicting and evaluating do not")]
    cuda = torch.cuda.is_available()
    low = cuda and torch.cuda.get_device_capability() < (8, 0)
    return [
        ("accelerator", os.environ.get("DS_ACCELERATOR", "cuda" if cuda else "cpu")),
        ("communication", "nccl" if cuda else "gloo"),
        (
            "mixed precision",
            ("fp16" if low else "bf16, fp16") if cuda else "bf16 (no faster here); fp16 falls back to fp32",
        ),
    ]


def titled_table(title: str, *columns: str) -> Table:
    """An empty table; columns without names get no header."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, show_header=any(columns))
    for column in columns:
        table.add_column(column)
    return table
