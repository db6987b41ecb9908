"""Tables of speed: what the newest record of each (kind, device) says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bench import data_path, epoch, parity, records, scaling, speed_plots, table, train_step
from bench.engine_overhead import AS_CONFIGURED
from bench.quality import NOT_YET
from bench.variants import AS_TRAINED, COMPILED, CROPPED, JAGGED, OURS, REFERENCE, SDPA, SEEDS
from bench.workload import FULL
from fastmmkd.evaluation import tables

HEADLINES = ("cross_attention", "pairwise_contrastive", "five seeds")
"""Groups of benchmarks that stand with the whole steps."""
STEPS, SCALING = "train_step_", "scaling_"
COMPARED = (REFERENCE, SDPA, CROPPED, JAGGED, COMPILED)
REAL = "Whole training steps at real lengths (samples as long as the data set's, on average as the table says)"
AS_LONG = "Whole training steps with every sample as long as the longest"

Record = dict[str, Any]


def parts() -> dict[str, str]:
    """Every generated part about speed and parity, by name."""
    newest = {key: record for key, record in records.newest().items() if record.get("variants") != []}
    return {
        "speed": overview(newest),
        "whole_steps": headline(newest),
        "train_steps": _each(newest, STEPS, _pictured(train_step.render)),
        "kernels": _each(newest, table.KIND, table.render),
        "epochs": _each(newest, epoch.KIND, epoch.render),
        "scaling": _each(newest, SCALING, _pictured(scaling.render)),
        "data_path": _each(newest, data_path.KIND, data_path.render),
        "parity": _each(newest, parity.KIND, parity.render),
    }


def overview(newest: dict[tuple[str, str], Record]) -> str:
    """What the README shows: how many times as long as ours the others' whole steps take at real lengths."""
    timed = []
    for record in _whole_steps(newest).values():
        ours = as_users_take_it({v["name"]: v for v in record["variants"]})
        if lengths_of(record["workload"]) != FULL:
            timed.append((record, train_step.times_as_long(record["variants"], ours["name"])))
    timed.sort(key=lambda of: of[0]["config"])
    if not timed:
        return NOT_YET
    compared = [name for name in COMPARED if any(name in times for _, times in timed)]
    rows = [
        [
            f"{record['config']} ({record['workload']['batch']} x {frames_of(record['workload'])})",
            records.device_of(record),
            *(f"{times[name]:.1f}" if name in times else tables.NONE for name in compared),
        ]
        for record, times in timed
    ]
    return tables.markdown_table(["config (batch x frames)", "on", *compared], rows)


def headline(newest: dict[tuple[str, str], Record]) -> str:
    """Of every device: whole steps at real lengths, whole steps of samples that are all as long as the longest, and
    the kernels that matter most."""
    bodies, devices = [], list(dict.fromkeys(device for _, device in newest))
    whole = _whole_steps(newest)
    for at_real_lengths, what in ((True, REAL), (False, AS_LONG)):
        for device in devices:
            steps = [
                record
                for (_, at), record in whole.items()
                if at == device and (lengths_of(record["workload"]) != FULL) == at_real_lengths
            ]
            if steps:
                bodies.append(f"{what}, on {records.described(steps[0])}.\n\n{steps_table(steps)}")
    for device in devices:
        kernels = newest.get((table.KIND, device))
        if kernels:
            chosen = [member for member in kernels["benchmarks"] if member["group"].startswith(HEADLINES)]
            ratios = table.ratios(kernels | {"benchmarks": chosen})
            bodies.append(f"Kernels, forward and backward, on {records.described(kernels)}.\n\n{ratios}")
    return "\n".join(bodies) or NOT_YET


def _whole_steps(newest: dict[tuple[str, str], Record]) -> dict[tuple[str, str], Record]:
    """Those with something to compare: one that was cut short, or of which ours is excluded, has nothing."""
    whole = {key: record for key, record in newest.items() if key[0].startswith(STEPS)}
    return {key: record for key, record in whole.items() if train_step.times_as_long(record["variants"])}


def steps_table(steps: list[Record]) -> str:
    """A row per config: how long ours takes (`as_users_take_it`), how many times as long the others take, and what
    DeepSpeed adds."""
    rows, shown = [], [v["name"] for record in steps for v in record["variants"]]
    compared = [name for name in COMPARED if name in shown]
    for record in steps:
        variants = {v["name"]: v for v in record["variants"]}
        ours, work = as_users_take_it(variants), record["workload"]
        times = train_step.times_as_long(record["variants"], ours["name"])
        configured = [e for e in record.get("engine", {}).get("engines", []) if e["name"] == AS_CONFIGURED]
        together = variants.get(SEEDS)
        rows.append(
            [
                f"{record['config']} ({work['batch']} x {frames_of(work)})",
                f"{ours['step ms']['p50']:.3g}",
                f"{ours['samples per second']:,.0f}",
                *(f"{times[name]:.1f}" if name in times else tables.NONE for name in compared),
                f"{times[SEEDS]:.2f} ({together['models']})" if together else tables.NONE,
                f"{configured[0]['overhead %']:+.1f}" if configured else tables.NONE,
            ]
        )
    others = [f"{name}, times as long" for name in compared]
    header = ["config (batch x frames)", "ours ms", "samples/s", *others, "several seeds, each", "DeepSpeed %"]
    return tables.markdown_table(header, rows)


def as_users_take_it(variants: Record) -> Record:
    """The step that training takes where it replays a graph, which "ours" does not; otherwise "ours"."""
    as_trained = variants.get(AS_TRAINED, {})
    return as_trained if as_trained.get("train.graph", "off") != "off" else variants[OURS]


def lengths_of(workload: dict[str, Any]) -> str:
    """One of `bench.workload.LENGTHS`; records from before there was a choice have the only one there was."""
    lengths: str = workload.get("lengths", FULL)
    return lengths


def frames_of(workload: dict[str, Any]) -> str:
    """`"50"`, or `"20 of 50"`: the mean of the samples, and the longest."""
    frames = workload["frames"]
    return f"{frames}" if lengths_of(workload) == FULL else f"{workload['mean frames']:.0f} of {frames}"


def _each(newest: dict[tuple[str, str], Record], kind: str, body: Callable[[Record], str]) -> str:
    """One table per record of a kind, or of the kinds that start like it, with what it was taken on."""
    bodies = [f"{records.described(record)}:\n\n{body(record)}" for record in _of(newest, kind)]
    return "\n".join(bodies) or NOT_YET


def _of(newest: dict[tuple[str, str], Record], kind: str) -> Iterator[Record]:
    return (
        record for (name, _), record in newest.items() if name == kind or (kind[-1] == "_" and name.startswith(kind))
    )


def _pictured(body: Callable[[Record], str]) -> Callable[[Record], str]:
    """With a title that names the workload, and a picture, as `docs/speed.md` refers to it."""

    def pictured(record: Record) -> str:
        work, picture = record["workload"], speed_plots.path_of(record)
        dims = " + ".join(map(str, work["dims"]))
        title = f"{record['config']}, batch {work['batch']}, {frames_of(work)} frames of {dims}"
        if lengths_of(work) != FULL:
            title += f", {lengths_of(work)}'s lengths"
        return f"{title}:\n\n{body(record)}\n![{record['kind']}]({picture.parent.name}/{picture.name})\n"

    return pictured
