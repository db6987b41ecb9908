"""`fastmmkd train | ablate | suite | profile`: their arguments. What needs torch is imported when a command runs."""

from __future__ import annotations

import argparse
import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from fastmmkd.evaluation.commands import add_paper_arguments


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands; each sets `run`, a function from parsed arguments to an exit code."""
    add_train_arguments(subparsers.add_parser("train", help="train and evaluate a config (as train.py does)"))

    parser = subparsers.add_parser("ablate", help="train a config's ablations and print the paper's ablation table")
    parser.add_argument("--config", required=True, type=Path, help="the full method's config file")
    _add_overrides(parser, "the config", "each row")
    add_paper_arguments(parser)
    parser.add_argument(
        "--only",
        action="append",
        metavar="ROW",
        help="train only this row, by its name or its folder's (may be repeated)",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="one run folder per row, and the report")
    parser.set_defaults(run=run_ablate)

    parser = subparsers.add_parser("suite", help="train several configs and report them side by side")
    parser.add_argument("--config", nargs="+", type=Path, metavar="FILE", help="config files")
    _add_overrides(parser, "the configs", "each config")
    add_paper_arguments(parser, of_configs=True)
    parser.add_argument(
        "--controls",
        action="store_true",
        help="besides, the compared systems trained on missing versions, and masked, where they are not so by default",
    )
    parser.add_argument(
        "--optim",
        choices=["own", "shared"],
        default="own",
        help="shared: all with the batch, epochs, optimiser and rates of the hrlf_<data>.json that lies beside them",
    )
    parser.add_argument(
        "--folds",
        nargs="+",
        type=Path,
        metavar="FILE",
        help="data files that are folds of one data set: each config is trained on each, and reported over all",
    )
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="one run folder per config, named as it, and the report"
    )
    parser.set_defaults(run=run_suite)

    parser = subparsers.add_parser("profile", help="train a few steps and say where their time goes")
    parser.add_argument("--config", required=True, type=Path, help="a config file")
    parser.add_argument("--data", metavar="FILE", help="data file in place of the config's data.path")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, train.batch_size=32")
    parser.add_argument("--steps", type=int, default=20, help="steps that count (default 20)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for trace.json (default: runs/profile_<config name>)")
    parser.set_defaults(run=run_profile)


def add_train_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of training."""
    parser.add_argument("--config", required=True, type=Path, help="a config file, for example configs/umdf_mosi.json")
    parser.add_argument("--data", metavar="FILE", help="data file in place of the config's data.path")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, train.epochs=2")
    parser.add_argument("--out", "--output", type=Path, metavar="DIR", help="run folder (default: runs/<config name>)")
    parser.add_argument("--resume", action="store_true", help="continue the run in the folder; finished seeds stay")
    parser.add_argument("--seeds", metavar="1,2,3", help="seeds in place of the config's train.seeds")
    parser.add_argument("--together", action="store_true", help="train the seeds at once: train.together=true")
    parser.add_argument("--teacher", type=Path, metavar="DIR", help="reuse the trained teachers of this run")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it
    parser.set_defaults(run=run_train)


def _add_overrides(parser: argparse.ArgumentParser, whose: str, each: str) -> None:
    parser.add_argument("--data", metavar="FILE", help=f"data file in place of {whose}'s data.path")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=f"override for {each}")
    parser.add_argument("--seeds", metavar="1,2,3", help=f"seeds in place of {whose}'s train.seeds")
    parser.add_argument("--together", action="store_true", help=f"train the seeds of {each} at once")


def run_train(args: argparse.Namespace) -> int:
    """Refuse what can be refused without torch, then train. Several processes meet before any of that."""
    from fastmmkd.config import command_overrides, parse_config, read_config, stated_timeout
    from fastmmkd.engine.checks import check_header, check_run, refuse_occupied
    from fastmmkd.engine.world import is_first, number_of_processes, set_world

    set_world()
    together: AbstractContextManager[None] = nullcontext()
    overrides = command_overrides(args.set, args.data, args.seeds, args.together)
    if number_of_processes() > 1:
        # Of what torch's store warns, such as names that cannot be looked up, nothing matters here.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        from fastmmkd.engine.meeting import all_or_none, meet

        meet(stated_timeout(args.config, overrides))
        together = all_or_none()
    output = args.out or Path("runs") / args.config.stem
    with together:
        raw = read_config(args.config, overrides)
        if is_first():
            refuse_occupied(output, args.resume)
        check_header(raw)
        config = parse_config(raw, str(args.config))
        check_run(config, output, args.resume, args.teacher)

    from fastmmkd.engine.run import train_run

    train_run(config, output, args.resume, args.teacher)
    return 0


def run_ablate(args: argparse.Namespace) -> int:
    from fastmmkd.engine.ablation import run_ablate

    return run_ablate(args)


def run_suite(args: argparse.Namespace) -> int:
    from fastmmkd.engine.suite import run_suite

    return run_suite(args)


def run_profile(args: argparse.Namespace) -> int:
    """Refuse what can be refused without torch, then profile."""
    from fastmmkd.config import command_overrides, parse_config, read_config
    from fastmmkd.engine.checks import check_data, check_header
    from fastmmkd.errors import UserError

    if args.steps < 1:
        raise UserError(f"--steps {args.steps}: expected 1 or more")
    raw = read_config(args.config, command_overrides(args.set, args.data, None))
    check_header(raw)
    config = parse_config(raw, str(args.config))
    check_data(config)

    from fastmmkd.engine.profile import profile_config

    profile_config(config, args.steps, args.out or Path("runs") / f"profile_{args.config.stem}")
    return 0
