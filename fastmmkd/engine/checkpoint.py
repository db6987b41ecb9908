"""State that survives: resumable checkpoints.

`checkpoints/latest.json`, in the folder of a seed or of seeds that are trained together, names the newest checkpoint
and the SHA-256 of each of its files; `previous.json` does so for the one before, which is gone back to where the newest
is damaged.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, NonNegativeFloat, TypeAdapter, ValidationError

from fastmmkd.distributed import barrier, everywhere, gather_objects, rank, world_size
from fastmmkd.engine.meeting import is_lost
from fastmmkd.errors import CannotWrite, UserError
from fastmmkd.files import flush, read_json, sha256, write_json, write_text
from fastmmkd.run_folder import LATEST_FILE, PREVIOUS_FILE

Count = Annotated[int, Field(ge=0, lt=2**31)]
STRICTLY = ConfigDict(strict=True, allow_inf_nan=False)


@dataclass
class Progress:
    """Where a seed's training stands, besides what DeepSpeed keeps (weights, optimiser, loss scale)."""

    __pydantic_config__ = STRICTLY
    epoch: Count = 0
    """Epochs completed."""
    step: Count = 0
    """Steps completed within the current epoch."""
    best: float | None = None
    """Selection metric of the exported model."""
    best_epoch: Count = 0
    sums: dict[str, float] = field(default_factory=dict)
    """Loss parts summed over this epoch's steps so far."""
    seconds: NonNegativeFloat = 0.0
    """Time spent in this epoch so far."""
    finished: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """What `latest.json` says of a checkpoint."""

    __pydantic_config__ = STRICTLY
    tag: Annotated[str, Field(pattern=r"^\w+$")]
    """The folder beside it."""
    world_size: Annotated[Count, Field(ge=1)]
    """Processes that wrote it."""
    step: Count
    """Steps that were done, of all epochs."""
    files: Annotated[dict[str, str], Field(min_length=1)]
    """Name -> SHA-256."""
    seeds: Annotated[list[Progress], Field(min_length=1)]


CHECKPOINT: TypeAdapter[Checkpoint] = TypeAdapter(Checkpoint)


def furthest(seeds: Sequence[Progress]) -> Progress:
    """Where the seeds that go on stand, all at the same step; the one that stopped last where none goes on."""
    return max(seeds, key=lambda progress: (progress.epoch, progress.step))


def save_checkpoint(engine: Any, folder: Path, seeds: Sequence[Progress], global_step: int) -> None:
    """Save everything; the two checkpoints before go only when the new one is complete and on the disk.

    Raises:
        CannotWrite: some process cannot; the checkpoints before are as they were.
    """
    # No two states share a tag, so that a checkpoint is never written over: an epoch's last step comes before its end.
    at, ended = furthest(seeds), all(progress.finished for progress in seeds)
    tag = f"epoch_{at.epoch}_step_{at.step}" + ("_end" if ended else "")
    files = engine.checkpoint_engine
    files.failure, files.written = None, ()
    if not folder.parent.exists():  # DeepSpeed would make it anew
        files.failure = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
    else:
        engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    if not everywhere(files.failure is None, engine.device):
        if rank() == 0:
            shutil.rmtree(folder / tag, ignore_errors=True)
        reason = files.failure.strerror if files.failure else "another process"
        raise CannotWrite(f"{folder / tag}: cannot save this checkpoint ({reason})")
    # Another host's file may be missing in a list of the folder for a while, but not when it is asked for.
    names = {name for of_process in gather_objects(files.written) for name in of_process}
    if rank() == 0:
        for written in (folder / tag, folder):
            flush(written)
        stands = [asdict(progress) for progress in seeds]
        said = {"tag": tag, "world_size": world_size(), "step": global_step}
        names |= {file.name for file in (folder / tag).iterdir()}
        said["files"] = {name: sha256(folder / tag / name) for name in sorted(names)}
        kept = {tag}
        if (folder / LATEST_FILE).exists():
            write_text(folder / PREVIOUS_FILE, (folder / LATEST_FILE).read_text(encoding="utf-8"))
            kept.add(read_json(folder / LATEST_FILE, "a checkpoint's latest.json").get("tag"))
        write_json(folder / LATEST_FILE, said | {"seeds": stands})
        for other in folder.iterdir():
            if other.is_dir() and other.name not in kept:
                shutil.rmtree(other)
    barrier()


