"""What the seeds of a run share, and what is checked before any of them is trained."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from fastmmkd.blocks import Config
from fastmmkd.data.batches import ResidentSplit, scaling
from fastmmkd.data.store import Dataset
from fastmmkd.distributed import world_size
from fastmmkd.engine.agenda import Agenda
from fastmmkd.engine.checks import check_fit, selection
from fastmmkd.engine.device import Placement
from fastmmkd.engine.interruption import InterruptionWatch
from fastmmkd.engine.phases import phases_of
from fastmmkd.errors import UserError
from fastmmkd.evaluation.protocol import Evaluator
from fastmmkd.methods import METHODS


@dataclass
class Session:
    """What the seeds of a run share."""

    config: Config
    placement: Placement
    deepspeed: Any
    dataset: Dataset
    console: Console
    watch: InterruptionWatch
    log_file: Path
    """Where DeepSpeed writes."""
    agenda: Agenda = field(init=False)
    """What is left of the run; known once it is opened."""

    def __post_init__(self) -> None:
        check(self.config, self.dataset)
        self.normalisation = scaling(self.config.data, self.dataset)
        self.train = self._resident("train")
        valid = self.dataset.splits["valid"]
        self.valid = Evaluator(self._resident("valid"), valid.labels, valid.present, self.config.task, self.config.eval)

    def _resident(self, split: str) -> ResidentSplit:
        device, dtype = self.placement.device, self.placement.dtype
        return ResidentSplit(
            self.dataset.splits[split], self.normalisation, config=self.config, device=device, dtype=dtype
        )

    def say(self, line: str, style: str | None = None) -> None:
        """Print a line as it is: names may hold what looks like markup, and a log file has no width."""
        self.console.print(line, style=style, markup=False, highlight=False, soft_wrap=True)

    @property
    def select(self) -> str:
        """The metric that chooses the checkpoint."""
        return selection(self.config)


def check(config: Config, dataset: Dataset) -> None:
    """Refuse what would only fail after the first steps, or not at all.

    Raises:
        UserError: labels, metric, sizes or lengths of the data do not fit the config.
    """
    train, batch_size, path = dataset.splits["train"], config.train.batch_size, dataset.path
    check_fit(config, dataset.label_kind, len(train), path)
    for spec in phases_of(config):
        rows = len(spec.rows(config, train))
        if rows < batch_size:
            raise UserError(
                f"train.batch_size: {batch_size}, but {path} has {rows} complete training samples for the {spec.name}; "
                "expected at most that, or teacher.incomplete_samples=true"
            )
    METHODS[config.method].check(config, dataset.splits)
    if batch_size % world_size():
        raise UserError(f"train.batch_size: {batch_size} does not divide by {world_size()} processes")
