"""Networks of finished phases, on disk: marked as finished, read back, checked, and taken from another run.

The file `<phase>/<phase>.json` of a seed says what its network fits: architecture, task and data.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from fastmmkd.blocks import Config
from fastmmkd.data.dataset import Dataset
from fastmmkd.distributed import barrier, rank
from fastmmkd.engine.checks import differences
from fastmmkd.engine.groups import SeedGroup
from fastmmkd.engine.phases import frozen, initialised, phases_of
from fastmmkd.errors import UserError
from fastmmkd.files import make_directory, read_json, replacing, write_json
from fastmmkd.methods.method import Earlier, Network, PhaseSpec
from fastmmkd.model_file import import_model, read_facts
from fastmmkd.nn.models import load_model, stack_models
from fastmmkd.run_folder import MODEL_FILE, RUN_VERSION, phase_marker, seed_directory


def identity(config: Config, dataset: Dataset) -> dict[str, Any]:
    """What a network shares with the runs that it can be used in: architecture, task, and what its inputs mean."""
    return {
        "method": config.method,
        "task": config.train.task,
        "model": config.model.model_dump(mode="json", exclude={"dropout"}),
        "standardise": config.data.standardise,
        "clip": config.data.clip,
        "feature_dims": list(dataset.feature_dims),
        "data_hash": dataset.content_hash,
        "version": RUN_VERSION,
    }


def is_finished(spec: PhaseSpec, directory: Path) -> bool:
    """Whether a seed is through with a phase that is not its last."""
    return (directory / phase_marker(spec.name)).exists()


def has_teachers(config: Config, directory: Path) -> bool:
    """Whether a seed is through with all phases before its last one."""
    return all(is_finished(spec, directory) for spec in phases_of(config)[:-1])


def finish(spec: PhaseSpec, config: Config, dataset: Dataset, group: SeedGroup) -> None:
    """Mark a phase of each seed as finished."""
    if rank() == 0:
        for seed, directory in zip(group.seeds, group.directories, strict=True):
            said = {"identity": identity(config, dataset), "at_floor": is_at_floor(directory / spec.name)}
            write_json(directory / phase_marker(spec.name), {"version": 1, "seed": seed} | said)
    barrier()


def is_at_floor(folder: Path) -> bool | None:
    """Whether the best model of a finished phase is no better than a constant prediction, on what it was chosen by.

    Args:
        folder: the phase's, which holds its `model.safetensors`.

    Returns:
        None where nothing says so: an earlier version has trained it, or its model is gone.
    """
    if not (folder / MODEL_FILE).exists():
        return None
    return {"true": True, "false": False}.get(read_facts(folder).get("at_floor", ""))


def phases_at_floor(config: Config, directory: Path) -> dict[str, bool | None]:
    """`is_at_floor` of each phase of a finished seed, by the phase's name."""
    *before, last = phases_of(config)
    return {spec.name: is_at_floor(directory / spec.name) for spec in before} | {last.name: is_at_floor(directory)}


def refuse_floor(spec: PhaseSpec, config: Config, folder: Path, said: dict[str, Any]) -> None:
    """Keep a student from learning from a constant.

    Args:
        spec: the phase that has trained the teacher.
        config: a run with a teacher.
        folder: a finished teacher's.
        said: what its marker says.

    Raises:
        UserError: it ended at the floor, or does not say, and the phase does not accept that.
    """
    at_floor = said.get("at_floor")
    if at_floor is False or spec.accept_floor(config):
        return
    why = "it ended at the floor, no better than a constant prediction, and has nothing to teach"
    if at_floor is None:
        why = f"its {spec.name}.json does not say at_floor, as an earlier version wrote it"
    accepting = ", or teacher.accept_floor=true" if config.teacher else ""
    raise UserError(
        f"{folder}: a student is not trained from this {spec.name}: {why}; expected one that trains (another weight or "
        f"learning rate, or --teacher){accepting}"
    )


def reuse(config: Config, dataset: Dataset, seed: int, directory: Path, source: Path) -> None:
    """Copy trained networks into a seed's folder, in place of those whose training was not finished.

    Raises:
        UserError: as `find`.
    """
    for spec, folder in find(config, dataset, seed, source):
        own = directory / spec.name
        if own.exists():
            shutil.rmtree(own)
        make_directory(own)
        with replacing(own / MODEL_FILE) as temporary:
            shutil.copyfile(folder / MODEL_FILE, temporary)
        write_json(directory / phase_marker(spec.name), _read(spec, folder) | {"source": str(folder)})


def find(config: Config, dataset: Dataset, seed: int, source: Path) -> list[tuple[PhaseSpec, Path]]:
    """The folders under `source` (`--teacher`) that hold fitting networks of the phases before a run's last.

    `source` is a run (each seed takes the networks of its own seed), or one network's folder (all seeds take it).

    Raises:
        UserError: there is none, or one of another architecture, task or data, or at the floor, or damaged.
    """
    teachers: list[tuple[PhaseSpec, Path]] = []
    earlier: dict[str, Network] = {}
    for spec in phases_of(config)[:-1]:
        name, file = spec.name, f"{spec.name}.json"
        of_run = seed_directory(source, seed) / name
        folder = next((f for f in (source, source / name, of_run) if (f / file).exists()), None)
        if folder is None:
            raise UserError(
                f"{source}: no trained {name} for seed {seed}; expected a run whose {of_run.relative_to(source)} holds "
                f"{file}, or such a folder itself"
            )
        said = _read(spec, folder)
        theirs = said.get("identity")
        if not isinstance(theirs, dict):
            raise UserError(f"{folder / file}: not a {name}'s {file}; expected the key identity")
        for key, has, wanted in differences(theirs, identity(config, dataset)):
            raise UserError(f"{folder}: this {name} does not fit the run: {key} is {has}, the run has {wanted}")
        refuse_floor(spec, config, folder, said)
        earlier[spec.name] = read(spec, config, dataset, folder, earlier)
        teachers.append((spec, folder))
    return teachers


def load(
    spec: PhaseSpec,
    config: Config,
    dataset: Dataset,
    group: SeedGroup,
    earlier: Earlier,
    device: torch.device,
    dtype: torch.dtype,
) -> Network:
    """The finished networks of a group, frozen.

    Raises:
        UserError: as `refuse_floor` and `read`.
    """
    folders = [directory / spec.name for directory in group.directories]
    for folder in folders:
        refuse_floor(spec, config, folder, _read(spec, folder))
    return frozen(stack_models([read(spec, config, dataset, folder, earlier) for folder in folders]), device, dtype)


def read(spec: PhaseSpec, config: Config, dataset: Dataset, folder: Path, earlier: Earlier) -> Network:
    """The network of a phase whose weights lie in a folder; `earlier`: those of the phases before it.

    Raises:
        UserError: its file is missing or damaged, or of another network.
    """
    parameters, _ = import_model(folder)
    network = initialised(spec, config, dataset, (0,), earlier).network
    try:
        load_model(network, parameters)
    except RuntimeError:
        raise UserError(f"{folder / MODEL_FILE}: the weights are not of the config's network") from None
    return network


def _read(spec: PhaseSpec, folder: Path) -> dict[str, Any]:
    said = read_json(folder / f"{spec.name}.json", f"a {spec.name}'s {spec.name}.json")
    return said if isinstance(said, dict) else {}
