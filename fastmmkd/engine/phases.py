"""What a run trains, one stretch after the other: a teacher on complete samples, then a student that learns from it.

A method without a teacher, or a network without distillation, has one phase. A seed's folder holds its last phase; the
teacher phase lies in `teacher/` below it, and `teacher/teacher.json` marks it as finished and says what it fits.
Seeds that are trained together go through each phase together.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fastmmkd.config import LARGEST_SEED, Config, MissingBlock
from fastmmkd.data.dataset import Dataset, Split
from fastmmkd.distributed import barrier, rank
from fastmmkd.engine.checkpoint import MODEL_FILE, import_model, read_facts
from fastmmkd.engine.device import Placement
from fastmmkd.engine.groups import Group
from fastmmkd.errors import UserError
from fastmmkd.evaluation.protocol import CONDITION_SCENARIOS, Scenario
from fastmmkd.files import make_directory, read_json, replacing, write_json
from fastmmkd.methods import Teacher, Trainable, build_network, build_student, build_teacher
from fastmmkd.nn.models import stack_models

COMPLETE = MissingBlock(enabled=False)
TEACHER_FOLDER = "teacher"
TEACHER_FILE = "teacher.json"
TEACHER_SEEDS = LARGEST_SEED + 1
"""Added to a seed for its teacher's initialisation: teacher and student do not start from the same weights. The sum
still fits into 32 bits, all that torch's generator takes of a seed."""


@dataclass(frozen=True)
class Phase:
    """One stretch of training."""

    name: Literal["", "teacher", "student"]
    """For people; empty where it is the only one."""
    module: Trainable
    """What is trained, see `fastmmkd.methods`; one model per seed of the group."""
    group: Group
    """Whom it trains; its folders are this phase's."""
    epochs: int
    patience: int | None
    missing: MissingBlock
    rows: torch.Tensor
    """`[n]` int64, the training samples it uses."""
    select_on: Literal["missing", "complete", "whole"]
    """Validation samples that the checkpoint is chosen on: see `TrainBlock.select_on`; whole = with all each has."""
    teacher: Teacher | None = None

    @property
    def scenarios(self) -> dict[str, Scenario]:
        """What the checkpoint is chosen on."""
        if self.select_on == "missing":
            return CONDITION_SCENARIOS
        return {"lav": Scenario((True, True, True), incomplete=self.select_on == "whole")}

    def title(self, whom: str, config: Config) -> str:
        """What people read about a seed or a group: `"hrlf seed 1 teacher"`."""
        return f"{config.method} {whom} {self.name}".rstrip()


def teacher_phase(config: Config, dataset: Dataset, group: Group) -> Phase:
    """The network on complete samples, in `teacher/` below each seed's folder.

    Args:
        config: a run with a teacher.
        dataset: what it trains on.
        group: whose teachers; a teacher's initialisation is its own.
    """
    assert config.teacher
    return Phase(
        "teacher",
        stack_models([build_teacher(config, dataset.feature_dims, TEACHER_SEEDS + seed) for seed in group.seeds]),
        group.below(TEACHER_FOLDER),
        config.teacher.epochs,
        config.teacher.patience,
        COMPLETE,
        torch.from_numpy(teacher_rows(config, dataset.splits["train"])),
        "whole" if config.teacher.incomplete_samples else "complete",
    )


def final_phase(config: Config, dataset: Dataset, group: Group, teacher: Teacher | None) -> Phase:
    """The students, or without teachers the networks by themselves, on missing versions."""
    build = build_student if teacher else build_network
    return Phase(
        "student" if teacher else "",
        stack_models([build(config, dataset.feature_dims, seed) for seed in group.seeds]),
        group,
        config.train.epochs,
        config.train.patience,
        config.missing,
        torch.arange(len(dataset.splits["train"])),
        config.train.select_on,
        teacher,
    )


def teacher_rows(config: Config, train: Split) -> np.ndarray:
    """`[n]` int64, the samples that the teacher trains on: the complete ones, or all."""
    assert config.teacher
    return np.arange(len(train)) if config.teacher.incomplete_samples else np.flatnonzero(train.present.all(axis=1))


