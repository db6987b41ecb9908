"""`fastmmkd data import | inspect | synth`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fastmmkd.data.dataset import DTYPES, Dataset
from fastmmkd.data.importers import FORMATS
from fastmmkd.errors import CannotWrite, UserError
from fastmmkd.files import make_directory
from fastmmkd.labels import SCORE_LIMITS
from fastmmkd.modalities import MODALITIES

if TYPE_CHECKING:
    from rich.console import Console


def register(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
) -> argparse._SubParsersAction[argparse.ArgumentParser]:
    """Add `data` and three of its commands; each sets `run`, a function from parsed arguments to an exit code.

    Returns:
        Where others add theirs.
    """
    data = subparsers.add_parser("data", help="import, inspect or synthesise data sets")
    commands = data.add_subparsers(dest="data_command", required=True, metavar="COMMAND")

    imported = commands.add_parser("import", help="turn a published data set into one HDF5 store")
    imported.add_argument(
        "--format",
        required=True,
        choices=list(FORMATS),
        help="the layout of SRC; samples: any, also .npz, only to be predicted, in one split or more, labelled or not",
    )
    imported.add_argument(
        "source", type=Path, metavar="SRC", help="pickle (mmsa, mult), folder (csd, mfn) or either (samples)"
    )
    imported.add_argument(
        "--resplit",
        type=int,
        metavar="SEED",
        help="pool all splits and divide them again, stratified by label sign and existing modalities; where samples "
        "of a video overlap or resemble each other, --by video",
    )
    imported.add_argument(
        "--by",
        choices=["sample", "video"],
        default="sample",
        help="with --resplit: divide samples, or videos with all their samples, which ids must name (default sample)",
    )
    imported.add_argument(
        "--labels",
        choices=list(SCORE_LIMITS),
        help="what its scores are: sentiment in [-3, 3], or in [-1, 1] as CH-SIMS and SIMSv2, with their metrics",
    )
    imported.add_argument(
        "--clip-labels", action="store_true", help="set scores beyond the limits to them, and count them"
    )
    _add_output(imported)
    imported.set_defaults(run=run_import)

    inspected = commands.add_parser("inspect", help="print a quality report of a store")
    inspected.add_argument("file", type=Path, metavar="FILE")
    inspected.set_defaults(run=run_inspect)

    synthetic = commands.add_parser("synth", help="make a synthetic data set shaped like a real one")
    synthetic.add_argument("--like", required=True, choices=["mosi", "mosei", "iemocap"])
    synthetic.add_argument(
        "--fraction", type=float, default=1.0, metavar="F", help="of the real set's size (default 1)"
    )
    synthetic.add_argument("--seed", type=int, default=0, metavar="S", help="default 0")
    _add_output(synthetic)
    synthetic.set_defaults(run=run_synth)
    return commands


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.h5", help="replaced if it is there")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32", help="of features on disk")


def run_import(args: argparse.Namespace) -> int:
    """`fastmmkd data import`: import, write, say what was written and cleaned."""
    from rich.console import Console
    from rich.markup import escape

    from fastmmkd.data.importers import import_dataset

    if args.resplit is not None and args.resplit < 0:
        raise UserError(f"--resplit {args.resplit}: expected a seed from 0")
    if args.by != "sample" and args.resplit is None:
        raise UserError(f"--by {args.by}: expected --resplit SEED with it, splits are the source's")
    make_directory(args.out.parent)  # before the long part, not after it
    console = Console()
    with console.status(escape(f"reading {args.source}")):
        dataset = import_dataset(args.format, args.source, args.resplit, args.by, args.labels, args.clip_labels)
    try:
        _write(console, dataset, args, only_predicted=args.format == "samples")
    except CannotWrite:
        raise
    except UserError as error:  # of the data: an id, a value that --dtype does not reach
        raise UserError(f"{args.source}: {error}") from None
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    """`fastmmkd data inspect`: check the hash and print the report."""
    from rich.console import Console

    from fastmmkd.data import store
    from fastmmkd.data.inspect import describe

    console = Console()
    console.print(describe(store.read_samples(args.file), console.options.ascii_only))
    return 0


def run_synth(args: argparse.Namespace) -> int:
    """`fastmmkd data synth`: generate and write."""
    from rich.console import Console

    from fastmmkd.data.synthetic import synthesize

    make_directory(args.out.parent)  # before the long part, not after it
    console = Console()
    with console.status(f"drawing a data set like {args.like}"):
        dataset = synthesize(args.like, args.fraction, args.seed)
    _write(console, dataset, args)
    return 0


def _write(console: Console, dataset: Dataset, args: argparse.Namespace, only_predicted: bool = False) -> None:
    from rich.markup import escape

    from fastmmkd.data import store

    with console.status(escape(f"writing {args.out}")):
        write = store.write_samples if only_predicted else store.write
        written = write(dataset, args.out, args.dtype)
    sizes = "/".join(str(len(split)) for split in written.splits.values())
    shapes = ", ".join(
        f"{m} {frames} x {width}"
        for m, frames, width in zip(MODALITIES, written.longest, written.feature_dims, strict=True)
    )
    for line in (
        f"wrote {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)",
        f"  {sizes} samples ({'/'.join(written.splits)}); longest x features: {shapes}",
        *(f"  {line}" for line in cleaned(written)),
    ):
        console.print(line, soft_wrap=True, highlight=False, markup=False)


def cleaned(dataset: Dataset) -> list[str]:
    """What the importer changed or missed, one line per finding; empty if nothing."""
    report, lines = dataset.report, []
    for m in MODALITIES:
        counts = [split.get(m, {}) for split in report.get("nonfinite", {}).values()]
        beyond = sum(kinds.get("beyond", 0) for kinds in counts)
        if total := sum(sum(kinds.values()) for kinds in counts) - beyond:
            lines.append(f"{m}: {total} NaN or infinite values set to 0")
        if beyond:
            lines.append(f"{m}: {beyond} values too large for single precision set to 0")
    if dataset.label_map != "identity":
        lines.append(f"labels stored as {dataset.label_map}")
    for i, m in enumerate(MODALITIES):
        absent = {name: int((~split.present[:, i]).sum()) for name, split in dataset.splits.items()}
        parts = [f"{n} of {len(dataset.splits[name])} samples of {name}" for name, n in absent.items() if n]
        if parts:
            lines.append(f"{m} is absent from {', '.join(parts)}")
    if repeated := report.get("ids", {}).get("repeated"):
        lines.append(f"{repeated} repeated ids renamed")
    if "resplit" in report:
        lines.append(
            f"re-split with seed {report['resplit']['seed']}" + " by video" * (report["resplit"].get("by") == "video")
        )
        if shared := report["resplit"]["videos_in_several_splits"]:
            lines.append(f"warning: {shared} videos now have segments in several splits; --by video keeps them whole")
    return [*lines, *report.get("notes", [])]
