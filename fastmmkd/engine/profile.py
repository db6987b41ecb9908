"""`fastmmkd profile`: where the time of a config's training steps goes.

Steps are those of training, under DeepSpeed and replayed where training replays them: the first seed's last phase, with
a teacher, if there is one, that has not learnt yet. Modules are timed in the forward pass, through hooks; the backward
pass is one range.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from fastmmkd.blocks import Config
from fastmmkd.data.single_label import single_labelled
from fastmmkd.data.training_file import read_data
from fastmmkd.engine.checks import check_fit
from fastmmkd.engine.device import Placement, output_to, place, prepare_process, start_deepspeed, warnings_to, wrap
from fastmmkd.engine.floor import Floor, floor
from fastmmkd.engine.step import REPLAY, STAGES, STEPS, Objective, graph_mode, untrained_objective
from fastmmkd.environment import titled_table
from fastmmkd.files import make_directory, replacing
from fastmmkd.run_folder import LOG_FILE

WARM_UP = 3
"""Steps before those that count."""
TOP = 15
STAGE, MODULE = "stage ", "module "
OPERATORS = ("aten::", "fastmmkd::")


@dataclass
class Profile:
    """What the steps took, in seconds per step on the host."""

    steps: int
    seconds: float
    """Wall clock, under the profiler."""
    unprofiled_seconds: float
    """Wall clock of as many steps without it."""
    stages: dict[str, float]
    modules: dict[str, float]
    operators: list[tuple[str, float, float]]
    """Name, seconds and calls per step, without what they call; the slowest first. On CUDA the device's seconds."""
    calls: float
    """Operators per step that are not called by another."""
    launches: float | None
    """On CUDA: kernels, copies and fills per step."""
    outside: float
    """Host work that is no operator's: Python, autograd's bookkeeping, DeepSpeed's."""
    floor: Floor


def profile_config(config: Config, steps: int, out: Path) -> None:
    """Profile a config's steps, write the trace into `out`, print the tables."""
    make_directory(out)
    console = Console()
    measured = profile_steps(config, steps, out)
    for table in tables(measured):
        console.print(table)
    where = f"{out / 'trace.json'}: for chrome://tracing or ui.perfetto.dev"
    console.print(where, soft_wrap=True, highlight=False, markup=False)


def profile_steps(config: Config, steps: int, out: Path) -> Profile:
    """Train `steps` steps without and with the profiler; writes `trace.json` and `deepspeed.log` into `out`.

    Raises:
        UserError: the data file is missing, or has fewer samples than a batch.
    """
    prepare_process(config)
    placement, log_file = place(config), out / LOG_FILE
    dataset = single_labelled(read_data(Path(config.data.path)), config.task, config.data.ambiguous)
    seed = config.train.seeds[0]
    check_fit(config, dataset.label_kind, len(dataset.splits["train"]), config.data.path)
    with warnings_to(log_file):
        stage = lambda name: record_function(STAGE + name)  # noqa: E731
        objective = untrained_objective(config, dataset, [seed], placement.device, placement.dtype, stage)
        loop = Loop(config, objective, placement, seed, log_file)
        least = floor(loop.loss, objective.module, placement.device, placement.dtype)
        loop.start()
        with labelled(objective.module):
            loop.run(WARM_UP)
            unprofiled = loop.run(steps)
            activities = [ProfilerActivity.CPU]
            if placement.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            with output_to(log_file), profile(activities=activities) as profiler:
                seconds = loop.run(steps)
        loop.engine.destroy()
    with replacing(out / "trace.json") as temporary, output_to(log_file):
        profiler.export_chrome_trace(str(temporary))
    return summary(profiler, steps, seconds / steps, unprofiled / steps, least)