def find_checkpoint(folder: Path, seeds: int, device: Any, say: Callable[[str, str], None]) -> Checkpoint | None:
    """The newest checkpoint of that many seeds that is whole, or None where nothing was saved yet.

    Args:
        folder: where they lie.
        seeds: of the group.
        device: what processes ask each other on.
        say: told, with a style, where it is not the newest of all.

    Raises:
        UserError: there are checkpoints and none is whole, or it is of another number of seeds.
    """
    named = [folder / name for name in (LATEST_FILE, PREVIOUS_FILE) if (folder / name).exists()]
    damage: list[str] = []
    for file in named:
        checkpoint, problem = None, "another process cannot read it"
        try:
            checkpoint = read_checkpoint(file)
            check_files(folder, checkpoint)
        except UserError as error:
            checkpoint, problem = None, str(error)
        if everywhere(checkpoint is not None, device) and checkpoint:
            if len(checkpoint.seeds) != seeds:
                raise UserError(
                    f"{file}: a checkpoint of {len(checkpoint.seeds)} seeds; expected {seeds}, those of the group"
                )
            if damage:
                at = furthest(checkpoint.seeds)
                say(f"{damage[0]}: going on from the one before, of epoch {at.epoch}, step {at.step}", "yellow")
            if rank() == 0 and file.name == PREVIOUS_FILE:  # it is the newest now
                write_text(folder / LATEST_FILE, file.read_text(encoding="utf-8"))
            return checkpoint
        damage.append(problem)
    if damage:
        raise UserError(f"{damage[0]}; remove {folder.parent} to train anew")
    return None


def read_checkpoint(file: Path) -> Checkpoint:
    """What `latest.json` says.

    Raises:
        UserError: not such a file.
    """
    saved = read_json(file, f"a checkpoint's {file.name}")
    try:
        # Earlier versions put a single seed's progress beside the rest, its `step` in place of that of all epochs.
        return CHECKPOINT.validate_json(json.dumps(saved if "seeds" in saved else saved | {"seeds": [saved]}))
    except (TypeError, ValidationError):
        raise UserError(f"{file}: not a checkpoint's {file.name}; expected the keys of this version") from None


def check_files(folder: Path, checkpoint: Checkpoint) -> None:
    """Hold the files of a checkpoint to their hashes (about a second per GB).

    Raises:
        UserError: one is missing, or is not what was written.
    """
    path = folder / checkpoint.tag
    for name, digest in checkpoint.files.items():
        try:
            damaged = sha256(path / name) != digest
        except OSError as error:
            raise UserError(f"{path}: a damaged checkpoint ({name}: {error.strerror})") from None
        if damaged:
            raise UserError(f"{path}: a damaged checkpoint ({name} is not what was written)")


def load_checkpoint(engine: Any, folder: Path, checkpoint: Checkpoint) -> None:
    """Restore weights, optimiser and loss scale.

    Any number of processes goes on with a checkpoint of ZeRO 0, which each of them holds whole; the numbers are those
    of a run with that many from the start, up to rounding.

    Raises:
        UserError: another number of processes wrote it under ZeRO 1 or 2, or it is of another optimiser or model.
    """
    divided = engine.zero_optimization_stage() > 0 or any("optim_states" in name for name in checkpoint.files)
    if divided and checkpoint.world_size != world_size():
        number = checkpoint.world_size
        launcher = f"deepspeed --num_gpus {number}" if number > 1 else "python"
        raise UserError(
            f"{folder}: ZeRO 1 and 2 divide the optimiser among processes: {number} wrote this, not "
            f"{world_size()}; resume with {launcher} train.py --config ... --resume"
        )
    path = folder / checkpoint.tag
    try:
        loaded, _ = engine.load_checkpoint(str(folder), tag=checkpoint.tag)
    except UserError as error:
        raise UserError(f"{path}: {error}; remove {folder.parent} to train anew") from error
    except (AssertionError, OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        if is_lost(error):
            raise
        reason = str(error).partition("\n")[0] or "a file is missing"
        raise UserError(f"{path}: a damaged checkpoint ({reason}); remove {folder.parent} to train anew") from error
    if loaded is None:
        raise UserError(f"{path}: no such checkpoint; remove {folder.parent} to train anew")
