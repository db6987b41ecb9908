"""The command line: `fastmmkd train|eval|predict|report|ablate|suite|profile|data|build|env`, and what `train.py` runs.

Each command imports what it needs when it runs; what can be refused without torch is refused before it is imported.
"""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from fastmmkd import __version__
from fastmmkd.data import commands as data_commands
from fastmmkd.engine import commands as engine_commands
from fastmmkd.engine.world import find_world, is_first, number_of_processes, own_name
from fastmmkd.errors import Interrupted, Lost, UserError
from fastmmkd.evaluation import commands as report_commands

LOST, USER_ERROR, INTERRUPTED = 1, 2, 130
UNTIL_SAID_S = 2.0
"""What a process that has nothing to say leaves to the one that has."""
WITH_RESUME = "continue with --resume"
OF_SEVERAL = ("train", "build", "env")
"""Commands that each of several processes may run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code (1 for lost processes, 2 for bad input, 130 when interrupted and saved)."""
    parser = argparse.ArgumentParser(
        prog="fastmmkd", description="Multimodal sentiment models that survive missing modalities."
    )
    parser.add_argument("--version", action="version", version=f"fastmmkd {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    engine_commands.register(commands)
    _register_masks(data_commands.register(commands))
    report_commands.register(commands)
    _register_eval(commands)
    _register_predict(commands)
    build = commands.add_parser("build", help="compile the kernels now, as the first training does where it must")
    build.set_defaults(run=_run_build)
    environment = commands.add_parser("env", help="versions, devices, and which implementation each operation uses")
    environment.set_defaults(run=_run_env)
    args = parser.parse_args(argv)
    is_train = args.command == "train"
    how_to_continue = WITH_RESUME if is_train else "run the same command again"
    again = _again("fastmmkd", argv, is_train)

    def command() -> int:
        _refuse_several(args.command)
        return _run(args, argv)

    return _guarded(command, how_to_continue, again)


def train_main(argv: Sequence[str] | None = None) -> int:
    """What `train.py` runs, alone or under the deepspeed launcher."""
    parser = argparse.ArgumentParser(prog="train.py", description="Train and evaluate a config.")
    engine_commands.add_train_arguments(parser)
    args = parser.parse_args(argv)
    return _guarded(lambda: _run(args, argv), WITH_RESUME, _again("train.py", argv, True))


def _again(program: str, argv: Sequence[str] | None, with_resume: bool) -> str:
    """The command of every process, as a launcher is to be given it to go on: `"train.py --config c.json --resume"`."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if not word.startswith("--local_rank")]
    if with_resume and "--resume" not in words:
        words.append("--resume")
    return shlex.join([program, *words])


def _refuse_several(command: str) -> None:
    """Refuse several processes of a command that is for one: each would write the same files.

    Raises:
        UserError: so it is, or nothing says where the first of them is.
    """
    os.environ.update(find_world())
    if command not in OF_SEVERAL and number_of_processes() > 1:
        started = f"{number_of_processes()} processes were started"
        raise UserError(f"fastmmkd {command}: {started}; expected one, only train takes several")


def _run(args: argparse.Namespace, argv: Sequence[str] | None) -> int:
    """Run a command whose arguments are not empty: as a path, nothing would stand for the folder one is in."""
    before = "the first argument"
    for argument in sys.argv[1:] if argv is None else argv:
        if "\0" in argument:
            raise UserError(f"{argument!a}: has a NUL character, which no name of a file can have")
        name, equals, value = argument.partition("=")
        if not argument or (name.startswith("--") and equals and not value):
            raise UserError(f"{name or before}: empty; expected a value")
        before = f"after {argument}"
    return args.run(args)


def _register_eval(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("eval", help="evaluate a trained run: seven conditions, sweep, tables and plots")
    parser.add_argument("--run", dest="folder", required=True, type=Path, metavar="DIR", help="the run's folder")
    parser.add_argument("--data", type=Path, metavar="FILE", help="data file in place of the run's")
    parser.add_argument("--out", type=Path, metavar="DIR", help="where to write (default: the run's folder)")
    parser.set_defaults(run=_run_eval)


def _run_eval(args: argparse.Namespace) -> int:
    from fastmmkd.config import parse_config
    from fastmmkd.data.training_file import read_data, read_data_header
    from fastmmkd.run_folder import RUN_FILE, read_record, seed_directory

    record = read_record(args.folder)
    config = parse_config(record["config"], str(args.folder / RUN_FILE))
    path, task = args.data or Path(config.data.path), config.task
    header = read_data_header(path)
    if header.label_kind != task.label_kind:
        raise UserError(f"{path}: has {header.label_kind} labels, the model was trained on {task.label_kind} labels")
    if header.content_hash != record["data_hash"] and not args.out:
        raise UserError(f"{path}: not the data of this run; expected --out DIR, to keep the run's own results")

    from rich.console import Console

    from fastmmkd.data.single_label import single_labelled
    from fastmmkd.engine.teachers import phases_at_floor
    from fastmmkd.predictor import load_all
    from fastmmkd.run_results import write_run_results

    predictors = load_all(args.folder)
    dataset = single_labelled(read_data(path), task, config.data.ambiguous)
    test = dataset.splits["test"]
    evaluations = []
    for p in predictors:
        evaluation = p.evaluator(test, str(path)).evaluate(p.module, p.seed)
        trained = phases_at_floor(config, seed_directory(args.folder, p.seed))
        evaluations.append(replace(evaluation, at_floor=trained))
    write_run_results(args.out or args.folder, predictors[0], dataset, evaluations, Console())
    return 0


def _register_masks(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("masks", help="export what is missing in the protocol's tests, for other programs")
    parser.add_argument("--config", required=True, type=Path, help="a config file: its data, and its eval block")
    parser.add_argument("--data", metavar="FILE", help="data file in place of the config's data.path")
    parser.add_argument("--out", required=True, type=Path, metavar="FILE.h5", help="replaced if it is there")
    parser.set_defaults(run=_run_masks)


def _run_masks(args: argparse.Namespace) -> int:
    from fastmmkd.config import command_overrides, load_config
    from fastmmkd.data.single_label import single_labelled
    from fastmmkd.data.training_file import read_data
    from fastmmkd.evaluation.masks import export
    from fastmmkd.files import make_directory

    config = load_config(args.config, command_overrides([], args.data, None))
    dataset = single_labelled(read_data(Path(config.data.path)), config.task, config.data.ambiguous)
    make_directory(args.out.parent)
    export(config, dataset, args.out)
    samples, ratios = len(dataset.splits["test"]), ", ".join(f"{p:g}" for p in config.eval.sweep)
    print(f"{args.out}: masks of {samples} test samples, all conditions, ratios {ratios}, seed {config.eval.seed}")
    return 0


def _register_predict(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = commands.add_parser("predict", help="predict every sample of a data file, complete or not, into a CSV")
    parser.add_argument("--run", dest="folder", required=True, type=Path, metavar="DIR", help="a trained run's folder")
    parser.add_argument(
        "--data",
        required=True,
        type=Path,
        metavar="FILE",
        help="a store, .npz, .pkl or a folder of .csd files; labels need not be there",
    )
    parser.add_argument("--out", required=True, type=Path, metavar="CSV", help="predictions, one row per sample")
    parser.add_argument("--seed", type=int, help="which of the run's seeds (default: the means of all)")
    parser.set_defaults(run=_run_predict)


def _run_predict(args: argparse.Namespace) -> int:
    from fastmmkd.data.importers.samples import load as read_samples
    from fastmmkd.run_folder import read_record

    read_record(args.folder)
    dataset = read_samples(args.data)

    from fastmmkd.predictor import load, load_all, write_predictions

    predictors = load_all(args.folder) if args.seed is None else [load(args.folder, args.seed)]
    rows = write_predictions(predictors, dataset, args.out)
    seeds = ", ".join(str(predictor.seed) for predictor in predictors)
    whose = f"seed {seeds}" if len(predictors) == 1 else f"seeds {seeds}, their means"
    print(f"{args.out}: {rows} predictions of {predictors[0].config.method}, {whose}")
    return 0


def _run_build(args: argparse.Namespace) -> int:
    from fastmmkd.ops import extension

    extension.ensure(again=True)
    if extension.missing:
        raise UserError(extension.missing)
    print(f"compiled with {extension.build_info()['compiler']}, for torch {extension.build_info()['torch']}")
    return 0


def _run_env(args: argparse.Namespace) -> int:
    from fastmmkd.environment import print_environment

    print_environment()
    return 0


def _guarded(command: Callable[[], int], how_to_continue: str, again: str) -> int:
    """Turn the exceptions that users are meant to see into one line and an exit code.

    Args:
        command: what to run.
        how_to_continue: after an interruption.
        again: the command that goes on where processes were lost.

    What a terminal cannot show (names in another script, one that knows ASCII alone) is written as escapes.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        return command()
    except UserError as error:
        _say_once(str(error))
        return USER_ERROR
    except OSError as error:  # a name that is too long, a pipe that is closed
        where = f"{error.filename}: " if error.filename else ""
        _say_once(f"{where}{error.strerror or error}")
        return USER_ERROR
    except Lost as error:
        _say(f"error: {own_name()}: {error}; to go on, start all processes again: {again}")
        return LOST
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except Interrupted:
        if is_first():
            _say(f"interrupted; everything is saved, {how_to_continue}")
        return INTERRUPTED


def _say_once(error: str) -> None:
    """Say an error, in the first process of those that have the same.

    Until the processes have met, the first one of each host speaks: what is wrong there the others cannot know.
    """
    meeting = sys.modules["fastmmkd.engine.meeting"].met() if "fastmmkd.engine.meeting" in sys.modules else None
    if meeting:
        prefix = meeting.prefix(error)
    else:
        prefix = "" if is_first() else f"{own_name()}: " if os.environ.get("LOCAL_RANK") == "0" else None
    if prefix is not None:
        for line in error.splitlines() or [""]:
            _say(f"error: {prefix}{line}")
    if meeting:
        meeting.leave()
    elif prefix is None:
        time.sleep(UNTIL_SAID_S)  # a launcher ends all processes with the first that ends


def _say(line: str) -> None:
    with suppress(OSError):  # nobody listens any more
        print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
