"""State that survives: resumable checkpoints.

`checkpoints/latest.json`, in the folder of a seed or of seeds that are trained together, names the one complete
checkpoint.
"""

from __future__ import annotations

import pickle
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fastmmkd.distributed import barrier, rank, world_size
from fastmmkd.errors import UserError
from fastmmkd.files import read_json, write_json
from fastmmkd.run_folder import LATEST_FILE


@dataclass
class Progress:
    """Where a seed's training stands, besides what DeepSpeed keeps (weights, optimiser, loss scale)."""

    epoch: int = 0
    """Epochs completed."""
    step: int = 0
    """Steps completed within the current epoch."""
    best: float | None = None
    """Selection metric of the exported model."""
    best_epoch: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    """Loss parts summed over this epoch's steps so far."""
    seconds: float = 0.0
    """Time spent in this epoch so far."""
    finished: bool = False


def furthest(seeds: Sequence[Progress]) -> Progress:
    """Where the seeds that go on stand, all at the same step; the one that stopped last where none goes on."""
    return max(seeds, key=lambda progress: (progress.epoch, progress.step))


def save_checkpoint(engine: Any, folder: Path, seeds: Sequence[Progress], global_step: int) -> None:
    """Save everything; the old checkpoint goes only when the new one is complete."""
    # No two states share a tag, so that a checkpoint is never written over: an epoch's last step comes before its end.
    at, ended = furthest(seeds), all(progress.finished for progress in seeds)
    tag = f"epoch_{at.epoch}_step_{at.step}" + ("_end" if ended else "")
    engine.save_checkpoint(str(folder), tag=tag, save_latest=False)
    barrier()
    if rank() == 0:
        stands = [asdict(progress) for progress in seeds]
        pointer = {"tag": tag, "world_size": world_size(), "step": global_step}
        write_json(folder / LATEST_FILE, pointer | (stands[0] if len(stands) == 1 else {"seeds": stands}))
        for other in folder.iterdir():
            if other.is_dir() and other.name != tag:
                shutil.rmtree(other)
    barrier()


def read_progress(folder: Path, seeds: int) -> tuple[list[Progress], dict[str, Any]] | None:
    """What `latest.json` says of that many seeds, or None where nothing was saved yet.

    Raises:
        UserError: not such a file, or of another number of seeds.
    """
    pointer = folder / LATEST_FILE
    if not pointer.exists():
        return None
    saved = read_json(pointer, "a checkpoint's latest.json")
    try:
        stands = saved.get("seeds", [saved])
        found = [Progress(**{name: stand[name] for name in Progress.__dataclass_fields__}) for stand in stands]
    except (AttributeError, KeyError, TypeError):
        raise UserError(f"{pointer}: not a checkpoint's latest.json; expected the keys of this version") from None
    if len(found) != seeds:
        raise UserError(f"{pointer}: a checkpoint of {len(found)} seeds; expected {seeds}, those of the group")
    return found, saved


def load_checkpoint(engine: Any, folder: Path, saved: dict[str, Any]) -> None:
    """Restore weights, optimiser and loss scale.

    Raises:
        UserError: it was written by another number of processes, or is damaged.
    """
    if saved["world_size"] != world_size():
        raise UserError(
            f"{folder}: written by {saved['world_size']} processes, this run has {world_size()}; "
            "resume with the same number"
        )
    path = folder / str(saved["tag"])
    try:
        found, _ = engine.load_checkpoint(str(folder), tag=saved["tag"])
    except UserError as error:
        raise UserError(f"{path}: {error}; remove {folder.parent} to train anew") from error
    except (AssertionError, OSError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError) as error:
        reason = str(error).partition("\n")[0] or "a file is missing"
        raise UserError(f"{path}: a damaged checkpoint ({reason}); remove {folder.parent} to train anew") from error
    if found is None:
        raise UserError(f"{path}: no such checkpoint; remove {folder.parent} to train this seed anew")
