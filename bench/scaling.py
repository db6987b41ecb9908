"""How the cost of a step grows: `python -m bench.scaling --config configs/umdf_mosei.json --axis frames`.

Axes: `batch` (samples of a mini-batch), `frames` (of the longest sample; the others stretch with it), `rows` (samples
that the resident data hold, of which a step draws its batch), `seeds` (models trained at once), `ranks` (processes that
train one model under DeepSpeed, the config's batch in each; besides the time, what they send each other). The reference
pads every sample to the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch

from bench import entry, ranks, records
from bench.agreement import Agreement, Disagreement
from bench.contenders import WITH_REFERENCE, Contender
from bench.padding import PADDED
from bench.rounds import WHOLE, quantiles, time_all
from bench.train_step import add_workload_arguments, set_up, workload
from bench.variants import OURS, REFERENCE
from bench.volume import on_the_wire
from bench.workload import BATCHES, Shape, random_dataset, shape_of
from fastmmkd.blocks import Config
from fastmmkd.data.batches import ResidentSplit
from fastmmkd.engine.step import untrained_objective
from fastmmkd.errors import UserError
from fastmmkd.evaluation import tables

AXES = {
    "batch": (4, 8, 16, 32, 64),
    "frames": (12, 25, 50, 100, 200),
    "rows": (128, 512, 2048, 8192),
    "seeds": (1, 2, 5, 10),
    "ranks": (1, 2),
}
"""Axis -> the values that are measured unless others are given."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, record; returns the exit code."""
    parser = entry.Parser(prog="python -m bench.scaling", description="Time a step as something grows.")
    add_workload_arguments(parser)
    parser.add_argument("--axis", required=True, choices=list(AXES), help="what grows")
    parser.add_argument("--values", metavar="1,2,4", help="in place of the axis's own")
    parser.add_argument("--runs", type=int, default=15, help="rounds that count at every point (default 15)")
    args = parser.parse_args(argv)
    config, device, dtype = set_up(args)
    shape = shape_of(config, args.frames, args.dims, args.lengths)
    values = numbers(args.values) if args.values else AXES[args.axis]
    if args.axis == "ranks":
        points = [point(n, ranks.measure(config, shape, n, args.runs)) for n in values]
    else:
        points = [measure(args.axis, n, config, shape, args.runs, device, dtype) for n in values]
    body = {"config": args.config.stem, "workload": workload(config, shape, dtype), "axis": args.axis, "points": points}
    print(render(body))
    if args.record:
        print(records.append(f"scaling_{args.axis}_{args.config.stem}_{shape.lengths}", body, device))
    return 0


def numbers(text: str) -> tuple[int, ...]:
    """`"1,2,4"`.

    Raises:
        UserError: not positive whole numbers.
    """
    values = tuple(int(x) if x.strip().isdigit() else 0 for x in text.split(","))
    if min(values) < 1:
        raise UserError(f"--values {text}: expected positive whole numbers, for example 1,2,4")
    return values


def measure(
    axis: str, value: int, config: Config, shape: Shape, runs: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Ours and the reference at one point."""
    if axis == "batch":
        config = config.model_copy(update={"train": config.train.model_copy(update={"batch_size": value})})
    shape = shape._replace(frames=value) if axis == "frames" else shape
    models, batch = value if axis == "seeds" else 1, config.train.batch_size
    rows = value if axis == "rows" else BATCHES * batch
    if rows < batch:
        raise UserError(f"--values {value}: fewer resident rows than the batch of {batch}")
    dataset = random_dataset(config, shape, rows)
    built = {
        name: Contender(
            config,
            untrained_objective(config, dataset, range(1, models + 1), device, dtype, resident=resident),
            models,
            using,
        )
        for name, using, resident in ((REFERENCE, WITH_REFERENCE, PADDED), (OURS, nullcontext, ResidentSplit))
    }
    agreement = Agreement(config, dataset, device, dtype)
    for name, contender in built.items():
        try:
            agreement.check(contender)
        except Disagreement as error:
            raise Disagreement(f"{name}, {axis} {value}: {error}") from None
    seconds = time_all(built, runs, device)
    return point(value, {name: quantiles(seconds[name][WHOLE]) for name in built}, samples=models * batch)


def point(value: int, times: dict[str, Any], samples: int | None = None) -> dict[str, Any]:
    """What is recorded of one value of the axis; `samples` of a step, where `times` does not hold them."""
    volume = {"volume": times.pop("volume")} if "volume" in times else {}
    return {"value": value, "samples": samples or times.pop("samples"), "step ms": times} | volume


def render(body: dict[str, Any]) -> str:
    """A Markdown table: a row per point."""
    names = list(body["points"][0]["step ms"])
    header = [body["axis"], *(f"{name} {what}" for name in names for what in ("ms", "p20 to p80", "samples/s"))]
    compared = {OURS, REFERENCE} <= set(names)
    communicates = all("volume" in measured for measured in body["points"])  # not in older records
    header += ["MB sent by each"] if communicates else []
    rows = []
    for measured in body["points"]:
        row = [str(measured["value"])]
        for name in names:
            q = measured["step ms"][name]
            row += [
                f"{q['p50']:.3g}",
                f"{q['p20']:.3g} to {q['p80']:.3g}",
                f"{1e3 * measured['samples'] / q['p50']:,.0f}",
            ]
        if communicates:
            row.append(f"{on_the_wire(measured['volume'], measured['value']) / 1e6:.2f}")
        if compared:
            row.append(f"{measured['step ms'][REFERENCE]['p50'] / measured['step ms'][OURS]['p50']:.2f}")
        rows.append(row)
    return tables.markdown_table([*header, *(["reference / ours"] if compared else [])], rows)


if __name__ == "__main__":
    entry.run(main)
