"""The schema of a config file: one JSON object that says everything about a run.

Blocks: `method, data, model, missing, loss, train, eval, deepspeed`. The `deepspeed` block goes to DeepSpeed as it is.
Every mistake is one line that names the file, the key, what was expected, and the nearest valid key.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fastmmkd.errors import UserError
from fastmmkd.tasks import TASKS, Task

DEEPSPEED_KEYS = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
    "data_types",
    "zero_optimization",
    "gradient_clipping",
    "prescale_gradients",
    "gradient_predivide_factor",
    "sparse_gradients",
    "communication_data_type",
    "seq_parallel_communication_data_type",
    "steps_per_print",
    "wall_clock_breakdown",
    "dump_state",
    "memory_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "flops_profiler",
    "comms_logger",
    "tensorboard",
    "wandb",
    "csv_monitor",
    "activation_checkpointing",
    "checkpoint",
    "torch_autocast",
    "compile",
    "amp",
    "autotuning",
    "elasticity",
    "data_efficiency",
    "curriculum_learning",
    "aio",
    "disable_allgather",
    "graph_harvesting",
    "timers",
)
"""Top-level keys that DeepSpeed documents; only near misses of these are refused."""

DEEPSPEED_OPTIMIZERS = (
    *("adam", "adamw", "adagrad", "lamb", "lion", "muon", "muadam", "muadamw", "musgd"),
    *("onebitadam", "onebitlamb", "zerooneadam"),
)
"""What DeepSpeed knows by these names, in any case; every other name is a class of `torch.optim`."""

LARGEST_SEED = 2**31 - 1


class Block(BaseModel):
    """A part of the config: unknown keys are errors, and so are values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataBlock(Block):
    """What is trained on."""

    path: str
    """A store file (`fastmmkd data import` or `fastmmkd data synth` writes one)."""
    clip: float | None = Field(default=10.0, gt=0)
    """Standardised features are clipped to +- this many standard deviations (decision: trackers emit outliers)."""


class UmdfModel(Block):
    """UMDF's network."""

    width: int = Field(default=40, gt=0)
    """d, features per stream."""
    heads: int = Field(default=8, gt=0)
    mcim_layers: int = Field(default=4, gt=0)
    encoder_layers: int = Field(default=2, gt=0)
    """Layers of the transformer encoder after MCIM (decision; the paper leaves it open)."""
    mcim: bool = True
    """False: "w/o MCIM", self-attention in place of every crossmodal attention."""
    dfim: bool = True
    """False: "w/o DFIM", plain concatenation of the two streams."""
    attention_mask: Literal["missing", "padding", "none"] = "missing"
    """Which frames are masked as keys: padding and missing ones, padding only, or none (the papers read literally)."""

    @model_validator(mode="after")
    def _heads_divide(self) -> UmdfModel:
        if self.width % self.heads:
            divisors = [h for h in range(1, self.width + 1) if self.width % h == 0]
            raise ValueError(f"heads: {self.heads} does not divide width {self.width}; expected one of {divisors}")
        return self


class MissingBlock(Block):
    """What training drops."""

    enabled: bool = True
    """False: both versions are the complete sample (the baseline without missingness)."""
    p_max: float = Field(default=0.7, ge=0, le=1)
    """Each version's frame ratio is uniform in [0, p_max)."""
    ratio: Literal["independent", "exact"] = "independent"
    """Ratio p: independent drops with probability p, or exactly `round(p * frames)` frames."""


class UmdfLoss(Block):
    """Weights of `L_total = L_task + lambda_fea L_fea + lambda_logits L_logits`; 0 leaves a loss out ("w/o")."""

    lambda_fea: float = Field(default=1.0, ge=0)
    lambda_logits: float = Field(default=1.0, ge=0)


