"""The `deepspeed` block of a config: what is wrong with it that DeepSpeed itself would not say."""

from __future__ import annotations

import difflib
import math
from typing import Any

from fastmmkd.errors import nearest, shown

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


UNFIT_OPTIMIZERS = {"LBFGS": "computes the loss several times a step", "SparseAdam": "needs sparse gradients"}
"""What cannot train here, and why."""
LARGEST_RATE = 10.0
"""A learning rate beyond it is a slip."""


ELEMENTWISE_OPTIMIZERS = (
    *("adam", "adamw", "adagrad", "lion", "sgd"),
    *("adadelta", "adamax", "asgd", "nadam", "radam", "rmsprop", "rprop"),
)
"""Those whose step of a parameter depends on that parameter alone, so that models in one tensor stay independent."""


def without_nulls(block: dict[str, Any]) -> dict[str, Any]:
    """A `deepspeed` block as DeepSpeed takes it: what is null is left out, such as a scheduler (a constant learning
    rate), and clipping that is null is none at all, where leaving it out would be DeepSpeed's 1."""
    clipping = {"gradient_clipping": 0.0} if block.get("gradient_clipping", 0.0) is None else {}
    return {key: value for key, value in block.items() if value is not None} | clipping


def deepspeed_problem(block: dict[str, Any], batch_size: int, together: bool = False) -> str | None:
    """What is wrong with a `deepspeed` block that DeepSpeed itself would not say, or None."""
    block = without_nulls(block)
    if key := _not_finite(block):
        return f"deepspeed.{key}: expected a finite number"
    for key in block:
        hint = difflib.get_close_matches(key, DEEPSPEED_KEYS, n=1, cutoff=0.8)
        if key not in DEEPSPEED_KEYS and hint:
            return f"deepspeed.{key}: unknown key; did you mean deepspeed.{hint[0]}?"
    for key in ("optimizer", "scheduler", "fp16", "bf16", "zero_optimization"):
        if not isinstance(block.get(key, {}), dict):
            return f"deepspeed.{key}: expected a block of keys, got {shown(block[key])}"
    problem = _optimizer_problem(block) or _scheduler_problem(block) or _number_problem(block)
    if problem:
        return problem
    kind = block["optimizer"]["type"]
    if together and kind.lower() not in ELEMENTWISE_OPTIMIZERS:
        return f"deepspeed.optimizer.type: {kind} would couple the seeds of train.together; expected for example Adam"
    for key in ("fp16", "bf16"):
        enabled = _section(block, key).get("enabled", False)
        if not isinstance(enabled, bool):
            return f"deepspeed.{key}.enabled: expected true or false, got {shown(enabled)}"
    stage = _section(block, "zero_optimization").get("stage", 0)
    fp16, bf16 = (_section(block, key).get("enabled", False) for key in ("fp16", "bf16"))
    if isinstance(stage, bool) or stage not in (0, 1, 2):
        return f"deepspeed.zero_optimization.stage: expected 0, 1 or 2, got {shown(stage)}"
    if fp16 and bf16:
        return "deepspeed.bf16.enabled: fp16 and bf16 are both on; expected one of them"
    if fp16 and stage == 0:
        return (
            "deepspeed.zero_optimization.stage: 0 with fp16 divides gradients by a loss scale that it never applied; "
            "expected 1 or 2"
        )
    accumulation = block.get("gradient_accumulation_steps", 1)
    if isinstance(accumulation, bool) or accumulation != 1:
        return "deepspeed.gradient_accumulation_steps: expected 1, the losses are defined on the whole mini-batch"
    if "train_micro_batch_size_per_gpu" in block:
        return (
            "deepspeed.train_micro_batch_size_per_gpu: expected it left out, it is train.batch_size over the number of "
            "processes"
        )
    if "checkpoint" in block:
        return "deepspeed.checkpoint: expected it left out, checkpoints are written and read by fastmmkd"
    given = block.get("train_batch_size", batch_size)
    if given != batch_size:
        return f"deepspeed.train_batch_size: {given}, but train.batch_size is {batch_size}; expected one of them"
    return None


