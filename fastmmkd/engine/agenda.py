"""What is left of a run, as far as the steps and evaluations so far can tell: for the time that the bar shows."""

from __future__ import annotations

from collections.abc import Sequence

from fastmmkd.blocks import Config
from fastmmkd.data.dataset import Dataset
from fastmmkd.engine import teachers
from fastmmkd.engine.groups import SeedGroup
from fastmmkd.engine.phases import phases_of
from fastmmkd.modalities import CONDITIONS
from fastmmkd.run_folder import is_evaluated

Stretch = tuple[tuple[int, ...], str]
"""The seeds of a group, and the name of a phase."""


class Agenda:
    """The phases and evaluations that a run has before it. Patience may shorten a phase: it tells the most."""

    def __init__(self, config: Config, dataset: Dataset, groups: Sequence[SeedGroup]) -> None:
        self._steps: dict[Stretch, int] = {}
        self._per_step: dict[str, float] = {}
        self._evaluations = 0
        self._per_evaluation = 0.0
        train, test = dataset.splits["train"], dataset.splits["test"]
        self._predictions = len(test) * (len(CONDITIONS) + len(config.eval.sweep))
        *before, last = phases_of(config)
        for group in groups:
            left = [directory for directory in group.directories if not is_evaluated(directory)]
            self._evaluations += len(left)
            unfinished = [s for s in before if not all(teachers.is_finished(s, d) for d in group.directories)]
            for spec in [*unfinished, last] if left else []:
                batches = len(spec.rows(config, train)) // config.train.batch_size
                self._steps[group.seeds, spec.name] = spec.epochs(config) * batches

    def left(self, stretch: Stretch, steps: int, seconds: float) -> float:
        """Seconds to the end of the run.

        Args:
            stretch: what is trained.
            steps: of it that are left.
            seconds: that one of them takes, validation included.
        """
        seeds, name = stretch
        self._per_step[name] = seconds / len(seeds)
        later = sum(
            count * self._per_step.get(phase, self._per_step[name]) * len(whom)
            for (whom, phase), count in self._steps.items()
            if (whom, phase) != stretch
        )
        return steps * seconds + later + self._evaluations * self._per_evaluation

    def end_phase(self, stretch: Stretch) -> None:
        """It is over, whether or not it took all its steps."""
        self._steps.pop(stretch, None)

    def predicted(self, predictions: int, seconds: float) -> None:
        """So many predictions of one model took so long: an evaluation takes as long for each of its own."""
        self._per_evaluation = seconds / max(predictions, 1) * self._predictions

    def end_evaluation(self, seconds: float) -> None:
        """One is over, and the next will take as long."""
        self._evaluations -= 1
        self._per_evaluation = seconds
