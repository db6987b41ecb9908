"""The parts of `bench.gpu_check`, in their order and with the time each may take; the same ones are rehearsed on a CPU.

Call A is what must be known: does it run, is it right, how fast is a step. Call B is training as users do it, and what
explains A. Call C trains a paper's config to its end.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

from bench import records
from bench.variants import AUTOTUNED, COMPILED, COMPILED_GRAPHED, OURS, OURS_COMPILED
from fastmmkd.ops import OPERATIONS

FOUND = "{found}"
"""Stands in a command for the file that a section writes what it found to."""
SECONDS = {"A": 420, "B": 300, "C": 180}
"""How long a call may take."""
BUILD_SECONDS = 240
"""Of compiling the extension, where it was not brought along; it is not part of A's time."""
REHEARSAL_FACTOR = 4
"""As much longer may everything take on a CPU."""
CONFIGS = Path(__file__).parents[1] / "configs"
SPEED = records.FOLDER
REHEARSED_SPEED = Path(__file__).parents[1] / "build" / "gpu_check" / "speed"
"""What a rehearsal times stays away from the records."""
LENGTHS = "mosei"
"""Of the samples of whole steps."""
COMPILATIONS = (OURS_COMPILED, COMPILED_GRAPHED, COMPILED, AUTOTUNED)
"""The last one only if time is left: it takes minutes."""
PYTEST = ("-m", "pytest", "-p", "no:cacheprovider", "--tb=short", "-p", "bench.pytest_record", "--found", FOUND)
SANITIZED = "views_of_other_tensors or rows_without_keys"
"""Tests that compute-sanitizer, which slows everything down many times, can take."""


@dataclass(frozen=True)
class Section:
    """One part of the check, a process of its own."""

    name: str
    command: tuple[str, ...]
    """Arguments of the Python interpreter, or of `compute-sanitizer` where that is the first word."""
    seconds: float
    """It is asked to stop after this long."""
    environment: dict[str, str] = field(default_factory=dict)
    speed_record: str = ""
    """The kind of the record that it appends under `SPEED`, taken into the record of the check."""
    essential: bool = False
    """Where it fails nothing after it is run."""
    least: float = 5
    """It is left out where less time is left."""


def sections(call: str, rehearsed: bool) -> list[Section]:
    """The parts of a call."""
    made = {"A": what_must_be_known, "B": training_and_reasons, "C": a_whole_training}[call]
    return [_rehearsal(section) if rehearsed else section for section in made(workers(rehearsed))]


@cache
def on_mosei() -> list[str]:
    """The configs for MOSEI of the methods that the kernels are made for, those that have a literal config besides, by
    name; the one with the most layers, whose step takes longest, first."""
    layers = {}
    for literal in sorted(CONFIGS.glob("*_mosei_literal.json")):
        path = literal.with_name(literal.name.replace("_literal", ""))
        model = json.loads(path.read_text())["model"]
        layers[path.stem] = sum(value for key, value in model.items() if key.endswith("_layers") and value in range(99))
    return sorted(layers, key=lambda name: -layers[name])


def workers(rehearsed: bool) -> int:
    """Processes of the parity wall: compiling its kernels takes most of its time."""
    return 2 if rehearsed else max(1, min(14, (os.cpu_count() or 1) - 2))


def what_must_be_known(count: int) -> list[Section]:
    spread = ("-n", str(count), "--dist", "worksteal")
    return [
        Section("preflight", ("-m", "bench.gpu_preflight", FOUND), 40, essential=True),
        Section("smoke", ("-m", "bench.gpu_smoke", FOUND, "--seconds", "55"), 60, least=15),
        *(step(config, ("--no-engine", "--seconds", "25"), 45) for config in on_mosei()),
        Section("parity triton", (*PYTEST, "tests/parity", *spread), 105, {"FASTMMKD_PARITY": "triton"}),
        Section("parity cuda", (*PYTEST, "tests/parity", *spread), 30, {"FASTMMKD_PARITY": "cuda"}),
        Section("graphs", (*PYTEST, "tests/engine", "-m", "gpu", *spread), 45),
    ]


