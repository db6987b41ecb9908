"""Tables of speed: what the newest record of each (kind, device) says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bench import data_path, parity, records, scaling, speed_plots, table, train_step
from bench.engine_overhead import AS_CONFIGURED
from bench.quality import NOT_YET
from bench.variants import COMPILED, OURS, REFERENCE, SDPA, SEEDS
from fastmmkd.evaluation import tables

HEADLINES = ("cross_attention", "pairwise_contrastive", "five seeds")
"""Groups of benchmarks that the README shows."""
STEPS, SCALING = "train_step_", "scaling_"
COMPARED = (REFERENCE, SDPA, COMPILED)

Record = dict[str, Any]


def parts() -> dict[str, str]:
    """Every generated part about speed and parity, by name."""
    found = {key: record for key, record in records.newest().items() if record.get("variants") != []}
    return {
        "speed": headline(found),
        "train_steps": _each(found, STEPS, _pictured(train_step.render)),
        "kernels": _each(found, table.KIND, table.render),
        "scaling": _each(found, SCALING, _pictured(scaling.render)),
        "data_path": _each(found, data_path.KIND, data_path.render),
        "parity": _each(found, parity.KIND, parity.render),
    }


def headline(found: dict[tuple[str, str], Record]) -> str:
    """What the README shows: whole steps, then the kernels that matter most, of every device."""
    bodies = []
    for device in dict.fromkeys(device for _, device in found):
        steps = [record for (kind, at), record in found.items() if at == device and kind.startswith(STEPS)]
        steps = [record for record in steps if train_step.times_as_long(record["variants"])]  # one was cut short
        if steps:
            bodies.append(f"Whole training steps on {records.described(steps[0])}.\n\n{steps_table(steps)}")
        kernels = found.get((table.KIND, device))
        if kernels:
            chosen = [member for member in kernels["benchmarks"] if member["group"].startswith(HEADLINES)]
            ratios = table.ratios(kernels | {"benchmarks": chosen})
            bodies.append(f"Kernels, forward and backward, on {records.described(kernels)}.\n\n{ratios}")
    return "\n".join(bodies) or NOT_YET


def steps_table(steps: list[Record]) -> str:
    """A row per config: how long ours takes, how many times as long the others take, and what DeepSpeed adds."""
    rows = []
    for record in steps:
        variants = {v["name"]: v for v in record["variants"]}
        ours, work = variants[OURS], record["workload"]
        times = train_step.times_as_long(record["variants"])
        configured = [e for e in record.get("engine", {}).get("engines", []) if e["name"] == AS_CONFIGURED]
        together = variants.get(SEEDS)
        rows.append(
            [
                f"{record['config']} ({work['batch']} x {work['frames']})",
                f"{ours['step ms']['p50']:.3g}",
                f"{ours['samples per second']:,.0f}",
                *(f"{times[name]:.1f}" if name in times else tables.NONE for name in COMPARED),
                f"{times[SEEDS]:.2f} ({together['models']})" if together else tables.NONE,
                f"{configured[0]['overhead %']:+.1f}" if configured else tables.NONE,
            ]
        )
    compared = [f"{name}, times as long" for name in COMPARED]
    header = ["config (batch x frames)", "ours ms", "samples/s", *compared, "several seeds, each", "DeepSpeed %"]
    return tables.markdown_table(header, rows)


def _each(found: dict[tuple[str, str], Record], kind: str, body: Callable[[Record], str]) -> str:
    """One table per record of a kind, or of the kinds that start like it, with what it was taken on."""
    bodies = [f"{records.described(record)}:\n\n{body(record)}" for record in _of(found, kind)]
    return "\n".join(bodies) or NOT_YET


def _of(found: dict[tuple[str, str], Record], kind: str) -> Iterator[Record]:
    return (
        record for (name, _), record in found.items() if name == kind or (kind[-1] == "_" and name.startswith(kind))
    )


def _pictured(body: Callable[[Record], str]) -> Callable[[Record], str]:
    """With a title that names the workload, and a picture, as `docs/speed.md` refers to it."""

    def pictured(record: Record) -> str:
        work, picture = record["workload"], speed_plots.path_of(record)
        dims = " + ".join(map(str, work["dims"]))
        title = f"{record['config']}, batch {work['batch']}, {work['frames']} frames of {dims}"
        return f"{title}:\n\n{body(record)}\n![{record['kind']}]({picture.parent.name}/{picture.name})\n"

    return pictured