class Loop:
    """The training loop with its stages marked, and nothing but steps in it."""

    def __init__(self, config: Config, objective: Objective, placement: Placement, seed: int, log_file: Path) -> None:
        self.config, self.objective, self.placement, self.log_file = config, objective, placement, log_file
        self.engine: Any = None
        size, batch = objective.split.size, config.train.batch_size
        order = objective.module.order(torch.arange(size), seed, 0)
        self.batches = order[: size // batch * batch].view(-1, batch).to(placement.device)
        self.epoch = torch.tensor(0, device=placement.device)
        self.at = 0

    def start(self) -> None:
        """Put DeepSpeed's engine around the module."""
        deepspeed = start_deepspeed(self.placement, self.log_file)
        module = self.objective.module
        self.engine = wrap(deepspeed, module, self.placement.deepspeed, self.log_file)
        mode, _ = graph_mode(self.config, self.placement, len(module.parameter_groups()))
        self.step = STEPS[mode](self.engine, self.objective, self.placement.clip_each)

    def loss(self) -> torch.Tensor:
        """Of the first step, without the engine."""
        return self.objective.loss(self.objective.draw(self.batches[:1], self.epoch))[0]

    def run(self, steps: int) -> float:
        """Seconds of this many steps."""
        self._wait()
        started = time.perf_counter()
        for _ in range(steps):
            rows = self.batches[self.at % len(self.batches)][None]
            self.at += 1
            self.step(rows, self.epoch, [])
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self.placement.device.type == "cuda":
            torch.cuda.synchronize(self.placement.device)


class labelled:
    """Inside the `with` block, the forward pass of each top-level module is a range named after it."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.handles: list[Any] = []
        self.open: list[record_function] = []

    def __enter__(self) -> labelled:
        for name, child in top_level(self.module):
            self.handles.append(child.register_forward_pre_hook(lambda *_, name=name: self._begin(name)))
            self.handles.append(child.register_forward_hook(lambda *_: self._end()))
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _begin(self, name: str) -> None:
        self.open.append(record_function(MODULE + name))
        self.open[-1].__enter__()

    def _end(self) -> None:
        self.open.pop().__exit__(None, None, None)


def top_level(module: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """The parts of a method by name: of a student its network's and its own; of a list each member, under its name."""
    for name, child in module.named_children():
        if name == "network":
            yield from top_level(child)
        elif isinstance(child, torch.nn.ModuleList):
            yield from ((name, member) for member in child)
        else:
            yield name, child


def summary(profiler: profile, steps: int, seconds: float, unprofiled: float, least: Floor) -> Profile:
    """What the profiler saw, per step."""
    cuda = torch.autograd.DeviceType.CUDA
    host = [event for event in profiler.events() or () if event.device_type != cuda]
    on_device = len(profiler.events() or ()) - len(host)
    ranges: Counter[str] = Counter()
    calls, inside = 0, 0.0
    for event in host:
        if event.name.startswith((STAGE, MODULE)):
            ranges[event.name] += event.cpu_time_total
        if event.name.startswith(OPERATORS):
            inside += event.self_cpu_time_total
            calls += not _within_operator(event)
    averages = [a for a in profiler.key_averages() if a.key.startswith(OPERATORS)]
    operators = [
        (a.key, max(a.self_device_time_total if on_device else 0, 0) or a.self_cpu_time_total, a.count)
        for a in averages
    ]
    slowest = sorted(operators, key=lambda operator: -operator[1])[:TOP]
    scale = 1e-6 / steps
    return Profile(
        steps,
        seconds,
        unprofiled,
        {stage: scale * ranges[STAGE + stage] for stage in (*STAGES, REPLAY) if STAGE + stage in ranges},
        {key.removeprefix(MODULE): scale * total for key, total in ranges.most_common() if key.startswith(MODULE)},
        [(key, scale * total, count / steps) for key, total, count in slowest],
        calls / steps,
        on_device / steps if on_device else None,
        seconds - scale * inside,
        least,
    )


def _within_operator(event: Any) -> bool:
    parent = event.cpu_parent
    while parent is not None:
        if parent.name.startswith(OPERATORS):
            return True
        parent = parent.cpu_parent
    return False


def tables(measured: Profile) -> list[Table]:
    """What is printed."""
    facts = titled_table("one step", "", "")
    facts.add_row("wall clock", f"{_ms(measured.unprofiled_seconds)} ms ({_ms(measured.seconds)} under the profiler)")
    share = measured.outside / measured.seconds
    facts.add_row("host work outside of operators", f"{_ms(measured.outside)} ms under the profiler, {share:.0%}")
    facts.add_row("operator calls", f"{measured.calls:,.0f}")
    if measured.launches is not None:
        facts.add_row("launches", f"{measured.launches:,.0f}")
    least = measured.floor
    facts.add_row("bytes, at least", f"{least.bytes / 1e6:,.1f} MB at {least.bytes_per_second / 1e9:,.1f} GB/s")
    speed = f"{least.operations_per_second / 1e9:,.0f} Gflop/s"
    facts.add_row("operations of products", f"{least.operations / 1e9:,.2f} Gflop at {speed}")
    gap = measured.unprofiled_seconds / least.seconds
    facts.add_row("floor", f"{_ms(least.seconds)} ms: the step takes {gap:.1f} times as long")
    return [
        facts,
        _shares("stages, host", measured.stages, measured.seconds),
        _shares("modules, forward, host", measured.modules, measured.seconds),
        _operators(measured),
    ]


def _shares(title: str, seconds: dict[str, float], whole: float) -> Table:
    table = _numbers(title, "what", "ms", "of the step")
    for name, value in seconds.items():
        table.add_row(name, _ms(value), f"{value / whole:.0%}")
    return table


def _operators(measured: Profile) -> Table:
    table = _numbers("operators, without what they call", "what", "ms", "calls", "of the step")
    for name, seconds, calls in measured.operators:
        table.add_row(name, _ms(seconds), f"{calls:g}", f"{seconds / measured.seconds:.0%}")
    return table


def _numbers(title: str, *columns: str) -> Table:
    table = titled_table(title, *columns)
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g}"
