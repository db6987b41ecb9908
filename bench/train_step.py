"""A whole training step, in several ways: `python -m bench.train_step --config configs/umdf_mosei.json`.

Missing draw from resident data, the teacher where there is one, forward, backward, clipping and Adam. First losses and
gradients are held to the exact ones before anything is timed (`bench.agreement`); contenders take turns in one process
(`bench.heats`). Data are random and complete (`bench.workload`); `--lengths` says how long samples are: as a data
set's, by default the config's own, or all as long as the longest (`full`).

With `--record` one file under `bench/results/speed` grows with every contender: whatever ends this, Ctrl-C or a kill,
leaves what was measured. Exit code 1: one of ours was excluded; 130: it was told to stop.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import choices, entry, lineup, records
from bench.engine_overhead import overhead
from bench.heats import Heats
from bench.variants import OURS, SEEDS
from bench.workload import BATCHES, LENGTHS, Shape, lengths_of, random_dataset, shape_of
from fastmmkd.blocks import Config
from fastmmkd.config import load_config
from fastmmkd.engine.device import DTYPES, place, prepare_process
from fastmmkd.errors import UserError
from fastmmkd.evaluation import tables

ENGINE = "engine"
"""What a record calls DeepSpeed's engine around ours."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, record; returns the exit code."""
    parser = entry.Parser(prog="python -m bench.train_step", description="Time a whole training step.")
    add_workload_arguments(parser)
    parser.add_argument("--runs", type=int, default=30, help="rounds that count (default 30)")
    parser.add_argument("--variants", metavar="A,B", help="these contenders (default: all that are quickly set up)")
    parser.add_argument("--all", action="store_true", help="all contenders, compiled ones last")
    parser.add_argument("--seeds", type=int, default=5, metavar="S", help='models of "ours x seeds" (default 5)')
    parser.add_argument("--no-engine", action="store_true", help="leave out what DeepSpeed's engine adds to a step")
    parser.add_argument("--seconds", type=float, default=math.inf, metavar="N", help="skip what is left after as many")
    args = parser.parse_args(argv)
    if min(args.runs, args.seeds) <= 0:
        raise UserError("--runs and --seeds: expected more than 0")
    end = choices.end(args)
    config, device, dtype = set_up(args)
    allowed = lineup.names(config, device)
    chosen = [name for name in allowed if args.all or name in lineup.ALWAYS]
    if args.variants:
        chosen = lineup.choose(args.variants, allowed)
    shape = shape_of(config, args.frames, args.dims, args.lengths)
    kind = f"train_step_{args.config.stem}_{shape.lengths}"
    record = records.Growing(kind, device, args.record) if args.record else None
    body: dict[str, Any] = {"config": args.config.stem, "workload": workload(config, shape, dtype)}

    def keep(facts: dict[str, Any]) -> None:
        body.update(facts)
        if record:
            record.write(body)

    dataset = random_dataset(config, shape, BATCHES * config.train.batch_size)
    heats = Heats(config, dataset, args.seeds, args.runs, device, dtype, end, keep)
    heats.keep()
    if record:
        print(f"recording to {record.path}", flush=True)
    code = 0
    with entry.stopping():
        try:
            heats.run(chosen)
            if not args.no_engine:
                measure_engine(heats)
        except KeyboardInterrupt:
            code = 130
    heats.keep()
    print(render(body))
    if record:
        print(record.path)
    return code or int(any(name == ENGINE or name in lineup.OF_OURS for name in body["excluded"]))


