"""Shared by the methods' tests: two processes in one."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from fastmmkd import distributed
from fastmmkd.methods import baselines, corrkd


@pytest.fixture
def in_two_processes(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[int], Any]], list[Any]]:
    """`in_two_processes(work)`: `[work(0), work(1)]`, each one of two processes (played by threads)."""
    own, meeting = threading.local(), threading.Barrier(2, timeout=20)
    shared: dict[int, torch.Tensor] = {}

    def all_gather(parts: list[torch.Tensor], x: torch.Tensor) -> None:
        shared[own.rank] = x
        meeting.wait()
        for rank, part in enumerate(parts):
            part.copy_(shared[rank])
        meeting.wait()

    def process(work: Callable[[int], Any], rank: int) -> Any:
        own.rank = rank
        try:
            return work(rank)
        except BaseException:
            meeting.abort()
            raise

    def run(work: Callable[[int], Any]) -> list[Any]:
        for module in (distributed, baselines, corrkd):
            monkeypatch.setattr(module, "world_size", lambda: 2)
            monkeypatch.setattr(module, "rank", lambda: own.rank, raising=False)
        monkeypatch.setattr(distributed.dist, "all_gather", all_gather)
        with ThreadPoolExecutor(2) as pool:
            return [f.result() for f in [pool.submit(process, work, rank) for rank in range(2)]]

    return run
