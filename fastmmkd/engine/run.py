"""A run: every seed trained, evaluated as the papers do, and written down."""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastmmkd.blocks import Config
from fastmmkd.data.dataset import Dataset
from fastmmkd.data.single_label import single_labelled
from fastmmkd.data.training_file import read_data
from fastmmkd.distributed import barrier, rank, world_size
from fastmmkd.engine import teachers
from fastmmkd.engine.agenda import Agenda
from fastmmkd.engine.checks import as_begun, check_teacher, former_record
from fastmmkd.engine.device import Placement, place, prepare_process, refuse_absent, start_deepspeed, warnings_to
from fastmmkd.engine.groups import SeedGroup, begin, plan_groups, reopen
from fastmmkd.engine.interfaces import choose_interface
from fastmmkd.engine.interruption import InterruptionWatch
from fastmmkd.engine.lock import RunLock
from fastmmkd.engine.meeting import all_or_none, differing, losses_named, meet, require_alike
from fastmmkd.engine.phases import Phase, begin_phase, phases_of
from fastmmkd.engine.seed_evaluation import evaluation_to_json, read_evaluation
from fastmmkd.engine.session import Session
from fastmmkd.engine.shared_folder import share_folder
from fastmmkd.engine.step import graph_mode
from fastmmkd.engine.telemetry import Terminal, note_in
from fastmmkd.engine.trainer import Trainer
from fastmmkd.engine.world import is_first, set_world
from fastmmkd.errors import CannotWrite, Interrupted, UserError
from fastmmkd.evaluation.results import SeedEvaluation
from fastmmkd.files import remove_stale, write_json
from fastmmkd.methods.method import Network
from fastmmkd.ops import OPERATIONS, explain, extension
from fastmmkd.predictor import load
from fastmmkd.provenance import PACKAGES, code_hash, commit, device_name, package_version, python_version
from fastmmkd.run_folder import (
    EVALUATION_FILE,
    RUN_FILE,
    RUN_VERSION,
    files_of_a_run,
    forget_unsaved,
    has_checkpoint,
    log_of_rank,
    seed_directory,
)
from fastmmkd.run_results import write_run_results


def train_run(config: Config, output: Path, resume: bool, teacher: Path | None = None) -> Path:
    """Train every seed of a config, evaluate, and write the result set into `output`.

    Args:
        config: the run.
        output: its folder; holds `run.json`, the results, `deepspeed.log` and one `seed_<s>` folder per seed.
        resume: continue what is there; finished seeds are kept, or go on where `train.epochs` are more than they were.
        teacher: reuse the teachers of this run, or this one teacher, instead of training them.

    Raises:
        UserError: a missing data file, an existing run without `resume`, a run of another config or data, one that
            another process trains, a teacher that does not fit, a setting that DeepSpeed refuses. A new run that ends
            before its first checkpoint leaves the folder free for the corrected one.
        Interrupted: a signal asked to stop; everything is saved.
    """
    set_world()
    meet(config.train.timeout_seconds)
    with all_or_none():
        check_teacher(config, teacher)
        prepare_process(config)
        placement = place(config)
        refuse_absent(placement.device)
        dataset = single_labelled(read_data(Path(config.data.path)), config.task, config.data.ambiguous)
    share_folder(output)
    config = as_begun(config, output)
    hosts = require_alike(_alike(config, placement, dataset))
    notes = placement.note, differing("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS"))
    log_file = log_of_rank(output, int(os.environ["RANK"]))
    with (
        InterruptionWatch() as watch,
        warnings_to(log_file),
        RunLock(output) as lock,
        losses_named(config.train.timeout_seconds, log_file),
    ):
        choose_interface()
        deepspeed = start_deepspeed(placement, log_file)
        session = Session(config, placement, deepspeed, dataset, Terminal(quiet=not is_first()), watch, log_file)
        is_new = not (output / RUN_FILE).exists()
        with all_or_none():
            if teacher:
                for seed in config.train.seeds:  # before anything is written
                    if not teachers.has_teachers(config, seed_directory(output, seed)):
                        teachers.find(config, dataset, seed, teacher)
            unlocked = _open_run(lock, output, config, placement, dataset, resume, hosts) if is_first() else None
        try:
            _train(session, output, teacher, [unlocked, *notes])
        except CannotWrite as error:
            raise CannotWrite(f"{error}; {_what_is_kept(output)}") from error
        except Interrupted:
            note_in(log_file, "interrupted; everything is saved")
            raise
        finally:
            if is_new and is_first():
                forget_unsaved(output)
    return output


