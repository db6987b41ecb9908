"""Names and layout of a run's folder.

run.json                           what is run, on which data, and what on
run.lock                           locked, and naming who trains, while somebody does
deepspeed.log                      what DeepSpeed and torch print, in the first process
deepspeed.<rank>.log               and in each of the others
results.json, .md, .csv            what was reached; written last
curves.png, confusion.png
embedding.json, embedding.png      the map of representations, and its picture
seed_<s>/                          one seed, in the state of its last phase
    model.safetensors              its best model
    metrics.jsonl, tensorboard/    its records, one an epoch
    checkpoints/latest.json        names the folder beside it that the seed resumes from, and its files' hashes
    checkpoints/previous.json      the same of the one before, should that be damaged
    evaluation.json                the seed is finished
    teacher/                       a phase before it, named so, laid out alike
        teacher.json               that phase is finished
together_<s>/                      in place of their own checkpoints/, of seeds that are trained at once; s: the first
    group.json                     names them
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fastmmkd.errors import UserError
from fastmmkd.files import read_json

RUN_FILE = "run.json"
LOCK_FILE = "run.lock"
LOG_FILE = "deepspeed.log"
RESULTS_FILE, RESULTS_TEXT, RESULTS_SHEET = "results.json", "results.md", "results.csv"
CURVES_FILE, CONFUSION_FILE = "curves.png", "confusion.png"
EMBEDDING_FILE, EMBEDDING_PICTURE = "embedding.json", "embedding.png"

RUN_VERSION = 2
"""Of a run's folder, whose models and checkpoints mean the same. 1: positions counted from the first padding."""

MODEL_FILE = "model.safetensors"
JOURNAL_FILE, TENSORBOARD_FOLDER = "metrics.jsonl", "tensorboard"
CHECKPOINTS_FOLDER, LATEST_FILE, PREVIOUS_FILE = "checkpoints", "latest.json", "previous.json"
EVALUATION_FILE = "evaluation.json"

GROUP_FILE = "group.json"


def log_of_rank(run: Path, rank: int) -> Path:
    """Where a process of a run writes what DeepSpeed and torch print: a file each, for hosts share no end of a file."""
    return run / (f"deepspeed.{rank}.log" if rank else LOG_FILE)


def seed_directory(run: Path, seed: int) -> Path:
    """Where a run keeps one seed."""
    return run / f"seed_{seed}"


def together_directory(run: Path, first_seed: int) -> Path:
    """Where a run keeps the resumable state of seeds that are trained at once."""
    return run / f"together_{first_seed}"


def group_files(run: Path) -> list[Path]:
    """The `group.json` of every group of seeds that was begun together."""
    return sorted(run.glob(f"together_*/{GROUP_FILE}"))


def parts_of_a_run(folder: Path) -> list[Path]:
    """Folders of seeds and of groups, whether or not there is a `run.json` beside them."""
    return sorted(folder.glob("seed_*")) + sorted(folder.glob("together_*"))


def files_of_a_run(run: Path) -> list[Path]:
    """Everything that lies in a run's folder itself, and all below its seeds and groups."""
    return [*run.glob("*"), *(path for part in parts_of_a_run(run) for path in part.rglob("*"))]


def has_checkpoint(run: Path) -> bool:
    """Whether there is anything to go on from."""
    return any(path.name == LATEST_FILE for path in files_of_a_run(run))


def forget_unsaved(run: Path) -> None:
    """Remove what a run has written if there is no checkpoint to go on from, so that another can begin in its folder.

    Its log stays.
    """
    if not has_checkpoint(run):
        for part in parts_of_a_run(run):
            shutil.rmtree(part, ignore_errors=True)
        (run / RUN_FILE).unlink(missing_ok=True)


def is_evaluated(directory: Path) -> bool:
    """Whether a seed is finished."""
    return (directory / EVALUATION_FILE).exists()


def phase_marker(name: str) -> Path:
    """What marks a phase before a seed's last as finished, relative to the seed's folder: `teacher/teacher.json`."""
    return Path(name) / f"{name}.json"


def seeds_with_model(run: Path, seeds: Iterable[int]) -> list[int]:
    """Those of a run's seeds that have an exported model."""
    return [seed for seed in seeds if (seed_directory(run, seed) / MODEL_FILE).exists()]


def read_record(run: Path) -> dict[str, Any]:
    """A run's `run.json`: among others its config, the hash of its data and its precision.

    Raises:
        UserError: missing, or not such a file.
    """
    record = read_json(run / RUN_FILE, "a training run's run.json")
    wanted = {"config": dict, "data_hash": str, "precision": str}
    if not isinstance(record, dict) or not all(isinstance(record.get(key), kind) for key, kind in wanted.items()):
        raise UserError(f"{run / RUN_FILE}: not a training run's run.json; expected the keys {', '.join(wanted)}")
    if record.get("version") != RUN_VERSION:
        raise UserError(
            f"{run / RUN_FILE}: of version {record.get('version')}, expected {RUN_VERSION}: positions count from a "
            "sample's first real frame now, so that its models would predict something else; train it anew"
        )
    return record
