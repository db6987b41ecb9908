"""The CUDA kernels and their binding on a CPU: `tests/cuda/host` stands in for CUDA, g++ for nvcc.

`operations()` are for CPU tensors what `torch.ops.fastmmkd_cuda` is on a GPU; the functions below call them as autograd
would.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils import cpp_extension

from fastmmkd.ops.cross_attention import operands
from fastmmkd.testing.attention import AttentionCase
from fastmmkd.testing.losses import upstream

ROOT = Path(__file__).parents[2]
HOST = Path(__file__).parent / "host"
BUILD = ROOT / "build" / "emulation"
COMPILER = shutil.which("g++")

FLAGS = [str(COMPILER), "-O1", "-fPIC", "-ffp-contract=off", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
FLAGS += ["-Wno-strict-aliasing", f"-I{HOST}", f"-I{ROOT / 'csrc'}"]
"""Of g++ for the kernels; without contraction, so that sums are those of the source."""

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no g++")


def operations() -> Any:
    """`torch.ops.fastmmkd_emulated`, compiled the first time."""
    _library()
    return torch.ops.fastmmkd_emulated


@contextmanager
def reversed_order() -> Iterator[None]:
    """Blocks, and the threads of a block, run from the last to the first."""
    _library().emulation_reverse(True)
    try:
        yield
    finally:
        _library().emulation_reverse(False)


def attention(case: AttentionCase) -> list[torch.Tensor]:
    """The output and the gradients in query, keys and values."""
    *inputs, heads = arguments(case)
    padded = case.layout is None
    out, statistics = operations().cross_attention(*inputs, heads)
    grad = case.grad.flatten(1, 2) if padded else case.grad
    grad_query, grad_keys, grad_values = operations().cross_attention_backward(grad, *inputs, out, statistics, heads)
    results = [out, grad_query, *grad_keys, *grad_values]
    shapes = [x.shape for x in (case.inputs[0], *case.inputs)]
    return [x.view(shape) for x, shape in zip(results, shapes, strict=True)]


def arguments(case: AttentionCase) -> tuple[Any, ...]:
    """Those of the compiled operation."""
    n = len(case.masks)
    query, keys, values = case.inputs[0], case.inputs[1 : n + 1], case.inputs[n + 1 :]
    key_layouts = case.key_layouts or ([case.layout] * n if case.layout else [])
    return *operands(query, keys, values, case.masks, case.layout, key_layouts), case.heads


def norm(inputs: Sequence[torch.Tensor], grad: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients in x, residual, weight and bias."""
    x, residual, weight, bias = inputs
    out, mean, rstd = operations().residual_layer_norm(x, residual, weight, bias, 1e-5)
    grad_sum, grad_weight, grad_bias = operations().residual_layer_norm_backward(grad, x, residual, weight, mean, rstd)
    assert grad_sum.dtype == torch.promote_types(x.dtype, residual.dtype)
    return [
        out,
        grad_sum.to(x.dtype),
        grad_sum.to(residual.dtype),
        grad_weight.to(weight.dtype),
        grad_bias.to(bias.dtype),
    ]


def loss(name: str, inputs: Sequence[torch.Tensor], constants: Sequence[Any]) -> list[torch.Tensor]:
    """The loss and the gradients of its product with `upstream` in both inputs."""
    value, *grads = getattr(operations(), name)(*inputs, *constants, [True, True])
    grad = upstream(inputs[0].shape[0])[:, None, None]
    return [value, *((grad * g).to(x.dtype) for g, x in zip(grads, inputs, strict=True))]


@functools.cache
def _library() -> ctypes.CDLL:
    path = built()
    torch.ops.load_library(str(path))
    return ctypes.CDLL(str(path))


def built() -> Path:
    """The library of the sources as they are; built by one process at a time, and kept."""
    sources = sorted(f for folder in (ROOT / "csrc" / "cuda", HOST) for f in folder.rglob("*") if f.is_file())
    sources.append(ROOT / "csrc" / "common" / "shapes.h")
    content = b"".join(f.read_bytes() for f in (*sources, Path(__file__))) + torch.__version__.encode()
    path = BUILD / f"{hashlib.sha256(content).hexdigest()[:16]}.so"
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            _build(path)
    return path


def _build(path: Path) -> None:
    binding = path.with_suffix(".binding.o")
    torch_flags = ["-std=c++20", "-DFASTMMKD_DEVICE=CPU", "-DFASTMMKD_LIBRARY=fastmmkd_emulated"]
    torch_flags += [*(f"-isystem{p}" for p in cpp_extension.include_paths())]
    _run([*FLAGS, *torch_flags, "-O0", "-c", str(ROOT / "csrc" / "cuda" / "binding.cpp"), "-o", str(binding)])
    libraries = [*(f"-L{p}" for p in cpp_extension.library_paths()), "-ltorch_cpu", "-lc10"]
    compile_on_host(sorted((ROOT / "csrc" / "cuda").glob("*.cu")), path, [str(binding), *libraries])
    binding.unlink()


def compile_on_host(sources: Sequence[Path], path: Path, linked: Sequence[str] = ()) -> None:
    """CUDA sources and the emulation as a shared library, with what else is `linked`."""
    objects = [path.with_suffix(f".{i}.o") for i in range(len(sources) + 1)]
    commands = [
        [*FLAGS, "-x", "c++", "-c", str(source), "-o", str(to)]
        for source, to in zip((*sources, HOST / "emulation.cpp"), objects, strict=True)
    ]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(_run, commands))
    _run([str(COMPILER), "-shared", *map(str, objects), *linked, "-o", f"{path}.new"])
    os.replace(f"{path}.new", path)
    for name in objects:
        name.unlink()


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
