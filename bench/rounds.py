"""Contenders timed round-robin in one process, so that whatever drifts drifts for all of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

WARM_UP = 3
"""Rounds that are not counted."""
WHOLE = "step"


class Clock:
    """When the stages of one step ended; on CUDA by events, so that the host does not wait between them."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.synchronize()
        self.marks: list[tuple[str, Any]] = []
        self.mark("")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """A stage that ends with the block; see `fastmmkd.engine.step.Stage`."""
        yield
        self.mark(name)

    def mark(self, stage: str) -> None:
        """The stage that ran since the last mark is over."""
        at: Any = time.perf_counter()
        if self.cuda:
            at = torch.cuda.Event(enable_timing=True)
            at.record()
        self.marks.append((stage, at))

    def seconds(self) -> dict[str, float]:
        """Of every stage, and of all together."""
        if self.cuda:
            torch.cuda.synchronize()
        between = zip(self.marks, self.marks[1:], strict=False)
        of_stage = {stage: self._between(before, after) for (_, before), (stage, after) in between}
        return of_stage | {WHOLE: self._between(self.marks[0][1], self.marks[-1][1])}

    def _between(self, before: Any, after: Any) -> float:
        return before.elapsed_time(after) / 1e3 if self.cuda else after - before


Step = Callable[[int, Clock], object]
"""Takes the number of the round, marks its stages."""


Seconds = dict[str, dict[str, np.ndarray]]
"""Name -> stage -> seconds `[runs]`, the whole under "step"."""


def time_all(
    contenders: Mapping[str, Step],
    runs: int,
    device: torch.device,
    warm_up: int = WARM_UP,
    failed: Callable[[str, Exception], None] | None = None,
    enough: Callable[[Seconds], bool] = lambda seconds: False,
) -> Seconds:
    """Time contenders in turns; every round starts with another one.

    Args:
        contenders: by name.
        runs: rounds that count.
        device: what they run on.
        warm_up: rounds before those.
        failed: told of a contender that raises, which then takes no more turns; without it the error is raised.
        enough: shown what was found after every round that counts; True ends it.
    """
    live = list(contenders)
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in live}
    for i in range(warm_up + runs):
        at = i % len(contenders)
        for name in [name for name in [*contenders][at:] + [*contenders][:at] if name in live]:
            try:
                clock = Clock(device)
                contenders[name](i, clock)
                seconds = clock.seconds()
            except Exception as error:
                if failed is None:
                    raise
                failed(name, error)
                live.remove(name)
                continue
            if i >= warm_up:
                rounds[name].append(seconds)
        if not live or (i >= warm_up and enough(_by_stage({name: rounds[name] for name in live}))):
            break
    return _by_stage({name: rounds[name] for name in live})


def _by_stage(rounds: dict[str, list[dict[str, float]]]) -> Seconds:
    return {
        name: {stage: np.array([seconds[stage] for seconds in each]) for stage in each[0]}
        for name, each in rounds.items()
        if each
    }


def quantiles(seconds: np.ndarray) -> dict[str, float]:
    """p20, p50 and p80 in milliseconds."""
    return {f"p{q}": 1e3 * float(np.percentile(seconds, q)) for q in (20, 50, 80)}
