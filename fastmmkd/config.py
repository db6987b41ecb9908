"""The schema of a config file: one JSON object that says everything about a run.

Blocks: `method, data, model, missing, teacher, loss, train, eval, deepspeed`; `model` and `loss` are the method's own,
`teacher` is for the methods that have one. The `deepspeed` block goes to DeepSpeed as it is.
Every mistake is one line that names the file, the key, what was expected, and the nearest valid key.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from typing_extensions import Self

from fastmmkd.deepspeed_block import deepspeed_problem
from fastmmkd.errors import UserError, nearest
from fastmmkd.tasks import TASKS, Task

LARGEST_SEED = 2**31 - 1


class Block(BaseModel):
    """A part of the config: unknown keys are errors, and so are values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataBlock(Block):
    """What is trained on."""

    path: str
    """A store file (`fastmmkd data import` or `fastmmkd data synth` writes one)."""
    standardise: bool = True
    """Features are standardised by the training split's statistics (decision); false: they are taken as extracted."""
    clip: float | None = Field(default=10.0, gt=0)
    """Standardised features are clipped to +- this many standard deviations (decision: trackers emit outliers);
    null = not at all."""
    ambiguous: Literal["refuse", "drop"] = "refuse"
    """`emotions-4way` only: data in which a sample holds none of the emotions, or several, are refused; or such samples
    are left out of every split."""

    @model_validator(mode="after")
    def _clip_has_a_unit(self) -> Self:
        if self.clip is not None and not self.standardise:
            raise ValueError(f"clip: {self.clip} is in standard deviations; expected null where standardise is false")
        return self


class ModelBlock(Block):
    """What the networks of all methods have."""

    width: int = Field(default=40, gt=0)
    """d, features per stream."""
    heads: int = Field(default=8, gt=0)
    attention_mask: Literal["missing", "padding", "none"] = "missing"
    """Which frames are masked as keys: padding and missing ones, padding only, or none (the papers read literally)."""
    masked_layers: Literal["all", "first"] = "all"
    """Where `attention_mask: missing` masks the missing frames: in all layers, or in the first alone, where they hold
    nothing; from the second on they hold what attention put there (decision)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """After the embedding and on every residual branch, in training (no paper mentions dropout)."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            divisors = [h for h in range(1, self.width + 1) if self.width % h == 0]
            raise ValueError(f"heads: {self.heads} does not divide width {self.width}; expected one of {divisors}")
        return self


class UmdfModel(ModelBlock):
    """UMDF's network."""

    mcim_layers: int = Field(default=4, gt=0)
    encoder_layers: int = Field(default=2, gt=0)
    """Layers of the transformer encoder after MCIM (decision; the paper leaves it open)."""
    mcim: bool = True
    """False: "w/o MCIM", self-attention in place of every crossmodal attention."""
    dfim: bool = True
    """False: "w/o DFIM", plain concatenation of the two streams."""


class CorrkdModel(ModelBlock):
    """CorrKD's network, teacher and student alike."""

    encoder_layers: int = Field(default=4, gt=0)
    """Layers of each modality's transformer encoder (decision; the paper leaves it open)."""


class HrlfModel(ModelBlock):
    """HRLF's network, teacher and student alike."""

    encoder_layers: int = Field(default=4, gt=0)
    """Layers of each modality's transformer encoder (decision; the paper leaves it open)."""
    frf: bool = True
    """False: "w/o FRF", the joint representation is that of the modalities themselves, none is factorised."""

    @model_validator(mode="after")
    def _halves(self) -> Self:
        if self.width % 2:
            raise ValueError(f"width: {self.width}; expected an even number, Q_m and U_m have width / 2 each")
        return self


class MissingBlock(Block):
    """What training drops."""

    enabled: bool = True
    """False: every version is the complete sample (the baseline without missingness)."""
    p_max: float = Field(default=0.7, ge=0, le=1)
    """Each version's frame ratio is uniform in [0, p_max)."""
    ratio: Literal["independent", "exact"] = "independent"
    """Ratio p: independent drops with probability p, or exactly `round(p * frames)` frames."""


class UmdfLoss(Block):
    """Weights of `L_total = L_task + lambda_fea L_fea + lambda_logits L_logits`; 0 leaves a loss out ("w/o")."""

    lambda_fea: float = Field(default=1.0, ge=0)
    lambda_logits: float = Field(default=1.0, ge=0)