def measure_engine(heats: Heats) -> None:
    """What DeepSpeed's engine adds to a step, if there is time left."""
    if heats.over:
        heats.facts["skipped"][ENGINE] = "no time left"
        print(f"{ENGINE}: skipped, no time left", flush=True)
        return
    try:
        heats.facts[ENGINE] = overhead(heats.config, heats.dataset, heats.runs, heats.device)
    except Exception as error:
        heats.exclude(ENGINE, error)
    heats.keep()


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which step is measured on what."""
    parser.add_argument("--config", required=True, type=Path, help="a config file; its data file need not be there")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, model.width=80")
    parser.add_argument("--batch", type=int, metavar="N", help="in place of the config's train.batch_size")
    parser.add_argument(
        "--lengths", choices=LENGTHS, help="whose samples' (default: the data set's); full: all T frames"
    )
    parser.add_argument("--frames", type=int, metavar="T", help="of the longest sample (default: the data set's)")
    parser.add_argument("--dims", metavar="L,A,V", help="feature widths (default: the data set's)")
    parser.add_argument("--precision", choices=list(DTYPES), help="default: what the config trains in here")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: OMP_NUM_THREADS, or all)")
    parser.add_argument(
        "--record",
        type=Path,
        nargs="?",
        const=records.FOLDER,
        metavar="DIR",
        help="append a record to those in a folder (bench/results/speed)",
    )


def set_up(args: argparse.Namespace) -> tuple[Config, torch.device, torch.dtype]:
    """The config, where and in which precision it is measured, in a process like a training's."""
    batch = [f"train.batch_size={args.batch}"] if args.batch else []
    config = load_config(args.config, args.set + batch)
    prepare_process(config)
    torch.use_deterministic_algorithms(False)  # what training pays for it is the same for all, but CUDA graphs warn
    if args.threads:
        torch.set_num_threads(args.threads)
    placement = place(config)
    return config, placement.device, DTYPES[args.precision or placement.precision]


def workload(config: Config, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """What a record says about what was measured."""
    return {
        "method": config.method,
        "batch": config.train.batch_size,
        "frames": shape.frames,
        "lengths": shape.lengths,
        "mean frames": float(lengths_of(shape, BATCHES * config.train.batch_size).mean()),
        "dims": list(shape.dims),
        "dtype": str(dtype).removeprefix("torch."),
    }


def times_as_long(variants: Sequence[dict[str, Any]], unit: str = OURS) -> dict[str, float]:
    """How long each contender takes for one model, in units of another; empty without "ours".

    Those that had a heat of their own, in turns with "ours", are compared by their time in units of that.
    """
    of_ours = {v["name"]: v["step ms"]["p50"] / v["models"] for v in variants}
    if OURS not in of_ours:
        return {}
    in_units_of_ours = {v["name"]: of_ours[v["name"]] / v.get("ours ms", of_ours[OURS]) for v in variants}
    return {name: times / in_units_of_ours[unit] for name, times in in_units_of_ours.items()}


def render(body: dict[str, Any]) -> str:
    """Markdown: the contenders, and DeepSpeed's engine where it was measured."""
    ratios = times_as_long(body["variants"])
    stages = list(dict.fromkeys(stage for v in body["variants"] for stage in v["stages ms"]))
    header = ["variant", "samples/s", "ms", "p20 to p80", *stages, "operator calls", "launches", "peak MB", "J/1000"]
    rows = []
    for v in body["variants"]:
        q, split = v["step ms"], v["stages ms"]
        memory, joules = v.get("peak memory"), v.get("energy", {}).get("joules per 1000 samples")
        rows.append(
            [
                f"{v['name']} ({v['models']})" if v["name"] == SEEDS else v["name"],
                f"{v['samples per second']:,.0f}",
                f"{q['p50']:.3g}",
                f"{q['p20']:.3g} to {q['p80']:.3g}",
                *(f"{split[stage]:.3g}" if stage in split else tables.NONE for stage in stages),
                *(tables.NONE if v.get(key) is None else str(v[key]) for key in ("operator calls", "launches")),
                f"{memory['bytes'] / 1e6:.1f}" if memory else tables.NONE,
                tables.NONE if joules is None else f"{joules:.3g}",
                f"{ratios[v['name']]:.2f}" if ratios else tables.NONE,
            ]
        )
    text = tables.markdown_table([*header, "times as long as ours"], rows)
    for name, reason in {**body.get("excluded", {}), **body.get("skipped", {})}.items():
        text += f"\n{name}: {reason}\n"
    return text + "\n" + render_engine(body[ENGINE]) if ENGINE in body else text


def render_engine(overheads: dict[str, Any]) -> str:
    """Markdown: DeepSpeed's engine against the bare loop that does the same."""
    rows = [
        [e["name"], f"{e['step ms']['p50']:.3g}", f"{e['overhead ms']:+.2f}", f"{e['overhead %']:+.1f}"]
        for e in overheads["engines"]
    ]
    return tables.markdown_table(["DeepSpeed engine around ours", "ms", "more than the bare loop, ms", "%"], rows)


if __name__ == "__main__":
    entry.run(main)
