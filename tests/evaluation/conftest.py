"""A small world with a known posterior, from which runs of any quality can be simulated and evaluated for real."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest

from fastmmkd.evaluation import floors, metrics
from fastmmkd.evaluation.results import Outcome, SeedEvaluation, combine
from fastmmkd.evaluation.schema import Results
from fastmmkd.modalities import CONDITIONS
from fastmmkd.tasks import Task

SUPPORT = {"score": np.arange(-9, 10) / 3, "sims": np.arange(-5, 6) / 5, "emotions": np.arange(4.0)}
CLARITY = {"l": 1.5, "a": 0.8, "v": 0.6, "la": 1.6, "lv": 1.55, "av": 1.0, "lav": 1.8}
"""How far apart the likelihoods of different labels lie under each condition."""


class World:
    """Labels drawn from an uneven prior, and per condition the exact posterior after a Gaussian observation."""

    def __init__(self, task: Task, samples: int, seed: int = 0) -> None:
        self.task, self.support = task, SUPPORT[task.label_kind]
        generator = np.random.default_rng(seed)
        prior = np.exp(-(((self.support - self.support.mean() + 0.4) / np.ptp(self.support)) ** 2) * 4)
        prior /= prior.sum()
        drawn = generator.choice(len(prior), size=samples, p=prior)
        self.train_labels = self.as_labels(generator.choice(len(prior), size=samples, p=prior))
        self.labels = self.as_labels(drawn)
        self.posteriors = {}
        for condition, clarity in CLARITY.items():
            seen = clarity * self.support * (3 if task.label_kind == "sims" else 1)
            observed = seen[drawn] + generator.normal(size=samples)
            log_p = np.log(prior) - 0.5 * (observed[:, None] - seen) ** 2
            p = np.exp(log_p - log_p.max(axis=1, keepdims=True))
            self.posteriors[condition] = p / p.sum(axis=1, keepdims=True)

    def as_labels(self, drawn: np.ndarray) -> np.ndarray:
        return self.support[drawn] if self.task.has_scores else np.eye(4)[drawn]

    def predict(self, condition: str, noise: float, seed: int) -> np.ndarray:
        """Predictions of a model that knows the posterior up to noise."""
        generator = np.random.default_rng([seed, CONDITIONS.index(condition)])
        posterior = self.posteriors[condition]
        if self.task.is_regression:
            return posterior @ self.support + noise * generator.normal(size=len(posterior))
        noisy = np.log(posterior + 1e-6) + 3 * noise * generator.normal(size=posterior.shape)
        p = np.exp(noisy - noisy.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        if self.task.label_kind == "emotions":
            return p
        if self.task.outputs == 7:
            columns = np.clip(np.round(self.support), -3, 3) + 3
        elif self.task.outputs == 3:
            columns = np.sign(self.support) + 1
        else:
            columns = self.support >= 0
        return np.stack([p[:, columns == k].sum(axis=1) for k in range(self.task.outputs)], axis=1)

    def evaluate(self, noise: float, seed: int, steps: int = 11) -> SeedEvaluation:
        def outcome(condition: str, extra: float = 0.0) -> Outcome:
            judged = self.task, self.labels, self.predict(condition, noise + extra, seed)
            return Outcome(len(self.labels), metrics.compute(*judged), metrics.confusion(*judged))

        sweep = [(float(p), outcome("lav", extra=2 * p).metrics) for p in np.linspace(0, 1, steps)]
        return SeedEvaluation(seed, {c: outcome(c) for c in CONDITIONS}, sweep, len(self.labels))

    def floor(self) -> dict[str, float]:
        return floors.floor(self.task, self.labels, self.train_labels)

    def ideal(self, condition: str) -> dict[str, float]:
        return floors.ideal(self.task, self.labels, self.posteriors[condition], self.support)


@pytest.fixture(scope="session")
def make_world() -> Callable[..., World]:
    """`make_world(task, samples)`; made once per session, so do not change what it returns."""
    return cache(World)


@pytest.fixture(scope="session")
def simulate(make_world: Callable[..., World]) -> Callable[..., Results]:
    """Results of a simulated run: `simulate(method, noise=.., seeds=.., task=..)`; shared, so do not change them."""

    @cache
    def run(
        method: str = "umdf",
        noise: float = 0.3,
        seeds: tuple[int, ...] = (1, 2, 3),
        task: str = "regression",
        data_hash: str = "ab12" * 16,
        known_posterior: bool = True,
        steps: int = 3,
        samples: int = 120,
        data: str = "simulated MOSI (seed 0)",
    ) -> Results:
        world = make_world(Task(task), samples)
        return combine(
            method,
            data,
            data_hash,
            world.task,
            [world.evaluate(noise, seed, steps) for seed in seeds],
            {c: world.floor() for c in CONDITIONS},
            {c: world.ideal(c) for c in CONDITIONS} if known_posterior else None,
            floors.trivial(world.task, world.labels, world.train_labels),
            {c: metrics.used(world.task, world.labels) for c in CONDITIONS},
        )

    return run