class CorrkdLoss(Block):
    """`L = L_task + lambda_scd L_SCD + lambda_cpd L_CPD + lambda_rcd L_RCD`; 0 leaves a loss out ("w/o")."""

    lambda_scd: float = Field(default=1.0, ge=0)
    lambda_cpd: float = Field(default=1.0, ge=0)
    lambda_rcd: float = Field(default=1.0, ge=0)
    eta: float = Field(default=1.2, gt=0)
    """Distance beyond which SCD no longer pushes different samples apart; unit vectors are at most 2 apart."""
    normalise: bool = True
    """SCD measures distances of H scaled to unit length (decision: raw H is about 10 long, no pair ever is below eta,
    and SCD's gradient drowns the task's); false: of H as it is (the paper read literally)."""
    reduction: Literal["mean", "sum"] = "mean"
    """SCD over pairs of samples: mean (decision), or the paper's sum, which grows with the square of the batch."""
    rcd: Literal["mutual-information", "kl"] = "mutual-information"
    """kl: "w/o RCD", KL divergence of the responses in its place (MSE for regression)."""
    statistics_width: int = Field(default=64, gt=0)
    """Hidden units of RCD's statistics networks (decision)."""
    prototypes: Literal[2, 3, 7] = 3
    """Regression only: classes that CPD bins the scores into."""
    global_batch: bool = True
    """SCD, CPD and RCD see the rows of all processes; false: those of their own only."""

    @model_validator(mode="after")
    def _eta_can_be_passed(self) -> Self:
        if self.normalise and self.eta > 2:
            raise ValueError(
                f"eta: {self.eta:g}, but unit vectors are at most 2 apart; expected at most 2, or normalise=false"
            )
        return self


class HrlfLoss(Block):
    """`L = L_task + lambda_frf L_FRF + lambda_hmi L_HMI + lambda_hal L_HAL + lambda_kl L_KL`; 0 leaves a loss out."""

    lambda_frf: float = Field(default=1.0, ge=0)
    lambda_hmi: float = Field(default=1.0, ge=0)
    lambda_hal: float = Field(default=1.0, ge=0)
    lambda_kl: float = Field(default=1.0, ge=0)
    frf_gradient: Literal["factors", "everything"] = "factors"
    """What L_FRF trains. factors (deviation): FRF's own MLPs and decoder, on Z as it is. everything: the modalities'
    encoders too, as the paper has it; L_FRF is least where no Z depends on its sample, and weight 1 ends there."""
    hmi_negatives: Literal["layer", "joined"] = "layer"
    """What HMI's marginal pairs are taken from. layer (decision): rows of one layer, H with H, H~ with H~. joined: all
    rows of a scale; half of the pairs then tell layers apart, and the bound rises on nothing else."""
    statistics_width: int = Field(default=64, gt=0)
    """Hidden units of HMI's statistics networks and of HAL's discriminators (decision)."""
    global_batch: bool = True
    """HMI sees the rows of all processes; false: those of its own only."""


class TeacherBlock(Block):
    """The teacher phase, which comes before the student's; batch, optimiser and task are the run's."""

    epochs: int = Field(gt=0)
    incomplete_samples: bool = False
    """True: samples that lack a modality train the teacher with what they have; false: they are left out."""
    patience: int | None = Field(default=None, gt=0)
    """Stop after this many epochs without a better checkpoint; null = train all epochs."""
    accept_floor: bool = False
    """True: a student learns even from a teacher whose best validation score is no better than a constant's."""