class TrainBlock(Block):
    """How long, how, on what."""

    task: str
    """One of the tasks in `fastmmkd.tasks`."""
    batch_size: int = Field(gt=1)
    """Samples per step over all processes. The rest of an epoch that does not fill a batch is left out."""
    epochs: int = Field(gt=0)
    seeds: tuple[int, ...] = (1,)
    select: str | None = None
    """Metric of the best checkpoint on the validation split; null = the task's."""
    select_on: Literal["missing", "complete"] = "missing"
    """Where it is taken: the mean over the seven conditions, or {l,a,v} alone as complete-modality methods do."""
    patience: int | None = Field(default=None, gt=0)
    """Stop after this many epochs without a better checkpoint; null = train all epochs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    log_every: int = Field(default=10, gt=0)
    """Steps between progress updates; a multi-process run also agrees on interruptions then."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _list_of_seeds(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("seeds")
    @classmethod
    def _distinct_seeds(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value or len(set(value)) != len(value) or min(value) < 0 or max(value) > LARGEST_SEED:
            raise ValueError(f"expected at least one seed, all different and from 0 to {LARGEST_SEED}")
        return value

    @field_validator("task")
    @classmethod
    def _known_task(cls, value: str) -> str:
        if value not in TASKS:
            raise ValueError(f"{value!r} is not a task; expected one of {', '.join(TASKS)}{nearest(value, TASKS)}")
        return value


class EvalBlock(Block):
    """The protocol: its masks depend on this seed and the sample only, never on the run."""

    seed: int = Field(default=2024, ge=0, le=LARGEST_SEED)
    batch_size: int = Field(default=256, gt=0)
    ratio: Literal["independent", "exact"] = "independent"
    sweep: tuple[float, ...] = tuple(round(0.1 * i, 1) for i in range(11))
    """Frame ratios of the sweep, all modalities present."""

    @field_validator("sweep", mode="before")
    @classmethod
    def _list_of_ratios(cls, value: Any) -> Any:
        return tuple(float(v) if isinstance(v, int) else v for v in value) if isinstance(value, list) else value

    @field_validator("sweep")
    @classmethod
    def _ratios(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= p <= 1 for p in value):
            raise ValueError("expected ratios between 0 and 1")
        return value


class Config(Block):
    """A whole run."""

    method: Literal["umdf"]
    data: DataBlock
    model: UmdfModel = UmdfModel()
    missing: MissingBlock = MissingBlock()
    loss: UmdfLoss = UmdfLoss()
    train: TrainBlock
    eval: EvalBlock = EvalBlock()
    deepspeed: dict[str, Any]

    @property
    def task(self) -> Task:
        return Task(self.train.task)

    @model_validator(mode="after")
    def _deepspeed_can_run(self) -> Config:
        problem = deepspeed_problem(self.deepspeed, self.train)
        if problem:
            raise ValueError(problem)
        return self


def deepspeed_problem(block: dict[str, Any], train: TrainBlock) -> str | None:
    """What is wrong with a `deepspeed` block that DeepSpeed itself would not say, or None."""
    for key in block:
        hint = difflib.get_close_matches(key, DEEPSPEED_KEYS, n=1, cutoff=0.8)
        if key not in DEEPSPEED_KEYS and hint:
            return f"deepspeed.{key}: unknown key; did you mean deepspeed.{hint[0]}?"
    for key in ("optimizer", "scheduler", "fp16", "bf16", "zero_optimization"):
        if not isinstance(block.get(key, {}), dict):
            return f"deepspeed.{key}: expected a block of keys, got {json.dumps(block[key])}"
    problem = _optimizer_problem(block)
    if problem:
        return problem
    for key in ("fp16", "bf16"):
        enabled = _section(block, key).get("enabled", False)
        if not isinstance(enabled, bool):
            return f"deepspeed.{key}.enabled: expected true or false, got {json.dumps(enabled)}"
    stage = _section(block, "zero_optimization").get("stage", 0)
    fp16, bf16 = (_section(block, key).get("enabled", False) for key in ("fp16", "bf16"))
    if stage not in (0, 1, 2):
        return f"deepspeed.zero_optimization.stage: expected 0, 1 or 2, got {json.dumps(stage)}"
    if fp16 and bf16:
        return "deepspeed.bf16.enabled: fp16 and bf16 are both on; expected one of them"
    if fp16 and stage == 0:
        return (
            "deepspeed.zero_optimization.stage: 0 with fp16 divides gradients by a loss scale that it never applied; "
            "expected 1 or 2"
        )
    if fp16 and train.device == "cpu":
        return "deepspeed.fp16.enabled: true with train.device=cpu; expected bf16 or neither (fp32) on a CPU"
    if block.get("gradient_accumulation_steps", 1) != 1:
        return "deepspeed.gradient_accumulation_steps: expected 1, the losses are defined on the whole mini-batch"
    if "train_micro_batch_size_per_gpu" in block:
        return (
            "deepspeed.train_micro_batch_size_per_gpu: expected it left out, it is train.batch_size over the number of "
            "processes"
        )
    given = block.get("train_batch_size", train.batch_size)
    if given != train.batch_size:
        return f"deepspeed.train_batch_size: {given}, but train.batch_size is {train.batch_size}; expected one of them"
    return None


def _optimizer_problem(block: dict[str, Any]) -> str | None:
    if "optimizer" not in block:
        return 'deepspeed.optimizer: missing; expected for example {"type": "Adam", "params": {"lr": 0.001}}'
    kind = block["optimizer"].get("type")
    if not isinstance(kind, str):
        return 'deepspeed.optimizer.type: missing; expected for example "Adam"'
    classes = [name for name, found in vars(torch.optim).items() if isinstance(found, type) and name != "Optimizer"]
    if kind.lower() in DEEPSPEED_OPTIMIZERS or kind in classes:
        return None
    return f"deepspeed.optimizer.type: {kind!r} is not an optimizer{nearest(kind, ('Lamb', 'Lion', *classes))}"


def _section(block: dict[str, Any], key: str) -> dict[str, Any]:
    value = block.get(key, {})
    return value if isinstance(value, dict) else {}


def load_config(path: Path | str, overrides: list[str] | None = None) -> Config:
    """Read and validate a config file.

    Args:
        path: a JSON file.
        overrides: `key.path=value` strings (`--set`); the value is JSON, or a plain string where it is not.

    Raises:
        UserError: one line that names the file, the key and what was expected.
    """
    path = Path(path)
    try:
        raw = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file{nearest(path.name, _json_names(path.parent))}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read this config file ({error.strerror})") from None
    except ValueError as error:  # of JSON or UTF-8
        raise UserError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object with the keys {', '.join(Config.model_fields)}")
    for override in overrides or []:
        _apply_override(raw, override)
    return parse_config(raw, str(path))


def command_overrides(assignments: list[str], data: str | None, seeds: str | None) -> list[str]:
    """The overrides that a command's `--set`, `--data` and `--seeds` stand for."""
    overrides = list(assignments)
    if data:
        overrides.append(f"data.path={json.dumps(data)}")
    if seeds:
        overrides.append(f"train.seeds=[{seeds}]")
    return overrides


def parse_config(raw: dict[str, Any], name: str = "config") -> Config:
    """Validate a config held in memory; `name` stands for the file in error messages."""
    try:
        return Config.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise UserError(f"{name}: {_first_problem(error)}") from None


def nearest(word: str, choices: Any) -> str:
    """`"; did you mean X?"` for the choice nearest to a word, or nothing."""
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""


def _json_names(folder: Path) -> list[str]:
    return [p.name for p in folder.glob("*.json")] if folder.is_dir() else []


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: expected KEY=VALUE, for example --set train.epochs=2")
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except ValueError:
        value = text
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {override}: {parent} is not a block of keys")
    node[last] = value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _first_problem(error: ValidationError) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        block: Any = Config
        for part in location[:-1]:
            block = block.model_fields[part].annotation
        prefix = ".".join([*location[:-1], ""])
        return f"{key}: unknown key; expected one of {', '.join(block.model_fields)}" + nearest(
            key, [prefix + name for name in block.model_fields]
        )
    if first["type"] == "missing":
        return f"{key}: missing"
    if first["type"] == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        return f"{key}.{message}" if key == "model" else f"{key}: {message}" if key else message
    expected = first["msg"].removeprefix("Input should be ")
    plainly = {"an object": "a block of keys", "a valid array": "a list", "a valid integer": "an integer"}
    expected = plainly.get(expected, expected).replace("a valid ", "a ")
    if expected.startswith(("greater", "less")):
        expected = f"a number {expected}"
    return f"{key}: expected {expected}, got {json.dumps(first['input'])}"
