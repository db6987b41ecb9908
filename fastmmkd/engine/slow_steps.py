"""What takes far longer than usual is told of while it does: it may wait for a host that is down."""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from threading import Event, Thread
from types import TracebackType

REMEMBERED = 100
"""Times of a kind that say what is usual."""
TIMES_USUAL = 10.0
LEAST_S, FIRST_S = 10.0, 60.0
"""Never told of before; the first of a kind, which may compile and allocate, before the second. Half of the timeout, if
that is less."""


class SlowSteps:
    """Watches steps, and what else waits for other processes, from a thread of its own.

    The one that takes them may be deep in a collective operation.

    Args:
        say: tells people a line.
        timeout: `train.timeout_seconds`, for the line.
        least, first: see `LEAST_S` and `FIRST_S`.
    """

    def __init__(
        self, say: Callable[[str], None], timeout: float, least: float = LEAST_S, first: float = FIRST_S
    ) -> None:
        self.say, self.timeout, self.least, self.first = say, timeout, least, first
        self._took: dict[str, deque[float]] = defaultdict(partial(deque, maxlen=REMEMBERED))
        self._firsts: set[str] = set()
        self._now: tuple[str, float] | None = None
        self._told = False
        self._end = Event()
        self._thread = Thread(target=self._watch, daemon=True, name="slow steps")

    def __enter__(self) -> SlowSteps:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    @contextmanager
    def watched(self, what: str) -> Iterator[None]:
        """The block is one of a kind: `"this step"`."""
        self._told, started = False, time.monotonic()
        self._now = what, started
        try:
            yield
        finally:
            self._now = None
        took = time.monotonic() - started
        if self._told:
            self.say(f"{what} was done after {took:.0f} s")
        if what in self._firsts:
            self._took[what].append(took)
        self._firsts.add(what)

    def _watch(self) -> None:
        while not self._end.wait(min(self.least, self.timeout, 1.0) / 4):
            now = self._now
            if now is None or self._told:
                continue
            what, since = now
            takes, longest = time.monotonic() - since, max(self._took[what], default=None)
            patience = self.first if longest is None else max(self.least, TIMES_USUAL * longest)
            if takes < min(patience, self.timeout / 2):
                continue
            usual = "" if longest is None else f", those before took {longest:.2g} s at most"
            self._told = True
            self.say(
                f"{what} takes {takes:.0f} s so far{usual}: another process may be slow, or its host or a link down; "
                f"the run ends {self.timeout:g} s (train.timeout_seconds) after its last answer"
            )
