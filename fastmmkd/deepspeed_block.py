"""The `deepspeed` block of a config: what is wrong with it that DeepSpeed itself would not say."""

from __future__ import annotations

import difflib
import json
from typing import Any

from fastmmkd.errors import nearest

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


def deepspeed_problem(block: dict[str, Any], batch_size: int, device: str, together: bool = False) -> str | None:
    """What is wrong with a `deepspeed` block that DeepSpeed itself would not say, or None."""
    block = without_nulls(block)
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
    kind = block["optimizer"]["type"]
    if together and kind.lower() not in ELEMENTWISE_OPTIMIZERS:
        return f"deepspeed.optimizer.type: {kind} would couple the seeds of train.together; expected for example Adam"
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
    if fp16 and device == "cpu":
        return "deepspeed.fp16.enabled: true with train.device=cpu; expected bf16 or neither (fp32) on a CPU"
    if block.get("gradient_accumulation_steps", 1) != 1:
        return "deepspeed.gradient_accumulation_steps: expected 1, the losses are defined on the whole mini-batch"
    if "train_micro_batch_size_per_gpu" in block:
        return (
            "deepspeed.train_micro_batch_size_per_gpu: expected it left out, it is train.batch_size over the number of "
            "processes"
        )
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
    if kind.lower() in DEEPSPEED_OPTIMIZERS:
        return None
    import torch

    classes = [name for name, found in vars(torch.optim).items() if isinstance(found, type) and name != "Optimizer"]
    if kind in classes:
        return None
    return f"deepspeed.optimizer.type: {kind!r} is not an optimizer{nearest(kind, ('Lamb', 'Lion', *classes))}"


def _section(block: dict[str, Any], key: str) -> dict[str, Any]:
    value = block.get(key, {})
    return value if isinstance(value, dict) else {}
