"""What a run tells: a progress bar for people, TensorBoard and `metrics.jsonl` for tools."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from fastmmkd.files import write_text, writing
from fastmmkd.run_folder import JOURNAL_FILE, TENSORBOARD_FOLDER


class Terminal(Console):
    """Where a run is told of. Training goes on without whoever was told, such as a terminal that was closed."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        with open(os.devnull, "w", encoding="utf-8") as nothing:  # what is buffered would be tried again at the end
            os.dup2(nothing.fileno(), sys.stdout.fileno())


def note_in(log_file: Path, line: str) -> None:
    """Append a line to a log, with the time: for whoever is not at the terminal, or has lost it."""
    with suppress(OSError), log_file.open("a", encoding="utf-8") as file:
        file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} {line}\n")


class TrainingBar(Progress):
    """A progress bar with the loss parts on a line of their own: both fit into 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(f"  {task.fields['losses']}", no_wrap=True, overflow="ellipsis")


class Telemetry:
    """The progress of a training, for people. Other processes than the first hold a silent one."""

    def __init__(
        self,
        title: str,
        total_steps: int,
        done: int,
        left: Callable[[int, float], float],
        console: Console,
        silent: bool,
    ) -> None:
        """`left`: seconds to the end of the run, of the steps that are left here and the seconds that one takes."""
        self._started, self._first, self._total, self._left = time.monotonic(), done, total_steps, left
        self._progress = TrainingBar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
            TextColumn("{task.fields[rate]}"),
            console=console,
            disable=silent or not console.is_terminal,
            transient=True,
        )
        self._bar = self._progress.add_task(title, total=total_steps, completed=done, left="", rate="", losses="")

    def __enter__(self) -> Telemetry:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, step: int, samples: int, parts: dict[str, float]) -> None:
        """Show where training is: `step` of all steps of that many samples, the running means of the loss parts."""
        elapsed = max(time.monotonic() - self._started, 1e-9)
        rate = (step - self._first) * samples / elapsed
        left = self._left(self._total - step, elapsed / (step - self._first)) if step > self._first else 0.0
        losses = "  ".join(f"{name} {value:.3f}" for name, value in parts.items())
        self._progress.update(
            self._bar,
            completed=step,
            left=f"{timedelta(seconds=round(left))} left",
            rate=f"{rate:,.0f} samples/s",
            losses=losses,
        )


class Journal:
    """The records of one seed: `metrics.jsonl`, TensorBoard, and a line an epoch. A silent one writes nothing."""

    def __init__(self, directory: Path, title: str, done: int, console: Console, silent: bool) -> None:
        self.silent = silent
        self.path = directory / JOURNAL_FILE
        self.console = console
        self._title = title
        self._events = directory / TENSORBOARD_FOLDER
        with writing(self._events):
            self._writer = None if silent else SummaryWriter(str(self._events), purge_step=done + 1)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer:
            with suppress(OSError) if error else writing(self._events):
                self._writer.close()

    def epoch(self, record: dict[str, Any], line: str) -> None:
        """Keep one epoch's record, and show its line.

        Raises:
            CannotWrite: it cannot be kept.
        """
        if self.silent:
            return
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_without_nan(record)) + "\n")
        assert self._writer is not None
        with writing(self._events):
            for group in ("train", "gradients", "valid", "engine"):
                for name, value in record.get(group, {}).items():
                    self._writer.add_scalar(f"{group}/{name}", value, record["step"])
            self._writer.flush()
        self.console.print(f"[bold]{self._title}[/] {line}", highlight=False, soft_wrap=True)

    def rewind(self, epochs: int) -> None:
        """Forget what was recorded after the first `epochs` epochs: a resumed run will record it again.

        Lines that are no records are left out, and it is said how many they were; a last one that was cut off, as a
        kill does, is not worth a word.
        """
        if self.silent or not self.path.exists():
            return
        with writing(self.path):  # which it cannot be either where it cannot be read
            lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
        kept = [line for line in lines if 0 < _epoch_of(line) <= epochs]
        write_text(self.path, "".join(f"{line}\n" for line in kept))
        if damaged := sum(not _epoch_of(line) for line in lines):
            said = f"{self.path}: {damaged} damaged line{'s' if damaged > 1 else ''} left out"
            self.console.print(said, style="yellow", markup=False, highlight=False, soft_wrap=True)


def _epoch_of(line: str) -> int:
    """The epoch of a record; 0 where a line is none."""
    try:
        epoch = json.loads(line)["epoch"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return 0
    return epoch if isinstance(epoch, int) and epoch > 0 else 0


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
