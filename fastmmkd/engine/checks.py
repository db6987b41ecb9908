"""What is refused before a run begins, without DeepSpeed or the data themselves; some of it without torch too."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastmmkd.blocks import Config
from fastmmkd.data.training_file import read_data_header
from fastmmkd.engine.lock import refuse_busy
from fastmmkd.engine.world import is_first
from fastmmkd.errors import UserError
from fastmmkd.evaluation import metrics
from fastmmkd.run_folder import RUN_FILE, parts_of_a_run, read_record
from fastmmkd.tasks import TASKS, Task

FREE = (
    *("data.path", "data.ambiguous", "teacher.accept_floor"),
    *("train.gradients", "train.graph", "train.together", "train.timeout_seconds"),
)
"""Keys of a config that may change between two sessions of a run."""


def check_run(config: Config, output: Path, resume: bool, teacher: Path | None = None) -> None:
    """Refuse a run by its config, its folder and the header of its data file.

    The folder is judged by the first process alone: the others may not see it yet.

    Args:
        config, output, resume, teacher: as `fastmmkd.engine.run.train_run` takes them.

    Raises:
        UserError: what `check_teacher`, `check_data`, `former_record` and `refuse_busy` refuse.
    """
    if is_first():
        refuse_busy(output)
    check_teacher(config, teacher)
    content_hash = check_data(config)
    if is_first():
        former_record(config, output, resume, content_hash)


def check_header(raw: dict[str, Any]) -> None:
    """Refuse a config by what needs neither its method nor torch: the header of the data file.

    Args:
        raw: the config, not validated yet; what is odd about it is said later.

    Raises:
        UserError: no such data file, or a damaged one; fewer samples than a batch.
    """
    data, train = raw.get("data"), raw.get("train")
    path = data.get("path") if isinstance(data, dict) else None
    batch_size = train.get("batch_size") if isinstance(train, dict) else None
    if isinstance(path, str) and path and "\0" not in path:
        samples = read_data_header(Path(path)).samples["train"]
        if isinstance(batch_size, int) and samples < batch_size:
            raise _too_few(batch_size, samples, path)


def refuse_occupied(output: Path, resume: bool) -> bool:
    """Whether a folder holds a run, which is then to be continued.

    Raises:
        UserError: it holds a run and `resume` is false, or parts of one.
    """
    path, strays = output / RUN_FILE, parts_of_a_run(output)
    if strays and not path.exists():
        raise UserError(f"{output}: holds {strays[0].name} but no {path.name}; expected a run, or an empty folder")
    if path.exists() and not resume:
        raise UserError(f"{output}: already holds a run; expected --resume to continue it, or another --out")
    return path.exists()


def _too_few(batch_size: int, samples: int, path: Path | str | None) -> UserError:
    return UserError(
        f"train.batch_size: {batch_size}, but {path} has {samples} training samples; expected at most that, "
        f"--set train.batch_size={samples}"
    )


def check_teacher(config: Config, teacher: Path | None) -> None:
    """Refuse `--teacher` for a run that has no phase before its last."""
    from fastmmkd.methods import METHODS

    if teacher and len(METHODS[config.method].phases_of(config)) == 1:
        raise UserError(f"--teacher {teacher}: this run has no teacher phase; expected a config with a teacher block")


def check_data(config: Config) -> str:
    """Refuse a data file by its header: the content hash that it states.

    Raises:
        UserError: it is missing or damaged, or what `check_fit` refuses.
    """
    header = read_data_header(Path(config.data.path))
    check_fit(config, header.label_kind, header.samples["train"], config.data.path)
    return header.content_hash


def check_fit(config: Config, label_kind: str, samples: int, path: Path | str | None) -> None:
    """Refuse data that do not fit the config.

    Args:
        config: the run.
        label_kind, samples: of the data; training samples.
        path: the data file, for the message.

    Raises:
        UserError: labels of another kind than the task's, a metric that the task has not, fewer samples than a batch.
    """
    task, batch_size = config.task, config.train.batch_size
    if task.label_kind != label_kind:
        fitting = ", ".join(name for name in TASKS if Task(name).label_kind == label_kind)
        raise UserError(
            f"train.task: {task.name} needs {task.label_kind} labels, {path} has {label_kind} labels; "
            f"expected one of {fitting}"
        )
    if selection(config) not in metrics.selectable(task):
        valid = ", ".join(metrics.selectable(task))
        raise UserError(f"train.select: {selection(config)!r} is no metric of {task.name}; expected one of {valid}")
    if samples < batch_size:
        raise _too_few(batch_size, samples, path)


def former_record(config: Config, output: Path, resume: bool, content_hash: str) -> dict[str, Any]:
    """The `run.json` of the run that is to be continued; empty where a new one begins.

    Args:
        config, output, resume: the run that is asked for.
        content_hash: of its data file.

    Raises:
        UserError: the folder holds a run and `resume` is false, or the run of another config or data.
    """
    path = output / RUN_FILE
    if not refuse_occupied(output, resume):
        return {}
    former = read_record(output)
    for key, was, now in differences(former["config"], config.model_dump(mode="json")):
        more_seeds = key == "train.seeds" and isinstance(was, list) and all(seed in now for seed in was)
        longer = key == "train.epochs" and type(was) is int and was < now
        kept = key == "teacher.epochs" and now is None
        if key not in FREE and not (more_seeds or longer or kept):
            raise UserError(f"{path}: --resume with another config: {key} was {was}, is {now}")
    if former["data_hash"] != content_hash:
        raise UserError(f"{path}: --resume with other data: {config.data.path} is not the file this run was trained on")
    return former


def as_begun(config: Config, output: Path) -> Config:
    """A run's config with its teacher's epochs as a number: where the config has none, what it was begun with."""
    if config.teacher is None or config.teacher.epochs is not None:
        return config
    former = read_record(output)["config"].get("teacher") if (output / RUN_FILE).exists() else None
    epochs = former.get("epochs") if isinstance(former, dict) else None
    if type(epochs) is not int or epochs < 1:
        epochs = config.train.epochs
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"epochs": epochs})})


def differences(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The keys, `"model.width"`, in which two nested dictionaries differ, in the order of b, and both values."""
    for key in b | a:
        x, y, name = a.get(key), b.get(key), prefix + key
        if isinstance(x, dict) and isinstance(y, dict):
            yield from differences(x, y, name + ".")
        elif x != y:
            yield name, x, y


def selection(config: Config) -> str:
    """The metric that chooses a run's checkpoint.

    By default MAE for regression, else cross-entropy: small validation splits measure them more steadily than F1.
    """
    return config.train.select or (metrics.error(config.task) if config.task.is_regression else "loss")
