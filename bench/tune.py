"""Measure the Triton kernels' launch parameters on this GPU: `python -m bench.tune`.

Every candidate of a kernel is timed at the sizes and dtypes of `fastmmkd.testing.specimens`, samples being as long as
those of a data set (`--lengths`); what is fastest goes into
`kernels/launch_parameters.json`, into the rows of this GPU's architecture only, as soon as a kernel is done. All of it
takes an hour: `--main`, `--dtype` and `--seconds` take the most important part of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench import choices, entry
from bench.workload import LENGTHS
from fastmmkd.errors import UserError
from fastmmkd.files import read_json, write_json
from fastmmkd.kernels.parameters import TABLE, Parameters, architecture, trying
from fastmmkd.ops import operation, providers
from fastmmkd.testing.specimens import Make, Specimen, specimens

WORTH = 0.98
"""A candidate takes the default's place if it takes at most this share of its time."""

Timer = Callable[[Callable[[], Any]], float]
"""Runs a call and gives its seconds; infinity where it cannot be launched so."""
Choices = dict[str, dict[str, Parameters]]
"""Kernel -> bucket -> parameters."""


class Measured(NamedTuple):
    """A call's time with these parameters, as a share of its time with the defaults."""

    kernel: str
    bucket: str
    parameters: Parameters
    share: float


def main(argv: Sequence[str] | None = None) -> int:
    """Tune, write the table, print what was chosen; returns the exit code."""
    parser = entry.Parser(prog="python -m bench.tune", description="Measure launch parameters on this GPU.")
    choices.add_arguments(parser)
    parser.add_argument("--lengths", choices=LENGTHS, default="mosei", help="whose samples' (default: mosei's)")
    parser.add_argument("--milliseconds", type=float, default=100, metavar="N", help="of each timing (default 100)")
    args = parser.parse_args(argv)
    like = "" if args.lengths == "full" else args.lengths
    ops, dtypes, end = choices.operations(args), choices.precisions(args), choices.end(args)
    if not torch.cuda.is_available() or providers.INTERPRETED:
        raise UserError("no CUDA device to measure on; expected one, and TRITON_INTERPRET not set")
    device = torch.device("cuda", torch.cuda.current_device())
    dtypes = [x for x in dtypes if not providers.obstacle("triton", operation("missing_draw"), device, [x])]
    for op in ops:
        if time.monotonic() > end:
            print(f"{op}: skipped, no time left", flush=True)
            continue
        calls = [x for x in specimens() if x.op == op and (x.main or not args.main)]
        calls.sort(key=lambda x: not x.main)
        tune(calls, dtypes, device, partial(seconds, milliseconds=args.milliseconds), end, like)
    return 0


def tune(
    calls: Sequence[Specimen],
    dtypes: Sequence[torch.dtype],
    device: torch.device,
    timer: Timer,
    end: float,
    like: str = "",
) -> None:
    """Measure calls until `end`, put what is fastest into the table, and say it."""
    chosen = fastest(measure(calls, dtypes, str(device), timer, end, like))
    if chosen:
        write(TABLE, architecture(device), chosen)
    for kernel, buckets in chosen.items():
        for bucket, parameters in buckets.items():
            print(f"{kernel} {bucket}: " + ", ".join(f"{k}={v}" for k, v in parameters.items()), flush=True)


def seconds(call: Callable[[], Any], milliseconds: float = 100) -> float:
    """Median time of a call on the GPU, timed for about so long."""
    import triton

    try:
        return triton.testing.do_bench(call, milliseconds / 4, milliseconds, return_mode="median") / 1e3
    except (triton.OutOfResources, triton.CompilationError):
        return math.inf


def measure(
    calls: Iterable[Specimen],
    dtypes: Sequence[torch.dtype],
    device: str,
    timer: Timer,
    end: float = math.inf,
    like: str = "",
) -> Iterator[Measured]:
    """Every call of a module with candidates, timed with its default and with each candidate.

    At `end`, by `time.monotonic`, it stops; a call whose candidates were not all timed by then does not count.
    """
    for specimen in calls:
        candidates = getattr(specimen.module, "CANDIDATES", [])
        for dtype in dtypes if candidates else ():
            call = specimen.call(Make(dtype, device, like))
            timed, default = [], math.nan
            for candidate in ({}, *candidates):
                if time.monotonic() > end:
                    return
                with trying(candidate) as asked:
                    taken = timer(call)
                default = taken if not candidate else default
                for kernel, bucket, parameters in {(a.kernel, a.bucket): a for a in asked}.values():
                    timed.append(Measured(kernel, bucket, parameters | candidate, taken / default))
            yield from timed


def fastest(measured: Iterable[Measured]) -> Choices:
    """The best parameters of every kernel and bucket: by the geometric mean of the shares, for dtypes decide together.

    The default, which comes first, stays unless another takes at most `WORTH` of its time.
    """
    shares: dict[tuple[str, str], dict[tuple[tuple[str, int], ...], list[float]]] = {}
    for kernel, bucket, parameters, share in measured:
        shares.setdefault((kernel, bucket), {}).setdefault(tuple(parameters.items()), []).append(share)
    chosen: Choices = {}
    for (kernel, bucket), of_parameters in shares.items():
        means = {parameters: math.prod(values) ** (1 / len(values)) for parameters, values in of_parameters.items()}
        first, best = next(iter(means)), min(means, key=lambda parameters: means[parameters])
        chosen.setdefault(kernel, {})[bucket] = dict(best if means[best] <= WORTH else first)
    return chosen


def write(table: Path, name: str, chosen: Choices) -> None:
    """Put choices into the table's rows of the architecture `name`; what was not measured stays."""
    whole: dict[str, Choices] = read_json(table, "a table of launch parameters") if table.exists() else {}
    own = whole.setdefault(name, {})
    for kernel, buckets in chosen.items():
        own[kernel] = own.get(kernel, {}) | buckets
    write_json(table, whole)


if __name__ == "__main__":
    entry.run(main)
