"""Ctrl-C and SIGTERM end a run between two steps, saved."""

from __future__ import annotations

import signal
from types import FrameType, TracebackType

import torch
import torch.distributed as dist

from fastmmkd.distributed import world_size


class InterruptionWatch:
    """While entered, SIGINT and SIGTERM are remembered instead of acted on; a second SIGINT stops at once.

    One within another knows what that one remembers, and leaves it what it has remembered itself.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> InterruptionWatch:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._remember)
        self.requested = any(outer.requested for outer in self._outer())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        for outer in self._outer():
            outer.requested |= self.requested

    def _outer(self) -> list[InterruptionWatch]:
        watches = (getattr(handler, "__self__", None) for handler in self._previous.values())
        return [watch for watch in watches if isinstance(watch, InterruptionWatch)]

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def agreed(self, device: torch.device, at_agreement: bool) -> bool:
        """Whether to stop now. Several processes ask each other, and only at agreed steps (`at_agreement`)."""
        if world_size() == 1:
            return self.requested
        if not at_agreement:
            return False
        flag = torch.tensor(int(self.requested), device=device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return bool(flag.item())
