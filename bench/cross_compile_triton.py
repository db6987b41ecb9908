"""Compile recorded launches of Triton kernels for any architecture, without a GPU: `compile_triton(...)`.

A launch is specialised as Triton's JIT would: an integer 1 becomes a constant, and pointers and integers that 16
divides say so. What ptxas says about registers, shared memory and spills comes back as `Resources`.
"""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench.resources import WARP, Resources, ptxas_usage
from fastmmkd.errors import UserError
from fastmmkd.kernels.launch import Launch
from fastmmkd.testing.specimens import DTYPES, Specimen

ALIGNMENT = 16
POINTERS = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.bool: "i1",
    torch.int32: "i32",
    torch.int64: "i64",
}
BF16_FROM = 80
"""The first architecture with bfloat16."""

Position = tuple[int, ...]
"""Position of an argument: one index, and one more for each tuple that it is in."""


@dataclass(frozen=True)
class Job:
    """One compilation, in plain data: equal jobs give equal code."""

    module: str
    kernel: str
    arch: int
    signature: tuple[tuple[str, Any], ...]
    constants: tuple[tuple[Position, Any], ...]
    aligned: tuple[Position, ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def name(self) -> str:
        """`residual_layer_norm_forward` of `_forward` in `fastmmkd.kernels.residual_layer_norm`."""
        return self.module.rpartition(".")[2] + self.kernel


def compile_triton(
    specimens: Iterable[Specimen], archs: Iterable[int], dtypes: Iterable[str], workers: int = 1
) -> list[Resources]:
    """Every kernel that the specimens launch; a job that several specimens share is compiled once.

    Args:
        specimens: the calls.
        archs: 70, 75, 80 or 90; bfloat16 is left out where there is none.
        dtypes: "fp32", "fp16", "bf16".
        workers: processes.

    Raises:
        UserError: a kernel does not compile.
    """
    wanted = {
        (job(launch, arch), dtype, specimen.shape): None
        for specimen in specimens
        for dtype in dtypes
        for arch in archs
        if dtype != "bf16" or arch >= BF16_FROM
        for launch in specimen.launches(DTYPES[dtype], arch)
    }
    jobs = list(dict.fromkeys(one for one, _, _ in wanted))
    if workers > 1:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            resources = dict(zip(jobs, pool.map(compiled, jobs), strict=True))
    else:
        resources = {one: compiled(one) for one in jobs}
    return [replace(resources[one], dtype=dtype, shape=shape) for one, dtype, shape in wanted]


def job(launch: Launch, arch: int) -> Job:
    """What the JIT would compile for a launch."""
    names, kernel = launch.kernel.arg_names, launch.kernel
    constexprs = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    unspecialised = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    bound = dict(zip(names, launch.args, strict=False)) | launch.options
    signature: list[tuple[str, Any]] = []
    constants: list[tuple[Position, Any]] = []
    aligned: list[Position] = []
    for i, name in enumerate(names):
        if name in constexprs:
            constants.append(((i,), bound[name]))
            signature.append((name, "constexpr"))
        else:
            as_it_is = (
                name in unspecialised and type(bound[name]) is int
            )  # the JIT specialises members of tuples anyway
            kind = _integer(bound[name]) if as_it_is else _specialised(bound[name], (i,), constants, aligned)
            signature.append((name, kind))
    options = {name: value for name, value in launch.options.items() if name not in names}
    module, function = kernel.fn.__module__, kernel.fn.__name__
    plain = tuple(signature), tuple(constants), tuple(aligned), tuple(sorted(options.items()))
    return Job(module, function, arch, *plain)


def _specialised(value: Any, at: Position, constants: list[tuple[Position, Any]], aligned: list[Position]) -> Any:
    """The type of an argument as a signature spells it; its constants and alignment are noted."""
    if isinstance(value, tuple):
        return tuple(_specialised(x, (*at, i), constants, aligned) for i, x in enumerate(value))
    if value is None or (type(value) is int and value == 1):
        constants.append((at, value))
        return "constexpr"
    if isinstance(value, torch.Tensor):
        offset, kind = value.storage_offset() * value.element_size(), f"*{POINTERS[value.dtype]}"
    elif type(value) is int:
        offset, kind = value, _integer(value)
    else:
        return {bool: "u1", float: "fp32"}[type(value)]
    if offset % ALIGNMENT == 0:
        aligned.append(at)
    return kind


def _integer(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"


@cache
def compiled(job: Job) -> Resources:
    """Compile a job, whatever dtype and shape it is for; Triton keeps the code in its cache.

    Raises:
        UserError: it does not compile.
    """
    binary = binary_of(job)
    registers, spills, static = _ptxas(binary.asm["ptx"])
    threads, shared = WARP * binary.metadata.num_warps, static + binary.metadata.shared
    return Resources(job.name, "triton", job.arch, "", "", threads, registers, spills, shared)


def binary_of(job: Job) -> Any:
    """What Triton makes of a job: `asm["ptx"]` and the other stages.

    Raises:
        UserError: it does not compile.
    """
    source = ASTSource(
        getattr(import_module(job.module), job.kernel),
        dict(job.signature),
        dict(job.constants),
        {at: [["tt.divisibility", ALIGNMENT]] for at in job.aligned},
    )
    try:
        return triton.compile(source, target=GPUTarget("cuda", job.arch, WARP), options=dict(job.options))
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()[-1:]), type(error).__name__)
        raise UserError(f"{job.name} does not compile for sm_{job.arch}: {reason}") from error


def _ptxas(ptx: str) -> tuple[int, int, int]:
    """Registers of a thread, bytes spilled, bytes of static shared memory."""
    target = next(line.split()[1] for line in ptx.splitlines() if line.startswith(".target"))
    binary = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        command = [binary, "-v", f"--gpu-name={target.rstrip(',')}", "-o", Path(folder, "kernel.cubin"), source]
        assembled = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    (usage,) = ptxas_usage(assembled.stderr).values()
    return usage
