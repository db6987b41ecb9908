"""A pytest plugin for runs whose time is short: `pytest -p bench.pytest_record --found FILE`.

What matters most is run first, a failure is printed when it happens, and FILE holds at any moment what is known: how
many tests passed and were skipped, and the whole traceback of every failure. With pytest-xdist use `--dist worksteal`.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

FIRST = ("test_config_sizes.py", "test_models.py")
"""Files in their order; the others come after them."""
LAST_DTYPE = torch.float16
"""What trains on a GPU of compute capability 8.0 and later is bf16; fp16 is for older ones."""
INTERVAL = 2.0
"""Seconds between writes while nothing fails."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--found", type=Path, metavar="FILE", help="write what is known to this JSON file")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("found") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config.getoption("found")))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """By importance; with several workers such that the first chunk of each has the most important of its own."""
    ordered = sorted(items, key=importance)  # stable
    workers = getattr(config, "workerinput", {}).get("workercount", 1)
    items[:] = [item for first in range(workers) for item in ordered[first::workers]]


def importance(item: pytest.Item) -> tuple[bool, int]:
    """What a test is sorted by: tests in fp16 last, then by file."""
    parameters = getattr(item, "callspec", None)
    half = parameters is not None and LAST_DTYPE in parameters.params.values()
    name = item.path.name
    return half, FIRST.index(name) if name in FIRST else len(FIRST)


class Recorder:
    """Counts and prints what the workers, or this process, report."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts: Counter[str] = Counter(passed=0, failed=0, skipped=0)
        self.failures: dict[str, str] = {}
        self.slowest: list[tuple[float, str]] = []
        self.finished = False
        self.written = 0.0

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        self.counts[report.outcome] += 1
        self.slowest = sorted([*self.slowest, (report.duration, report.nodeid)], reverse=True)[:10]
        if report.failed:
            self.failures[f"{report.nodeid} ({report.when})"] = report.longreprtext
            print(f"\nFAILED {report.nodeid}\n{report.longreprtext}", flush=True)
        if report.failed or time.monotonic() - self.written > INTERVAL:
            self.write()

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.failures[f"{report.nodeid} (collection)"] = report.longreprtext
            print(f"\nFAILED {report.nodeid}, its collection\n{report.longreprtext}", flush=True)
            self.write()

    @pytest.hookimpl(wrapper=True)
    def pytest_sessionfinish(self, exitstatus: int) -> Generator[None, Any, Any]:
        self.finished = exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED)
        self.write()
        return (yield)

    def write(self) -> None:
        self.written = time.monotonic()
        known = {
            **self.counts,
            "finished": self.finished,
            "slowest": [[round(seconds, 1), test] for seconds, test in self.slowest],
            "failures": self.failures,
        }
        temporary = self.path.with_name(f".{self.path.name}.tmp")
        temporary.write_text(json.dumps(known, indent=1))
        os.replace(temporary, self.path)
