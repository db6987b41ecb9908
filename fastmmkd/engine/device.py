"""Where and in which precision a run computes, and how DeepSpeed is brought up quietly on it."""

from __future__ import annotations

import copy
import ctypes
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastmmkd.blocks import Config
from fastmmkd.deepspeed_block import without_nulls
from fastmmkd.distributed import world_size
from fastmmkd.engine.flat_adam import flat_adam
from fastmmkd.engine.world import number_of_processes, own_name, set_world
from fastmmkd.errors import UserError
from fastmmkd.files import make_directory, writing
from fastmmkd.methods.method import Trainable
from fastmmkd.nn.models import models_of
from fastmmkd.ops import extension

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


@dataclass(frozen=True)
class Placement:
    """Device and precision of a run, and the DeepSpeed config that says so to DeepSpeed."""

    device: torch.device
    precision: str
    deepspeed: dict[str, Any]
    note: str | None
    """What was changed from the config, and why; None when nothing was."""
    clip_each: float | None = None
    """`train.together`: the norm that each model's gradients are clipped to, in place of DeepSpeed's one for all; 0 =
    none."""
    timeout_seconds: float = 600.0
    """How long a collective operation waits for the other processes."""

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]


def place(config: Config) -> Placement:
    """Resolve `train.device` and the precision of the `deepspeed` block against the hardware at hand.

    fp16 is what a V100 needs. Where it cannot run (CPU) or bf16 is the better choice of the same width (compute
    capability 8.0 and later), the run falls back to fp32 or bf16 and `note` says so; in fp32 ZeRO 1 becomes ZeRO 0,
    which does less per step and is the same but for the rounding of the norm that is clipped.

    `train.together` takes out of the block what would couple the models: one clipping for all, and ZeRO, which would
    flatten their gradients into one vector.

    Raises:
        UserError: `train.device` is "cuda" and there is none; `train.together` in fp16.
    """
    cuda = torch.cuda.is_available()
    if config.train.device == "cuda" and not cuda:
        raise UserError("train.device: cuda, but torch sees no CUDA device; expected auto or cpu on this machine")
    block = copy.deepcopy(without_nulls(config.deepspeed))
    use_cuda = cuda and config.train.device != "cpu"
    precision = next((p for p in ("fp16", "bf16") if block.get(p, {}).get("enabled")), "fp32")
    note = None
    if precision == "fp16" and not use_cuda:
        block.pop("fp16")
        precision, note = "fp32", "deepspeed.fp16 needs a GPU: training in fp32 on the CPU"
        if block.get("zero_optimization", {}).get("stage") == 1:  # what fp16 needs; it costs time and fp32 does not
            block["zero_optimization"]["stage"] = 0
    elif precision == "fp16" and torch.cuda.get_device_capability() >= (8, 0):
        block.pop("fp16")
        block["bf16"] = {"enabled": True}
        precision, note = "bf16", f"deepspeed.fp16: {torch.cuda.get_device_name()} has bf16, which needs no loss scale"
    elif precision == "bf16" and use_cuda and torch.cuda.get_device_capability() < (8, 0):
        block.pop("bf16")
        block["fp16"] = {"enabled": True}
        stage = block.setdefault("zero_optimization", {})
        stage["stage"] = max(1, stage.get("stage", 0))
        precision, note = "fp16", f"deepspeed.bf16: {torch.cuda.get_device_name()} has none; training in fp16"
    block["train_batch_size"] = config.train.batch_size
    block.setdefault("steps_per_print", sys.maxsize)
    clip_each = None
    _fuse(block["optimizer"].get("params", {}), capturable=use_cuda and config.train.graph == "step")
    if config.train.together:
        if precision == "fp16":
            raise UserError(
                "train.together: in fp16 an overflow of one seed would skip the step of all; expected fp32 on this "
                "device (no deepspeed.fp16 and no deepspeed.bf16), or false"
            )
        clip_each = float(block.get("gradient_clipping", 1.0))  # DeepSpeed's default
        block |= {"gradient_clipping": 0.0, "zero_optimization": {"stage": 0}}
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if use_cuda else torch.device("cpu")
    return Placement(device, precision, block, note, clip_each, config.train.timeout_seconds)


def refuse_absent(device: torch.device) -> None:
    """Refuse a process that there is no device for.

    Raises:
        UserError: so it is.
    """
    if device.type == "cuda" and (device.index or 0) >= (there := torch.cuda.device_count()):
        raise UserError(f"LOCAL_RANK: {device.index}, but torch sees {there} CUDA devices; expected a process for each")


def _fuse(parameters: dict[str, Any], capturable: bool) -> None:
    """Have torch's Adam, which DeepSpeed is asked for by `torch_adam`, update everything in one kernel."""
    if parameters.get("torch_adam"):
        parameters.setdefault("fused", True)
        if capturable:
            parameters["capturable"] = True


