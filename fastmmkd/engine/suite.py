"""`fastmmkd suite`: several configs, each trained on every seed, and one report over all of them."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fastmmkd.blocks import Config
from fastmmkd.config import command_overrides, load_config, read_config
from fastmmkd.data.single_label import single_labelled
from fastmmkd.data.training_file import read_data, read_data_header
from fastmmkd.engine.checks import check_fit
from fastmmkd.errors import Interrupted, UserError
from fastmmkd.evaluation.commands import papers_asked_for
from fastmmkd.evaluation.folds import folders
from fastmmkd.run_folder import RUN_FILE, is_evaluated, seed_directory

if TYPE_CHECKING:
    from fastmmkd.evaluation.report import AgainstPapers


CONFIGS = Path("configs")
"""Where the shipped configs are, of a checkout that one is in."""
CONTROLS = ("+ missing training", "masked")
"""Rows of ablation tables that give a system what ours have: training on missing versions, masks of what is missing."""


@dataclass(frozen=True)
class Member:
    """One run among several."""

    name: str
    """What the report calls it."""
    config: Config
    folder: Path
    teacher: Path | None = None
    """A run of the same teachers: they are taken from there where it has trained them for every seed."""
    variant: str | None = None
    """The row of its method's ablation table that it is; None for the full method."""
    fold: str = ""
    """Which of several folds it is trained on; its folder lies in one that holds them all, which the report reads."""

    @property
    def title(self) -> str:
        return f"{self.name}, {self.fold}" if self.fold else self.name

    @property
    def reported(self) -> Path:
        """The folder that the report reads."""
        return self.folder.parent if self.fold else self.folder


def run_suite(args: argparse.Namespace) -> int:
    """Train what is not trained yet (finished seeds are kept), then write the report."""
    common = command_overrides(args.set, args.data, args.seeds, args.together)
    if bool(args.config) == bool(args.paper):
        raise UserError("suite: expected either --config, or --paper with the name of a data set, such as mosi")
    files: dict[str, Path] = {}
    for file in args.config or configs_of(args.paper):
        if file.stem in files:
            folder = args.out / file.stem
            raise UserError(f"--config {files[file.stem]} {file}: both would go to {folder}; expected other file names")
        files[file.stem] = file
    overrides = {
        name: [*shared_schedule(file), *common] if args.optim == "shared" else common for name, file in files.items()
    }
    members = [Member(name, load_config(file, overrides[name]), args.out / name) for name, file in files.items()]
    if args.controls:
        members = [of for m in members for of in [m, *controls(m, files[m.name], overrides[m.name])]]
    if args.folds:
        members = on_folds(members, args)
    train_and_report(members, args.out, papers_asked_for(args))
    return 0


def configs_of(data: str) -> list[Path]:
    """`configs/<method>_<data>.json` of every method that has one.

    Raises:
        UserError: there is none.
    """
    files = sorted(CONFIGS.glob(f"*_{data}.json"))
    files = [file for file in files if read_config(file, []).get("method") == file.stem.removesuffix(f"_{data}")]
    if not files:
        raise UserError(f"--paper {data}: there is no {CONFIGS}/<method>_{data}.json here; expected --config FILE ...")
    return files


def controls(member: Member, file: Path, common: Sequence[str]) -> list[Member]:
    """The rows of its method's ablation table that are the same system under other terms: `CONTROLS`."""
    from fastmmkd.methods import METHODS

    rows = METHODS[member.config.method].ablations
    return [
        Member(
            f"{member.name} {row}",
            load_config(file, [*common, *rows[row]]),
            member.folder.with_name(f"{member.name}_{slug(row)}"),
            variant=row,
        )
        for row in CONTROLS
        if row in rows
    ]


def shared_schedule(file: Path) -> list[str]:
    """The overrides that give `<method>_<data>.json` the schedule of HRLF's config for the same data, beside it.

    That is its batch, epochs (all of them, in every phase), optimiser, warm-up and clipping: the paper, the newest,
    trains what it compares with under one schedule. Precision and ZeRO stay the config's own.

    Raises:
        UserError: there is no such file, or another name.
    """
    from fastmmkd.methods import METHODS

    *_, newest = (name for name, method in METHODS.items() if not method.compared)
    own = read_config(file)
    data = file.stem.removeprefix(f"{own.get('method')}_")
    if data == file.stem:
        raise UserError(f"--optim shared: {file}: expected a file named <method>_<data>.json")
    config = load_config(file.with_name(f"{newest}_{data}.json"))
    train: dict[str, object] = {"batch_size": config.train.batch_size, "epochs": config.train.epochs, "patience": None}
    engine = {key: config.deepspeed.get(key) for key in ("optimizer", "scheduler", "gradient_clipping")}
    teacher: dict[str, object] = {"epochs": None, "patience": None} if own.get("teacher") else {}
    blocks = {"train": train, "deepspeed": engine, "teacher": teacher}
    return [f"{block}.{key}={json.dumps(value)}" for block, values in blocks.items() for key, value in values.items()]


