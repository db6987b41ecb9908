"""What a config is made of: the blocks of every run. A method adds its own, see `fastmmkd.methods.method`.

Every field says what it does; a decision where a paper is silent is named as one.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from typing_extensions import Self

from fastmmkd.deepspeed_block import deepspeed_problem
from fastmmkd.errors import nearest
from fastmmkd.tasks import TASKS, Task

LARGEST_SEED = 2**31 - 1
MOST_LAYERS = 1000
"""Of a network's part; more would only be a slip of the keyboard."""
LARGEST_WIDTH = 8192
LONGEST_SWEEP = 1000
LONGEST_TIMEOUT_S = 7 * 24 * 3600.0


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

    @field_validator("path")
    @classmethod
    def _names_a_file(cls, value: str) -> str:
        if not value or "\0" in value:
            raise ValueError("expected the name of a file")
        return value

    @model_validator(mode="after")
    def _clip_has_a_unit(self) -> Self:
        if self.clip is not None and not self.standardise:
            raise ValueError(f"clip: {self.clip} is in standard deviations; expected null where standardise is false")
        return self


class ModelBlock(Block):
    """What the networks of all methods have."""

    width: int = Field(default=40, gt=0, le=LARGEST_WIDTH)
    """d, features per stream."""
    attention_mask: Literal["missing", "padding", "none"] = "missing"
    """Which frames are masked as keys: padding and missing ones, padding only, or none (the papers read literally)."""
    masked_layers: Literal["all", "first"] = "all"
    """Where `attention_mask: missing` masks the missing frames: in all layers, or in the first alone, where they hold
    nothing; from the second on they hold what attention put there (decision: "all" is what validation prefers)."""
    positions: Literal["first", "last"] = "first"
    """Which of a sample's real frames has position 0 (decision). "last" is for labels of the last frame: a network that
    averages over frames, as CorrKD's does, cannot tell which one that is by positions from the first."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """After the embedding and on every residual branch, in training (no paper mentions dropout)."""


class UnplacedModel(ModelBlock):
    """A network without position codes: recurrences and mixers know the order of frames."""

    positions: Literal["first"] = "first"


class MaskedOnceModel(UnplacedModel):
    """One that masks missing frames where it reads the features, and has no later layers that attend to them."""

    masked_layers: Literal["all"] = "all"


class AttentionModel(ModelBlock):
    """A network of multi-head attention."""

    heads: int = Field(default=8, gt=0)

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.width % self.heads:
            divisors = [h for h in range(1, self.width + 1) if self.width % h == 0]
            raise ValueError(f"heads: {self.heads} does not divide width {self.width}; expected one of {divisors}")
        return self


class MissingBlock(Block):
    """What training drops."""

    enabled: bool = True
    """False: every version is the complete sample (the baseline without missingness)."""
    p_max: float = Field(default=0.7, ge=0, le=1)
    """Each version's frame ratio is uniform in [0, p_max)."""
    ratio: Literal["independent", "exact"] = "independent"
    """Ratio p: independent drops with probability p, or exactly `round(p * frames)` frames."""


class TeacherBlock(Block):
    """The teacher phase, which comes before the student's; batch, optimiser and task are the run's."""

    epochs: int | None = Field(default=None, gt=0)
    """Null: as many as the student's, `train.epochs`; a run that is resumed for more of them keeps its own."""
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
    epochs: int = Field(gt=0, le=1_000_000)
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
    epoch's last batch, H being the joint representation (or what the method names in its place)."""
    log_every: int = Field(default=10, gt=0)
    """Steps between progress updates; a multi-process run also agrees on interruptions then."""
    timeout_seconds: float = Field(default=600.0, ge=1, le=LONGEST_TIMEOUT_S)
    """How long a process of several waits for the others, when they meet and in every collective operation."""

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
        if not isinstance(value, list):
            return value
        return tuple(float(v) if v in (0, 1) and not isinstance(v, bool) else v for v in value)

    @field_validator("sweep")
    @classmethod
    def _ratios(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(value) > LONGEST_SWEEP or not all(0 <= p <= 1 for p in value):
            raise ValueError(f"expected ratios between 0 and 1, at most {LONGEST_SWEEP} of them")
        if len(set(value)) < len(value):
            raise ValueError("expected every ratio once")
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
        problem = deepspeed_problem(self.deepspeed, self.train.batch_size, self.train.together)
        if problem:
            raise ValueError(problem)
        return self