def training_and_reasons(count: int) -> list[Section]:
    sanitizer = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # it sees little of memory that torch keeps
    sanitized = ("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", "-m", "pytest", "tests/parity")
    memcheck = (*sanitized, "-p", "no:cacheprovider", "-x", "-k", SANITIZED)
    kernels = ("-m", "bench.gpu_kernels", "--main", "--dtype", "bf16", "--no-compile", "--out", FOUND)
    return [
        Section("training", ("-m", "bench.gpu_training", FOUND), 90, least=30),
        step(on_mosei()[0], ("--variants", OURS, "--seconds", "30"), 35, "engine overhead"),
        Section("kernels", (*kernels, "--seconds", "50"), 55),
        step(on_mosei()[0], ("--variants", ",".join(COMPILATIONS), "--no-engine", "--seconds", "60"), 65, "compiled"),
        Section("memcheck triton", memcheck, 50, sanitizer | {"FASTMMKD_PARITY": "triton"}, least=30),
    ]


def a_whole_training(count: int) -> list[Section]:
    return [Section("whole training", ("-m", "bench.gpu_training", FOUND, "--whole"), 175, least=60)]


def step(config: str, arguments: tuple[str, ...], seconds: float, name: str = "") -> Section:
    """A whole training step of a shipped config, in the precision that it trains in there, at MOSEI's lengths."""
    which = ("--config", f"configs/{config}.json", "--lengths", LENGTHS)
    command, record = ("-m", "bench.train_step", *which, "--record", *arguments), f"train_step_{config}_{LENGTHS}"
    return Section(name or f"step {config.split('_')[0]}", command, seconds, speed_record=record, least=20)


def _rehearsal(section: Section) -> Section:
    """The section on a CPU: the same command, at a size at which it ends."""
    command, environment = section.command, dict(section.environment)
    small = {
        "bench.train_step": ("--batch", "4", "--frames", "6", "--runs", "3", "--precision", "bf16"),
        "bench.gpu_kernels": ("--dry-run",),
        "bench.gpu_smoke": ("--rehearse",),
        "bench.gpu_training": ("--rehearse",),
        "bench.gpu_preflight": ("--rehearse",),
    }
    for module, arguments in small.items():
        if module in command:
            command = (*command, *arguments)
    if section.name == "graphs":
        command = (*command[:-1], "not gpu and not slow", "-k", "replay or graph")
    provider = environment.get("FASTMMKD_PARITY")
    if provider == "triton":
        environment |= stand_in()
    if provider == "cuda":
        environment["FASTMMKD_PARITY"] = "cpp"
    if section.name.startswith("compiled"):
        at = command.index("--variants") + 1
        command = (*command[:at], COMPILED, *command[at + 1 :])  # the others need CUDA
    if "--record" in command:
        at = command.index("--record") + 1
        command = (*command[:at], str(REHEARSED_SPEED), *command[at:])
    times = [str(REHEARSAL_FACTOR * int(value)) if before == "--seconds" else value for before, value in pairs(command)]
    return replace(section, command=tuple(times), environment=environment, seconds=REHEARSAL_FACTOR * section.seconds)


def pairs(command: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Every word with the one before it."""
    return zip(("", *command), command, strict=False)


def stand_in() -> dict[str, str]:
    """The environment in which tests of the Triton kernels run without a GPU, or those of the C++ ones do instead."""
    import numpy
    import triton

    if version(triton.__version__) < (3, 7, 1) and version(numpy.__version__) >= (2, 4):
        return {"FASTMMKD_PARITY": "cpp"}  # that interpreter fails with that numpy
    return {"FASTMMKD_PARITY": "triton", "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore::RuntimeWarning"}


def version(text: str) -> tuple[int, ...]:
    """ "3.7.1+git" -> (3, 7, 1)."""
    return tuple(int(part) for part in text.split("+")[0].split(".") if part.isdigit())


def smoke_tests() -> list[tuple[str, str]]:
    """(provider, operation) of every process of the smoke test, the preferred provider first."""
    providers = ("triton", "cuda")
    return [(provider, name) for provider in providers for name, op in OPERATIONS.items() if provider in op.kernels]