def identity(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What a teacher has to have in common with a run to be reused: architecture, task, and what its inputs mean."""
    return {
        "method": config.method,
        "task": config.train.task,
        "model": config.model.model_dump(mode="json", exclude={"dropout"}),
        "standardise": config.data.standardise,
        "clip": config.data.clip,
        "feature_dims": list(dataset.feature_dims),
        "data_hash": dataset.content_hash,
    }


def has_teacher(directory: Path) -> bool:
    """Whether a seed's teacher phase is finished."""
    return (directory / TEACHER_FOLDER / TEACHER_FILE).exists()


def finish_teacher(config: Config, dataset: Dataset, group: Group) -> None:
    """Mark the teacher of each seed as finished."""
    if rank() == 0:
        for seed, directory in zip(group.seeds, group.directories, strict=True):
            folder = directory / TEACHER_FOLDER
            said = {"identity": identity(config, dataset), "at_floor": is_at_floor(folder)}
            write_json(folder / TEACHER_FILE, {"version": 1, "seed": seed} | said)
    barrier()


def is_at_floor(folder: Path) -> bool | None:
    """Whether the best model of a finished phase is no better than a constant prediction, on what it was chosen by.

    Args:
        folder: the phase's, which holds its `model.safetensors`.

    Returns:
        None where an earlier version, which did not compare, has trained it.
    """
    return {"true": True, "false": False}.get(read_facts(folder).get("at_floor", ""))


def phases_at_floor(config: Config, directory: Path) -> dict[str, bool | None]:
    """`is_at_floor` of each phase of a finished seed: `"teacher"` and `"student"`, or `"network"` where it is alone."""
    if config.teacher is None:
        return {"network": is_at_floor(directory)}
    return {"teacher": is_at_floor(directory / TEACHER_FOLDER), "student": is_at_floor(directory)}


def refuse_floor(config: Config, folder: Path, found: dict[str, Any]) -> None:
    """Keep a student from learning from a constant.

    Args:
        config: a run with a teacher.
        folder: a finished teacher's.
        found: what its `teacher.json` says.

    Raises:
        UserError: it ended at the floor, or does not say, and `teacher.accept_floor` is false.
    """
    assert config.teacher
    at_floor = found.get("at_floor")
    if at_floor is False or config.teacher.accept_floor:
        return
    why = "it ended at the floor, no better than a constant prediction, and has nothing to teach"
    if at_floor is None:
        why = f"its {TEACHER_FILE} does not say at_floor, as an earlier version wrote it"
    raise UserError(
        f"{folder}: a student is not trained from this teacher: {why}; expected one that trains (another weight or "
        "learning rate, or --teacher), or teacher.accept_floor=true"
    )


def reuse_teacher(config: Config, dataset: Dataset, seed: int, directory: Path, source: Path) -> None:
    """Copy a trained teacher into a seed's folder, in place of one whose training was not finished.

    Raises:
        UserError: as `find_teacher`.
    """
    folder, own = find_teacher(config, dataset, seed, source), directory / TEACHER_FOLDER
    if own.exists():
        shutil.rmtree(own)
    make_directory(own)
    with replacing(own / MODEL_FILE) as temporary:
        shutil.copyfile(folder / MODEL_FILE, temporary)
    found = read_json(folder / TEACHER_FILE, "a teacher's teacher.json")
    write_json(own / TEACHER_FILE, found | {"source": str(folder)})


def find_teacher(config: Config, dataset: Dataset, seed: int, source: Path) -> Path:
    """The folder under `source` (`--teacher`) that holds a fitting teacher.

    `source` is a run (each seed takes the teacher of its own seed), or one teacher's folder (all seeds take it).

    Raises:
        UserError: there is none, or one of another architecture, task or data, or at the floor, or damaged.
    """
    of_run = source / f"seed_{seed}" / TEACHER_FOLDER
    folder = next((f for f in (source, source / TEACHER_FOLDER, of_run) if (f / TEACHER_FILE).exists()), None)
    if folder is None:
        raise UserError(
            f"{source}: no trained teacher for seed {seed}; expected a run whose {of_run.relative_to(source)} holds "
            f"{TEACHER_FILE}, or such a folder itself"
        )
    found = read_json(folder / TEACHER_FILE, "a teacher's teacher.json")
    theirs = found.get("identity") if isinstance(found, dict) else None
    if not isinstance(theirs, dict):
        raise UserError(f"{folder / TEACHER_FILE}: not a teacher's {TEACHER_FILE}; expected the key identity")
    changed = _difference(theirs, identity(config, dataset))
    if changed:
        raise UserError(f"{folder}: this teacher does not fit the run: {changed}")
    refuse_floor(config, folder, found)
    read_teacher(config, dataset, folder)
    return folder


def load_teacher(config: Config, dataset: Dataset, group: Group, placement: Placement) -> Teacher:
    """The finished teachers of a group, frozen: evaluation mode, no gradients, the run's device and precision.

    Raises:
        UserError: as `refuse_floor` and `read_teacher`.
    """
    folders = [directory / TEACHER_FOLDER for directory in group.directories]
    for folder in folders:
        refuse_floor(config, folder, read_json(folder / TEACHER_FILE, "a teacher's teacher.json"))
    network = stack_models([read_teacher(config, dataset, folder) for folder in folders])
    return network.to(placement.device, placement.dtype).eval().requires_grad_(False)


def read_teacher(config: Config, dataset: Dataset, folder: Path) -> Teacher:
    """The teacher whose weights lie in a folder.

    Raises:
        UserError: its file is missing or damaged, or of another network.
    """
    parameters, _ = import_model(folder)
    network = build_teacher(config, dataset.feature_dims, seed=0)
    try:
        network.load_state_dict(parameters)
    except RuntimeError:
        raise UserError(f"{folder / MODEL_FILE}: the weights are not of the config's network") from None
    return network


def _difference(theirs: dict[str, Any], ours: dict[str, Any], prefix: str = "") -> str | None:
    """The first fact in which they differ, in words."""
    for key in ours | theirs:
        a, b, name = theirs.get(key), ours.get(key), prefix + key
        if isinstance(a, dict) and isinstance(b, dict):
            found = _difference(a, b, name + ".")
            if found:
                return found
        elif a != b:
            return f"{name} is {a}, the run has {b}"
    return None
