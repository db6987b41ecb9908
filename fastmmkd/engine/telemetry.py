"""What a run tells: a progress bar for people, TensorBoard and `metrics.jsonl` for tools."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch.utils.tensorboard import SummaryWriter

from fastmmkd.files import write_text
from fastmmkd.run_folder import JOURNAL_FILE, TENSORBOARD_FOLDER


class TrainingBar(Progress):
    """A progress bar with the loss parts on a line of their own: both fit into 80 columns."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(f"  {task.fields['losses']}", no_wrap=True, overflow="ellipsis")


class Telemetry:
    """The progress of a training, for people. Other processes than the first hold a silent one."""

    def __init__(self, title: str, total_steps: int, done: int, console: Console, silent: bool) -> None:
        self._started, self._first = time.monotonic(), done
        self._progress = TrainingBar(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}"),
            console=console,
            disable=silent or not console.is_terminal,
            transient=True,
        )
        self._bar = self._progress.add_task(title, total=total_steps, completed=done, rate="", losses="")

    def __enter__(self) -> Telemetry:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def step(self, step: int, samples: int, parts: dict[str, float]) -> None:
        """Show where training is: `step` of all steps of that many samples, the running means of the loss parts."""
        rate = (step - self._first) * samples / max(time.monotonic() - self._started, 1e-9)
        losses = "  ".join(f"{name} {value:.3f}" for name, value in parts.items())
        self._progress.update(self._bar, completed=step, rate=f"{rate:,.0f} samples/s", losses=losses)


class Journal:
    """The records of one seed: `metrics.jsonl`, TensorBoard, and a line an epoch. A silent one writes nothing."""

    def __init__(self, directory: Path, title: str, done: int, console: Console, silent: bool) -> None:
        self.silent = silent
        self.path = directory / JOURNAL_FILE
        self.console = console
        self._title = title
        self._writer = None if silent else SummaryWriter(str(directory / TENSORBOARD_FOLDER), purge_step=done + 1)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer:
            self._writer.close()

    def epoch(self, record: dict[str, Any], line: str) -> None:
        """Keep one epoch's record, and show its line."""
        if self.silent:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(_without_nan(record)) + "\n")
        assert self._writer is not None
        for group in ("train", "gradients", "valid", "engine"):
            for name, value in record.get(group, {}).items():
                self._writer.add_scalar(f"{group}/{name}", value, record["step"])
        self._writer.flush()
        self.console.print(f"[bold]{self._title}[/] {line}", highlight=False, soft_wrap=True)

    def rewind(self, epochs: int) -> None:
        """Forget what was recorded after the first `epochs` epochs: a resumed run will record it again."""
        if not self.silent and self.path.exists():
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["epoch"] <= epochs]
            write_text(self.path, "".join(kept))


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
