"""Contenders checked, timed and recorded one after the other, so that whatever ends a measurement leaves what it has.

What is quickly set up takes turns in one heat; what takes long, such as `torch.compile`, has a heat of its own in turns
with "ours", so that every ratio is one of neighbours. A contender that disagrees with the exact step or raises is
excluded; the others go on.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch

from bench import lineup, observe, power
from bench.agreement import Agreement
from bench.contenders import Contender
from bench.rounds import WHOLE, Clock, Seconds, quantiles, time_all
from bench.variants import AS_TRAINED, OURS
from fastmmkd.blocks import Config
from fastmmkd.data.dataset import Dataset
from fastmmkd.engine.device import DTYPES, place

ENERGY_SECONDS = 3.0
"""How long a contender runs while its power is sampled."""
BETWEEN_WRITES = 2.0
"""Seconds of rounds after which what they found is written down."""
FEWEST = 5
"""Rounds that are timed whatever the hour."""
SECONDS_ALONE = 40.0
"""After as many, what has a heat of its own takes no more turns than `FEWEST`."""

Facts = dict[str, Any]


class Heats:
    """The measurement of one config.

    Args:
        config: the run.
        dataset: what all train on.
        models: how many in "ours x seeds".
        runs: rounds that count.
        device, dtype: where and in which precision; "as trained" takes that of the config.
        end: when to stop, by `time.monotonic`.
        keep: called with all that is known, whenever there is more.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        models: int,
        runs: int,
        device: torch.device,
        dtype: torch.dtype,
        end: float,
        keep: Callable[[Facts], None],
    ) -> None:
        self.config, self.dataset, self.models, self.runs = config, dataset, models, runs
        self.device, self.dtype, self.end, self._keep = device, dtype, end, keep
        self.agreements: dict[torch.dtype, Agreement] = {}
        self.errors: dict[str, float] = {}
        self.ours: Contender | None = None
        self.variants: dict[str, Facts] = {}
        self.facts: Facts = {"seconds": 0.0, "excluded": {}, "tracebacks": {}, "skipped": {}, "variants": []}
        self.started = time.monotonic()

    def run(self, chosen: Sequence[str]) -> None:
        """Measure contenders, those of `lineup.TOGETHER` in one heat."""
        self.heat([name for name in chosen if name in lineup.TOGETHER])
        for name in chosen:
            if name in lineup.LATER:
                self.heat([name])

    @property
    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.end

    def heat(self, names: Sequence[str]) -> None:
        """Set up, check, time and observe."""
        ready = {name: contender for name in names if (contender := self.checked(name)) is not None}
        if not ready:
            return
        beside = {OURS: self.ours} if self.ours is not None and OURS not in ready else {}
        written = started = time.monotonic()

        def enough(timed: Seconds) -> bool:
            nonlocal written
            if time.monotonic() - written > BETWEEN_WRITES:
                self.note(ready, timed)
                written = time.monotonic()
            slow = bool(beside) and time.monotonic() - started > SECONDS_ALONE
            return (self.over or slow) and min(len(stages[WHOLE]) for stages in timed.values()) >= FEWEST

        self.note(ready, time_all({**beside, **ready}, self.runs, self.device, failed=self.exclude, enough=enough))
        for name, contender in ready.items():
            if name in self.variants and name not in self.facts["excluded"]:
                self.observe(name, contender)
        if OURS in ready and OURS not in self.facts["excluded"]:
            self.ours = ready[OURS]

    def checked(self, name: str) -> Contender | None:
        """A contender that agrees with the exact step, or nothing."""
        if self.over:
            self.facts["skipped"][name] = "no time left"
            print(f"{name}: skipped, no time left", flush=True)
            self.keep()
            return None
        try:
            contender = lineup.build(name, self.config, self.dataset, self.models, self.device, self.dtype)
            dtype = DTYPES[place(self.config).precision] if name == AS_TRAINED else self.dtype
            self.errors[name] = self.agreement(dtype).check(contender)
        except Exception as error:
            self.exclude(name, error)
            return None
        print(f"{name}: agrees, gradients to {self.errors[name]:.1e}", flush=True)
        return contender

    def agreement(self, dtype: torch.dtype) -> Agreement:
        """What contenders in a precision are held to."""
        if dtype not in self.agreements:
            self.agreements[dtype] = Agreement(self.config, self.dataset, self.device, dtype)
        return self.agreements[dtype]

    def exclude(self, name: str, error: Exception) -> None:
        """Leave a contender out, and say why."""
        lines = str(error).splitlines() or [""]
        reason = f"{type(error).__name__}: {lines[0]}".rstrip(": ")
        self.facts["excluded"][name] = reason
        self.facts["tracebacks"][name] = "".join(traceback.format_exception(error))
        self.variants.pop(name, None)
        print(f"{name}: excluded, {reason}", flush=True)
        self.keep()
        if self.device.type == "cuda":
            gc.collect()
            with suppress(RuntimeError):  # after a bad access nothing works any more, and the others will say so
                torch.cuda.empty_cache()

    def note(self, contenders: dict[str, Contender], timed: Seconds) -> None:
        """Take over the times so far."""
        for name, contender in contenders.items():
            if name not in timed:
                continue
            whole = quantiles(timed[name][WHOLE])
            self.variants[name] = {
                "name": name,
                "models": contender.models,
                "runs": len(timed[name][WHOLE]),
                "step ms": whole,
                "samples per second": 1e3 * contender.samples / whole["p50"],
                "stages ms": {
                    stage: quantiles(seconds)["p50"] for stage, seconds in timed[name].items() if stage != WHOLE
                },
                "gradient error": self.errors[name],
                **({"ours ms": quantiles(timed[OURS][WHOLE])["p50"]} if OURS in timed else {}),
                **contender.about,
            }
        self.keep()

    def observe(self, name: str, contender: Contender) -> None:
        """What a contender's step does besides taking time; it is what time is left for."""
        variant = self.variants[name]
        print(f"{name}: {variant['step ms']['p50']:.3g} ms, {variant['runs']} rounds", flush=True)
        if self.over:
            return
        try:
            variant |= observed(name, contender)
            variant["energy"] = energy(contender, variant)
        except Exception as error:
            variant["not observed"] = f"{type(error).__name__}: {error}"
        self.keep()

    def keep(self) -> None:
        """Write down all that is known."""
        self.facts["seconds"] = time.monotonic() - self.started
        self.facts["variants"] = [self.variants[name] for name in lineup.SHOWN if name in self.variants]
        self._keep(self.facts)


def observed(name: str, contender: Contender) -> Facts:
    """Operator calls, launches and memory of one step; None where they cannot be told."""

    def run() -> None:
        contender(0, Clock(contender.device))

    return {
        "operator calls": None if name in lineup.OPAQUE or contender.replays else observe.operator_calls(run),
        "launches": observe.launches(run) if contender.device.type == "cuda" else None,
        "peak memory": observe.peak_memory(run, contender.device),
    }


def energy(contender: Contender, variant: Facts) -> Facts:
    """What a contender's steps draw from the GPU; `{"absent": reason}` on a CPU."""
    if contender.device.type != "cuda":
        return dict(power.ABSENT)
    steps = max(1, round(1e3 * ENERGY_SECONDS / variant["step ms"]["p50"]))
    with power.PowerSampler() as sampler:
        for i in range(steps):
            contender(i, Clock(contender.device))
        torch.cuda.synchronize()
    return sampler.summary(steps * contender.samples)