def prepare_process(config: Config) -> None:
    """Set up this process before DeepSpeed is imported.

    Its accelerator; its world; a fair share of the cores; compiled kernels.
    """
    if config.train.device == "cpu" or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    set_world()
    if "OMP_NUM_THREADS" not in os.environ:
        # LOCAL_SIZE is what the deepspeed launcher sets, LOCAL_WORLD_SIZE what torchrun does.
        local = os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or os.environ["WORLD_SIZE"]
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(local)))
    extension.ensure()
    keep_freed_memory()
    torch.use_deterministic_algorithms(True, warn_only=True)
    # A debugging aid that doubles a step on a CPU.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def start_deepspeed(placement: Placement, log_file: Path) -> Any:
    """Import DeepSpeed, join the processes, and return the module; what it prints goes to `log_file`, errors do not."""
    with output_to(log_file):
        import deepspeed
        from deepspeed.utils import logger

        for handler in list(logger.handlers):
            logger.removeHandler(handler)
            if isinstance(handler, logging.FileHandler):  # of a run before
                handler.close()
        to_file = logging.FileHandler(log_file)
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        to_screen = logging.StreamHandler(sys.__stderr__)
        to_screen.setLevel(logging.ERROR)
        if number_of_processes() > 1:
            to_screen.setFormatter(logging.Formatter(f"{own_name()}: %(message)s"))
        logger.addHandler(to_file)
        logger.addHandler(to_screen)
        logger.setLevel(logging.INFO)
        if placement.device.type == "cpu":
            _skip_shared_memory_build()
        else:
            torch.cuda.set_device(placement.device)
        if not torch.distributed.is_initialized():
            backend = "gloo" if placement.device.type == "cpu" else "nccl"
            timeout = timedelta(seconds=placement.timeout_seconds)
            deepspeed.init_distributed(backend, verbose=False, timeout=timeout)
            # DeepSpeed's own groups would have torch's timeout, half an hour with gloo.
            deepspeed.comm.comm.cdb.new_group = partial(torch.distributed.new_group, timeout=timeout)
    return deepspeed


def wrap(deepspeed: Any, module: Trainable, block: dict[str, Any], log_file: Path) -> Any:
    """DeepSpeed's engine around what a phase trains; what it prints goes to `log_file`.

    Where the block allows it (`flat_adam`) the update is ours: DeepSpeed sees a run in fp32 under ZeRO 0 with an
    optimiser that a client brings, which knows of precision, clipping and averaging; its `step` calls that, moves the
    schedule and counts. Everywhere else all of it is DeepSpeed's own, but for two things. Stage 0 sends all gradients
    through a buffer and back to average them; one process is spared that, which changes no bit. Stages 1 and 2 look
    for infinities in every gradient by itself and then take the norm of all, which tells the same; the search is left
    out, and a step whose norm is not finite is skipped as before.

    DeepSpeed's count of samples per second, which waits for the device twice a step, is off unless the block has it.
    Its checkpoints are written and read by `CheckpointFiles`.
    """
    from fastmmkd.engine.checkpoint_files import CheckpointFiles

    block = copy.deepcopy(block)
    block.setdefault("timers", {"throughput": {"enabled": False}})
    groups = module.parameter_groups()
    ours = flat_adam(block, models_of(module)) if len(groups) == 1 else None
    if ours is not None:
        del block["optimizer"]
        block.pop("bf16", None)
        block |= {"gradient_clipping": 0.0, "zero_optimization": {"stage": 0}}
    with output_to(log_file):
        engine, *_ = deepspeed.initialize(
            model=module, model_parameters=groups if ours is None else groups[0]["params"], config=block, optimizer=ours
        )
    engine.checkpoint_engine = CheckpointFiles()
    if ours is not None or (world_size() == 1 and engine.zero_optimization_stage() == 0):
        engine.enable_backward_allreduce = False
    elif getattr(engine.optimizer, "compute_grad_norm", False):
        engine.optimizer.check_overflow = lambda partition_gradients=True: None
    return engine


@contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Send stdout and stderr of this process, native code included, to the end of a file.

    Raises:
        CannotWrite: it cannot be opened.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    make_directory(path.parent)
    with writing(path):
        log = path.open("ab", buffering=0)
    saved = os.dup(1), os.dup(2)
    with log as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for fd, copy_of in zip((1, 2), saved, strict=True):
                os.dup2(copy_of, fd)
                os.close(copy_of)


@contextmanager
def warnings_to(path: Path) -> Iterator[None]:
    """Append each Python warning to a file, once: DeepSpeed and torch warn about their own calls in every step.

    So are errors of threads in the background; who waits for TensorBoard's writer is told of its error.
    """
    seen = set()

    def append(text: str) -> None:
        with suppress(OSError), path.open("a", encoding="utf-8") as file:
            file.write(text)

    def in_thread(error: threading.ExceptHookArgs) -> None:
        append("".join(traceback.format_exception(error.exc_type, error.exc_value, error.exc_traceback)))

    def write(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: object) -> None:
        text = warnings.formatwarning(message, category, filename, lineno)
        if text not in seen:
            seen.add(text)
            append(text)

    before, threading.excepthook = threading.excepthook, in_thread
    try:
        with warnings.catch_warnings():
            warnings.showwarning = write  # type: ignore[assignment]
            yield
    finally:
        threading.excepthook = before


def _skip_shared_memory_build() -> None:
    """Leave DeepSpeed's shared-memory collectives uncompiled: it takes a minute and a compiler, and gloo does."""
    try:
        import deepspeed.ops

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    except (ImportError, AttributeError, KeyError):
        pass  # another DeepSpeed version: it then builds what it wants


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks: each step takes the same memory again, and page faults cost up to a third of it."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
    except OSError:
        pass  # not glibc: nothing to tune