def on_folds(members: Sequence[Member], args: argparse.Namespace) -> list[Member]:
    """Every member on every fold.

    Raises:
        UserError: `--data` besides, fewer than two folds, or two whose names are the same; a member's folder that holds
            a run by itself, or runs on other folds.
    """
    if args.data:
        raise UserError("--folds: the folds are the data, expected no --data")
    names = [fold.stem for fold in args.folds]
    if len(names) < 2 or len(set(names)) < len(names):
        raise UserError(f"--folds {' '.join(map(str, args.folds))}: expected two or more files of different names")
    of_folds = []
    for member in members:
        if (member.folder / RUN_FILE).exists():
            raise UserError(f"{member.folder}: holds a run of its own; expected another --out for runs on folds")
        if others := sorted(folder.name for folder in folders(member.folder) if folder.name not in names):
            raise UserError(
                f"{member.folder}: holds a run on {others[0]}, too; expected it among --folds, or another --out"
            )
        for fold in args.folds:
            data = member.config.data.model_copy(update={"path": str(fold)})
            config = member.config.model_copy(update={"data": data})
            of_folds.append(replace(member, config=config, folder=member.folder / fold.stem, fold=fold.stem))
    return of_folds


def slug(name: str) -> str:
    """A row's folder name: `"w/o L_fea"` -> `"without_l_fea"`."""
    return re.sub(r"\W+", "_", name.replace("w/o", "without")).strip("_").lower()


def train_and_report(members: Sequence[Member], out: Path, papers: AgainstPapers | None = None) -> None:
    """Train every member where it is not trained yet, write the report into `out` and print its headline tables.

    Published rows are shown as `papers` says; the variants are the members'.

    A member that fails, for example because its loss diverges, does not keep the others from being trained; one that
    lacks a fold is not in the report.

    Raises:
        UserError: data that cannot be read or do not fit (before training), or members that failed (after the report
            on the rest).
        Interrupted: a signal asked to stop; everything is saved, and the same call continues.
    """
    paths = list(dict.fromkeys(member.config.data.path for member in members))
    headers = {path: read_data_header(Path(path)) for path in paths}
    for member in members:
        path = member.config.data.path
        with _named(member):
            check_fit(member.config, headers[path].label_kind, headers[path].samples["train"], path)

    # Imported only now: what was refused so far did not need torch.
    from fastmmkd.engine.interruption import InterruptionWatch
    from fastmmkd.engine.run import train_run
    from fastmmkd.engine.session import check
    from fastmmkd.evaluation.commands import print_headline
    from fastmmkd.evaluation.report import report

    datasets = {path: read_data(Path(path)) for path in paths}
    for member in members:
        config = member.config
        with _named(member):
            check(config, single_labelled(datasets[config.data.path], config.task, config.data.ambiguous))
    for member in members:
        print(f"{member.title}: {plan(member)}", flush=True)
    failed: dict[str, UserError] = {}
    with InterruptionWatch() as watch:
        for member in members:
            try:
                train_run(member.config, member.folder, resume=True, teacher=trained_teachers(member))
            except UserError as error:
                failed[member.title] = error
                print(f"{member.title}: failed: {error}", flush=True)
            if watch.requested:  # while it was evaluated, when there was nothing to save
                raise Interrupted
    lost = {member.name for member in members if member.title in failed}  # without a fold, the others say less
    trained = list({member.name: member for member in members if member.name not in lost}.values())
    if trained:
        if papers is not None and any(member.variant for member in members):
            papers = replace(papers, variants=[member.variant for member in trained])
        sets, files = report([m.reported for m in trained], out, names=[m.name for m in trained], papers=papers)
        for runs in sets:
            print_headline(runs)
        print("\n".join(map(str, files)))
    if failed:
        reasons = "; ".join(f"{name}: {error}" for name, error in failed.items())
        raise UserError(f"{len(failed)} of {len(members)} runs failed and are not in the report: {reasons}")


@contextmanager
def _named(member: Member) -> Iterator[None]:
    """Say whose mistake it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{member.title}: {error}") from error


def trained_teachers(member: Member) -> Path | None:
    """The run to take a member's teachers from; None where it has to train its own."""
    from fastmmkd.engine.teachers import has_teachers

    source = member.teacher
    if source and all(has_teachers(member.config, seed_directory(source, seed)) for seed in member.config.train.seeds):
        return source
    return None


def plan(member: Member) -> str:
    """What is left of a member: `"done"`, `"2 of 3 seeds done"` or `"to do"`."""
    seeds = member.config.train.seeds
    done = sum(is_evaluated(seed_directory(member.folder, seed)) for seed in seeds)
    if done == len(seeds):
        return "done"
    return f"{done} of {len(seeds)} seeds done" if done else "to do"