def _what_is_kept(output: Path) -> str:
    """What to say where a run can write no more."""
    if not (output / RUN_FILE).exists():
        return f"{output} is gone, and what it held"
    if not has_checkpoint(output):
        return "nothing was saved before"
    return "what was saved before is kept: continue with --resume once it can be written"


def _train(session: Session, output: Path, teacher: Path | None, found: list[str | None]) -> None:
    """Train and evaluate what is left of a run that was opened; `found`: what is to be said before."""
    config, placement, dataset = session.config, session.placement, session.dataset
    notes = _slowness(placement), graph_mode(config, placement)[1], _end_of_schedule(config, dataset)
    for note in (*found, *notes):
        if note:
            session.say(note, "yellow")
    session.say(
        f"{config.method} on {dataset.source} ({config.task.name}), {placement.precision} on {placement.device}, "
        f"{world_size()} process{'es' if world_size() > 1 else ''}, seeds {', '.join(map(str, config.train.seeds))}"
        f" -> {output}",
    )
    if teacher:
        _reuse_teachers(session, output, teacher)
    groups = plan_groups(config, output)
    session.agenda = Agenda(config, dataset, groups)
    barrier()
    evaluated = {seed: evaluation for group in groups for seed, evaluation in _train_group(session, group, output)}
    if rank() == 0:
        evaluations = [evaluated[seed] for seed in config.train.seeds]
        write_run_results(output, load(output), dataset, evaluations, session.console)


def _slowness(placement: Placement) -> str | None:
    """What to say where operations run their definitions although nobody asked for it."""
    example = torch.empty(0, dtype=placement.dtype, device=placement.device)
    choice = explain("cross_attention", example)
    if choice.provider != "reference" or choice.reason.startswith("forced"):
        return None
    return f"operations run in plain PyTorch, several times slower: {choice.reason} (fastmmkd env says more)"


def _end_of_schedule(config: Config, dataset: Dataset) -> str | None:
    """What to say where the learning rate's schedule is over before the training is, as in a run that was prolonged."""
    scheduler = config.deepspeed.get("scheduler") or {}
    last = scheduler.get("params", {}).get("total_num_steps")
    steps = config.train.epochs * (len(dataset.splits["train"]) // config.train.batch_size)
    if last is None or last >= steps:
        return None
    return f"deepspeed.scheduler.params.total_num_steps: the learning rate's schedule ends at step {last} of {steps}"


def _open_run(
    lock: RunLock,
    output: Path,
    config: Config,
    placement: Placement,
    dataset: Dataset,
    resume: bool,
    hosts: list[str],
) -> str | None:
    """Lock the run and write `run.json`, or check that the one that is there belongs to the same run.

    Returns:
        What is to be said about the lock.
    """
    note = lock.take()
    remove_stale(files_of_a_run(output))
    _check_or_write(output / RUN_FILE, config, placement, dataset, resume, hosts)
    return note


def _check_or_write(
    path: Path, config: Config, placement: Placement, dataset: Dataset, resume: bool, hosts: list[str]
) -> None:
    resumed: list[dict[str, Any]] = []
    former = former_record(config, path.parent, resume, dataset.content_hash)
    if former:
        if former["precision"] != placement.precision:
            raise UserError(
                f"{path}: --resume in {placement.precision} of a run in {former['precision']}: resume on a device like "
                "the one it was started on"
            )
        groups = plan_groups(config, path.parent)  # refuses what cannot go on in this way
        if former["config"]["train"]["epochs"] < config.train.epochs:
            reopen(groups)
        earlier = former.get("resumed")
        resumed = [*(earlier if isinstance(earlier, list) else []), _session(placement, hosts)]
    first = former if resumed else _session(placement, hosts)
    identity = {
        "version": RUN_VERSION,
        "config": config.model_dump(mode="json"),
        "data_hash": dataset.content_hash,
        "data_source": dataset.source,
    }
    write_json(
        path, identity | {key: value for key, value in first.items() if key not in identity} | {"resumed": resumed}
    )


def _alike(config: Config, placement: Placement, dataset: Dataset) -> dict[str, Any]:
    """What must be the same in all processes of a run."""
    session = _session(placement, [])
    config_hash = hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:12]
    alike = ("commit", "versions", "python", "device", "precision", "operations")
    return {
        f"the content of {config.data.path}": dataset.content_hash,
        "the config's hash": config_hash,
        "the code's hash": code_hash(),
        # First what decides the operations, for whoever has to set it.
        **{name: os.environ.get(name) for name in ("FASTMMKD_PROVIDER", "FASTMMKD_ISA")},
        **{name: session[name] for name in alike},
        "the CPU's instruction set": extension.build_info().get("instruction set"),
    }


