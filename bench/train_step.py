"""A whole training step, in several ways: `python -m bench.train_step --config configs/umdf_mosei.json`.

Missing draw from resident data, the teacher where there is one, forward, backward, clipping and Adam. First losses and
gradients are held to the reference before anything is timed; all contenders take turns in one process. Data are random,
complete and as long as the longest sample (`bench.workload`).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import contenders, entry, observe, power, records
from bench.agreement import assert_agreement
from bench.contenders import AUTOTUNED, COMPILED, GRAPHED, SEEDS, Contender
from bench.engine_overhead import overhead
from bench.rounds import WHOLE, Clock, quantiles, time_all
from bench.workload import BATCHES, Shape, random_dataset, shape_of
from fastmmkd.blocks import Config
from fastmmkd.config import load_config
from fastmmkd.engine.device import DTYPES, place, prepare_process
from fastmmkd.errors import UserError
from fastmmkd.evaluation import tables

ENERGY_SECONDS = 3.0
"""How long a contender runs while its power is sampled."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, record; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.train_step", description="Time a whole training step.")
    add_workload_arguments(parser)
    parser.add_argument("--runs", type=int, default=30, help="rounds that count (default 30)")
    parser.add_argument("--variants", metavar="A,B", help="of all contenders, only these")
    parser.add_argument("--seeds", type=int, default=5, metavar="S", help='models of "ours x seeds" (default 5)')
    parser.add_argument("--no-engine", action="store_true", help="leave DeepSpeed's engine out")
    args = parser.parse_args(argv)
    config, device, dtype = set_up(args)
    allowed = contenders.names(config, device)
    chosen = [name.strip() for name in args.variants.split(",")] if args.variants else allowed
    for name in chosen:
        if name not in allowed:
            raise UserError(f"--variants {name}: no such contender here; expected some of {', '.join(allowed)}")
    shape = shape_of(config, args.frames, args.dims)
    body = {"config": args.config.stem, "workload": workload(config, shape, dtype)}
    body |= measure(chosen, config, shape, args.seeds, args.runs, device, dtype)
    if not args.no_engine:
        body["engine"] = overhead(config, shape, args.runs, device)
    print(render(body))
    if args.record:
        print(records.append(f"train_step_{args.config.stem}", body, device))
    return 0


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """What says which step is measured on what."""
    parser.add_argument("--config", required=True, type=Path, help="a config file; its data file need not be there")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, model.width=80")
    parser.add_argument("--batch", type=int, metavar="N", help="in place of the config's train.batch_size")
    parser.add_argument("--frames", type=int, metavar="T", help="of every modality (default: the data set's)")
    parser.add_argument("--dims", metavar="L,A,V", help="feature widths (default: the data set's)")
    parser.add_argument("--precision", choices=list(DTYPES), help="default: what the config trains in here")
    parser.add_argument("--threads", type=int, metavar="N", help="of the CPU (default: OMP_NUM_THREADS, or all)")
    parser.add_argument("--record", action="store_true", help="append a record under bench/results/speed")


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
        "dims": list(shape.dims),
        "dtype": str(dtype).removeprefix("torch."),
    }


def measure(
    chosen: Sequence[str],
    config: Config,
    shape: Shape,
    seeds: int,
    runs: int,
    device: torch.device,
    dtype: torch.dtype,
) -> dict[str, Any]:
    """All contenders, after they have been found to agree."""
    dataset = random_dataset(config, shape, BATCHES * config.train.batch_size)
    built = {name: contenders.build(name, config, dataset, seeds, device, dtype) for name in chosen}
    started = time.monotonic()
    errors = assert_agreement(built, dtype)
    found = time_all(built, runs, device)
    variants = []
    for name, contender in built.items():
        samples = config.train.batch_size * contender.seeds
        whole = quantiles(found[name][WHOLE])
        variants.append(
            {
                "name": name,
                "models": contender.seeds,
                "runs": runs,
                "step ms": whole,
                "samples per second": 1e3 * samples / whole["p50"],
                "stages ms": {
                    stage: quantiles(seconds)["p50"] for stage, seconds in found[name].items() if stage != WHOLE
                },
                "gradient error": errors.get(name),
                **observed(name, contender),
                "energy": energy(contender, samples, whole["p50"] / 1e3),
            }
        )
    return {"seconds": time.monotonic() - started, "variants": variants}


def observed(name: str, contender: Contender) -> dict[str, Any]:
    """Operator calls, launches and memory of one step; None where they cannot be told."""

    def run() -> None:
        contender(0, Clock(contender.device))

    hidden = name in (COMPILED, AUTOTUNED, GRAPHED)  # the dispatcher does not see into graphs
    return {
        "operator calls": None if hidden else observe.operator_calls(run),
        "launches": observe.launches(run) if contender.device.type == "cuda" else None,
        "peak memory": observe.peak_memory(run, contender.device),
    }


def energy(contender: Contender, samples: int, seconds: float) -> dict[str, Any]:
    """What a contender's steps draw from the GPU; `{"absent": reason}` on a CPU."""
    if contender.device.type != "cuda":
        return dict(power.ABSENT)
    steps = max(1, round(ENERGY_SECONDS / seconds))
    with power.PowerSampler() as sampler:
        for i in range(steps):
            contender(i, Clock(contender.device))
        torch.cuda.synchronize()
    return sampler.summary(samples * steps)


def render(body: dict[str, Any]) -> str:
    """Markdown: the contenders, and DeepSpeed's engine where it was measured."""
    ours = next((v["step ms"]["p50"] / v["models"] for v in body["variants"] if v["name"] == contenders.OURS), None)
    stages = list(dict.fromkeys(stage for v in body["variants"] for stage in v["stages ms"]))
    header = ["variant", "samples/s", "ms", "p20 to p80", *stages, "operator calls", "launches", "peak MB", "J/1000"]
    rows = []
    for v in body["variants"]:
        q, split = v["step ms"], v["stages ms"]
        name = f"{v['name']} ({v['models']})" if v["name"] == SEEDS else v["name"]
        rows.append(
            [
                name,
                f"{v['samples per second']:,.0f}",
                f"{q['p50']:.3g}",
                f"{q['p20']:.3g} to {q['p80']:.3g}",
                *(f"{split[stage]:.3g}" if stage in split else tables.NONE for stage in stages),
                *(tables.NONE if v[key] is None else str(v[key]) for key in ("operator calls", "launches")),
                f"{v['peak memory']['bytes'] / 1e6:.1f}",
                f"{v['energy']['joules per 1000 samples']:.3g}" if "joules" in v["energy"] else tables.NONE,
                f"{q['p50'] / v['models'] / ours:.2f}" if ours else tables.NONE,
            ]
        )
    text = tables.markdown_table([*header, "times as long as ours"], rows)
    return text + "\n" + render_engine(body["engine"]) if "engine" in body else text


def render_engine(found: dict[str, Any]) -> str:
    """Markdown: DeepSpeed's engine against the bare loop that does the same."""
    rows = [
        [e["name"], f"{e['step ms']['p50']:.3g}", f"{e['overhead ms']:+.2f}", f"{e['overhead %']:+.1f}"]
        for e in found["engines"]
    ]
    return tables.markdown_table(["DeepSpeed engine around ours", "ms", "more than the bare loop, ms", "%"], rows)


if __name__ == "__main__":
    entry.run(main)