class TrainBlock(Block):
    """How long, how, on what."""

    task: str
    """One of the tasks in `fastmmkd.tasks`."""
    batch_size: int = Field(gt=1)
    """Samples per step over all processes. The rest of an epoch that does not fill a batch is left out."""
    epochs: int = Field(gt=0)
    seeds: tuple[int, ...] = (1,)
    together: bool = False
    """True: all seeds are trained at once in one process, as models that share nothing; the results are those of
    separate runs up to rounding. Each model's gradients are clipped by themselves, ZeRO is off, fp16 is refused."""
    select: str | None = None
    """Metric of the best checkpoint on the validation split; null = MAE for regression, else the loss."""
    select_on: Literal["missing", "complete"] = "missing"
    """Where it is taken: the mean over the seven conditions, or {l,a,v} alone as complete-modality methods do."""
    patience: int | None = Field(default=None, gt=0)
    """Stop after this many epochs without a better checkpoint; null = train all epochs."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    graph: Literal["auto", "off", "step", "fwdbwd"] = "auto"
    """CUDA graphs: "fwdbwd" replays forward and backward, "step" the update as well (torch's Adam in fp32 or bf16, ZeRO
    stage 0, or 1 in one process); "auto" is "step" where that can be, "fwdbwd" on other GPUs and "off" on a CPU. Steps
    stay eager where there is no graph to be had, in all processes alike, and a line says so."""
    gradients: bool = False
    """True: the journal has, per epoch, how hard each part of the loss pulls: its weight times `|dL_part / dH|` on the
    epoch's last batch, H being the joint representation (HRLF: the Z_m that it is made of)."""
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
    """A whole run. The methods' own classes narrow `method`, `model` and `loss`."""

    method: str
    data: DataBlock
    model: ModelBlock
    missing: MissingBlock = MissingBlock()
    teacher: TeacherBlock | None = None
    """Null: no distillation, the network is trained on missing data by itself."""
    loss: Block
    train: TrainBlock
    eval: EvalBlock = EvalBlock()
    deepspeed: dict[str, Any]
    """DeepSpeed's; null leaves a part out (`scheduler`: a constant learning rate, `gradient_clipping`: no clipping)."""

    @property
    def task(self) -> Task:
        return Task(self.train.task)

    @model_validator(mode="after")
    def _deepspeed_can_run(self) -> Self:
        problem = deepspeed_problem(self.deepspeed, self.train.batch_size, self.train.device, self.train.together)
        if problem:
            raise ValueError(problem)
        return self


class UmdfConfig(Config):
    """Self-distillation: there is no teacher."""

    method: Literal["umdf"]
    model: UmdfModel = UmdfModel()
    teacher: None = None
    loss: UmdfLoss = UmdfLoss()


class CorrkdConfig(Config):
    method: Literal["corrkd"]
    model: CorrkdModel = CorrkdModel()
    loss: CorrkdLoss = CorrkdLoss()


class HrlfConfig(Config):
    method: Literal["hrlf"]
    model: HrlfModel = HrlfModel()
    loss: HrlfLoss = HrlfLoss()

    @model_validator(mode="after")
    def _factorisation_is_trained(self) -> Self:
        if self.model.frf and not self.loss.lambda_frf:
            raise ValueError(
                "loss.lambda_frf: 0 leaves the decoder untrained; expected a positive weight, or model.frf=false"
            )
        return self


METHODS: dict[str, type[Config]] = {"umdf": UmdfConfig, "corrkd": CorrkdConfig, "hrlf": HrlfConfig}
"""The config class of every method."""


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


def command_overrides(assignments: list[str], data: str | None, seeds: str | None, together: bool = False) -> list[str]:
    """The overrides that a command's `--set`, `--data`, `--seeds` and `--together` stand for."""
    overrides = list(assignments)
    if data:
        overrides.append(f"data.path={json.dumps(data)}")
    if seeds:
        overrides.append(f"train.seeds=[{seeds}]")
    if together:
        overrides.append("train.together=true")
    return overrides


def parse_config(raw: dict[str, Any], name: str = "config") -> Config:
    """Validate a config held in memory; `name` stands for the file in error messages."""
    method = raw.get("method")
    if "method" in raw and method not in METHODS:
        hint = nearest(str(method), METHODS)
        raise UserError(f"{name}: method: expected one of {', '.join(METHODS)}, got {json.dumps(method)}{hint}")
    schema = METHODS.get(str(method), UmdfConfig)
    try:
        return schema.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise UserError(f"{name}: {_first_problem(error, schema)}") from None


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


def _first_problem(error: ValidationError, schema: type[Config]) -> str:
    first = error.errors()[0]
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        block: Any = schema
        for part in location[:-1]:
            annotation = block.model_fields[part].annotation
            block = next((choice for choice in get_args(annotation) if choice is not NoneType), annotation)
        names = [name for name, field in block.model_fields.items() if field.annotation is not NoneType]
        prefix = ".".join([*location[:-1], ""])
        return f"{key}: unknown key; expected one of {', '.join(names)}" + nearest(key, [prefix + n for n in names])
    if first["type"] == "missing":
        return f"{key}: missing"
    if first["type"] == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        return f"{key}.{message}" if key in ("data", "model", "loss") else f"{key}: {message}" if key else message
    expected = first["msg"].removeprefix("Input should be ")
    plainly = {"an object": "a block of keys", "a valid array": "a list", "a valid integer": "an integer"}
    expected = plainly.get(expected, expected).replace("a valid ", "a ")
    if expected.startswith(("greater", "less")):
        expected = f"a number {expected}"
    return f"{key}: expected {expected}, got {json.dumps(first['input'])}"