def _optimizer_problem(block: dict[str, Any]) -> str | None:
    if "optimizer" not in block:
        return 'deepspeed.optimizer: missing; expected for example {"type": "Adam", "params": {"lr": 0.001}}'
    kind = block["optimizer"].get("type")
    if not isinstance(kind, str):
        return 'deepspeed.optimizer.type: missing; expected for example "Adam"'
    if kind in UNFIT_OPTIMIZERS:
        return f"deepspeed.optimizer.type: {kind} {UNFIT_OPTIMIZERS[kind]}; expected for example Adam"
    params = block["optimizer"].get("params", {})
    if not isinstance(params, dict):
        return f"deepspeed.optimizer.params: expected a block of keys, got {shown(params)}"
    for key, value in params.items():
        if expected := _expected(key, value):
            return f"deepspeed.optimizer.params.{key}: expected {expected}, got {shown(value)}"
    if kind.lower() in DEEPSPEED_OPTIMIZERS:
        return None
    import torch

    classes = [name for name, value in vars(torch.optim).items() if isinstance(value, type) and name != "Optimizer"]
    if kind in classes:
        return None
    return f"deepspeed.optimizer.type: {kind!r} is not an optimizer{nearest(kind, ('Lamb', 'Lion', *classes))}"


def _scheduler_problem(block: dict[str, Any]) -> str | None:
    if "scheduler" not in block:
        return None
    scheduler = block["scheduler"]
    if not isinstance(scheduler.get("type"), str):
        return 'deepspeed.scheduler.type: missing; expected for example "WarmupLR", or null in place of the scheduler'
    params = scheduler.get("params", {})
    if not isinstance(params, dict):
        return f"deepspeed.scheduler.params: expected a block of keys, got {shown(params)}"
    for key, value in params.items():
        if expected := _expected(key, value):
            return f"deepspeed.scheduler.params.{key}: expected {expected}, got {shown(value)}"
    return None


def _number_problem(block: dict[str, Any]) -> str | None:
    clipping = block.get("gradient_clipping", 0.0)
    if not _is_number(clipping) or clipping < 0:
        return f"deepspeed.gradient_clipping: expected a number from 0, which is none, got {shown(clipping)}"
    every = block.get("steps_per_print", 1)
    if not isinstance(every, int) or isinstance(every, bool) or every < 1:
        return f"deepspeed.steps_per_print: expected an integer from 1, got {shown(every)}"
    return None


def _expected(key: str, value: Any) -> str | None:
    """What a parameter of an optimizer or a scheduler should be, by its name, where it is not."""
    values = value if isinstance(value, list) else [value]
    numbers = all(map(_is_number, values))
    if key == "lr" or key.endswith("_lr"):  # a scheduler takes a list, too, one per group of parameters
        fits = bool(values) and numbers and all(0 <= rate <= LARGEST_RATE for rate in values)
        return None if fits and (key != "lr" or value is not values) else f"a number from 0 to {LARGEST_RATE}"
    if key == "betas":
        fits = isinstance(value, list) and len(value) == 2 and numbers and all(0 <= beta < 1 for beta in value)
        return None if fits else "two numbers from 0 to below 1"
    if key in ("eps", "weight_decay", "momentum", "dampening", "alpha"):
        return None if value is not values and numbers and value >= 0 else "a number from 0"
    if key in ("torch_adam", "adam_w_mode", "fused", "amsgrad", "nesterov"):
        return None if isinstance(value, bool) else "true or false"
    if key == "warmup_type":
        return None if value in ("log", "linear") else '"log" or "linear"'
    if key.endswith(("num_steps", "step_size")):
        least = 1 if key.startswith("total") else 0
        fits = isinstance(value, int) and numbers and least <= value < 2**31
        return None if fits else f"an integer from {least}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _not_finite(value: Any) -> str | None:
    """Where a block holds a number that is not finite: `"optimizer.params.lr"`."""
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if (inner := _not_finite(item)) is not None:
                return f"{key}.{inner}".rstrip(".")
    elif isinstance(value, float) and not math.isfinite(value):
        return ""
    return None


def _section(block: dict[str, Any], key: str) -> dict[str, Any]:
    value = block.get(key, {})
    return value if isinstance(value, dict) else {}