def _session(placement: Placement, hosts: list[str]) -> dict[str, Any]:
    """What a run was started, or resumed, on; the host of each process."""
    example = torch.empty(0, dtype=placement.dtype, device=placement.device)
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit(),
        "versions": {name: package_version(name) for name in PACKAGES},
        "python": python_version(),
        "device": device_name(placement.device),
        "precision": placement.precision,
        "operations": {op: explain(op, example).provider for op in OPERATIONS},
        "note": placement.note,
        "deepspeed": {key: value for key, value in placement.deepspeed.items() if key != "steps_per_print"},
        "world_size": world_size(),
        "hosts": hosts,
        "threads": torch.get_num_threads(),
    }


def _reuse_teachers(session: Session, output: Path, source: Path) -> None:
    """Copy a teacher to every seed that has none; from then on the run needs `source` no more."""
    if rank() == 0:
        for seed in session.config.train.seeds:
            directory = seed_directory(output, seed)
            if not teachers.has_teachers(session.config, directory):
                teachers.reuse(session.config, session.dataset, seed, directory, source)
                session.say(f"seed {seed}: takes the teacher of {source}")
    barrier()


def _train_group(session: Session, group: SeedGroup, output: Path) -> list[tuple[int, SeedEvaluation]]:
    """Train the seeds of a group and evaluate them one by one; what was finished before is read back."""
    folders = dict(zip(group.seeds, group.directories, strict=True))
    best_epochs: dict[int, int] = {}
    before = {seed: read_evaluation(session, seed, directory) for seed, directory in folders.items()}
    if not all(before.values()):
        begin(group)
        best_epochs = dict(zip(group.seeds, _train_phases(session, group), strict=True))
    evaluations = []
    for seed, directory in folders.items():
        if evaluation := before[seed]:
            session.say(f"seed {seed}: finished before")
        else:
            session.say(f"seed {seed}: evaluating the epoch {best_epochs[seed]} model")
            started = time.monotonic()
            evaluation = _evaluate(session, seed, output)
            session.agenda.end_evaluation(time.monotonic() - started)
            if rank() == 0:
                write_json(directory / EVALUATION_FILE, evaluation_to_json(evaluation))
        evaluations.append((seed, evaluation))
    return evaluations


def _train_phases(session: Session, group: SeedGroup) -> list[int]:
    """Train a group to the end: the epoch of each seed's exported model."""
    config, dataset, placement = session.config, session.dataset, session.placement
    *before, last = phases_of(config)
    earlier: dict[str, Network] = {}
    for spec in before:
        if all(teachers.is_finished(spec, directory) for directory in group.directories):
            for seed in group.seeds:
                session.say(f"seed {seed}: its {spec.name} is finished")
        else:
            _fit(session, begin_phase(spec, config, dataset, group, earlier))
            teachers.finish(spec, config, dataset, group)
        earlier[spec.name] = teachers.load(spec, config, dataset, group, earlier, placement.device, placement.dtype)
    return _fit(session, begin_phase(last, config, dataset, group, earlier))


def _fit(session: Session, phase: Phase) -> list[int]:
    """Train a phase to its end: the best epoch of each seed.

    Raises:
        Interrupted: a signal asked to stop; the state is saved.
    """
    trainer = Trainer(session, phase)
    try:
        trainer.fit()
    finally:
        trainer.close()
    if session.watch.agreed(session.placement.device, at_agreement=True):
        raise Interrupted
    return [progress.best_epoch for progress in trainer.progress]


def _evaluate(session: Session, seed: int, output: Path) -> SeedEvaluation:
    """The exported model of a seed on the test split."""
    predictor = load(output, seed, str(session.placement.device))
    evaluator = predictor.evaluator(session.dataset.splits["test"], str(session.dataset.path))
    evaluation = evaluator.evaluate(predictor.module, seed)
    return replace(evaluation, at_floor=teachers.phases_at_floor(session.config, seed_directory(output, seed)))
