"""Compile the CUDA kernels for any architecture from sm_70 on, without a GPU: `compile_cuda(arch)`.

NVRTC 12.9 does it, from PyPI's wheels: it is the last with sm_70, and compiles the kernels' headers as they are. What
ptxas says about registers, shared memory and spills comes back as `Resources`.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.resources import LIMITS, Resources, ptxas_usage
from fastmmkd.errors import UserError

CSRC = Path(__file__).parents[1] / "csrc"
WHEELS = ("nvidia.cuda_nvrtc", "nvidia.cuda_runtime", "nvidia.cuda_nvcc")
TYPES = {"fp32": "float", "fp16": "__half", "bf16": "__nv_bfloat16"}
BF16_FROM = 80
"""The kernels convert bfloat16 on any architecture; before this one nobody uses it."""

HEAD_WIDTHS = (4, 5, 8, 10, 16)
NORM_WIDTH = 40
"""Of the papers' models; the shared memory of a backward block grows with it."""


@dataclass(frozen=True)
class Kernel:
    """One instantiation: the header of its template, the C++ name, the dtypes in words, and how it is launched."""

    header: str
    name: str
    dtype: str
    shape: str
    threads: int
    dynamic_shared: int = 0


def kernels() -> Iterator[Kernel]:
    """Every kernel that the launchers instantiate."""
    for dtype, of in TYPES.items():
        for name in ("attend_rows", "differentiate_queries", "differentiate_keys"):
            for width in HEAD_WIDTHS:
                yield Kernel("cross_attention_kernel.cuh", f"{name}<{width}, {of}>", dtype, f"heads of {width}", 128)
        for name in ("attend_wide", "differentiate_wide_queries", "differentiate_wide_keys"):
            yield Kernel("cross_attention_wide_kernel.cuh", f"{name}<{of}>", dtype, "heads of 17 to 256", 128)
        yield Kernel("pairwise_contrastive_kernel.cuh", f"contrast_tile<{of}>", dtype, "any", 128)
        yield Kernel("prototype_similarity_kernel.cuh", f"compare_group<{of}>", dtype, "any", 512)
    yield Kernel("pairwise_contrastive_kernel.cuh", "sum_tiles", "fp32", "any", 32)
    for left, right in (("fp32", "fp32"), ("fp32", "fp16"), ("fp32", "bf16"), ("fp16", "fp32"), ("fp16", "fp16"),
                        ("bf16", "fp32"), ("bf16", "bf16")):  # fmt: skip
        dtype = left if left == right else f"{left} + {right}"
        of = f"<{TYPES[left]}, {TYPES[right]}>"
        yield Kernel("residual_layer_norm_kernel.cuh", f"norm_rows{of}", dtype, "any", 128)
        shared = 4 * 2 * 4 * NORM_WIDTH
        yield Kernel(
            "residual_layer_norm_kernel.cuh", f"differentiate_rows{of}", dtype, f"d = {NORM_WIDTH}", 128, shared
        )
    yield Kernel("residual_layer_norm_kernel.cuh", "sum_partials", "fp32", "any", 128)


def missing() -> str:
    """Why nothing can be compiled here, or nothing."""
    absent = [name for name in WHEELS if importlib.util.find_spec("nvidia") is None or _folder(name) is None]
    return f"no {', '.join(absent)}; `make setup` installs them" if absent else ""


def includes() -> list[Path]:
    """The folders of the CUDA runtime's headers."""
    return [_required(name) / "include" for name in WHEELS[1:]]


def compile_cuda(arch: int, only: Sequence[str] = ()) -> list[Resources]:
    """Every kernel, or those of the headers in `only`, for one architecture (70, 75, 80 or 90).

    Raises:
        UserError: NVRTC's wheels are not installed, the architecture is not one of these, or a kernel does not
            compile; the first of the compiler's errors follows.
    """
    if missing():
        raise UserError(missing())
    if arch not in LIMITS:
        raise UserError(f"sm_{arch}: expected one of {', '.join(map(str, LIMITS))}")
    of_header: dict[str, list[Kernel]] = {}
    for kernel in kernels():
        if (not only or kernel.header in only) and (arch >= BF16_FROM or "bf16" not in kernel.dtype):
            of_header.setdefault(kernel.header, []).append(kernel)
    return [resources for header, members in of_header.items() for resources in _compile(header, members, arch)]


def _compile(header: str, members: Sequence[Kernel], arch: int) -> Iterator[Resources]:
    names = [f"fastmmkd::cuda::{kernel.name}" for kernel in members]
    lowered, log = _nvrtc(f'#include "cuda/{header}"\n', names, arch)
    used = ptxas_usage(log)
    for kernel, symbol in zip(members, lowered, strict=True):
        registers, spills, shared = used[symbol]
        name = kernel.name.split("<")[0]
        yield Resources(
            name, "cuda", arch, kernel.dtype, kernel.shape, kernel.threads, registers, spills,
            shared + kernel.dynamic_shared,
        )  # fmt: skip


def _nvrtc(source: str, names: Sequence[str], arch: int) -> tuple[list[str], str]:
    """The symbols of the named kernels, and what ptxas said."""
    library = ctypes.CDLL(str(min((_required("nvidia.cuda_nvrtc") / "lib").glob("libnvrtc.so.*"))))
    options = [
        f"--gpu-architecture=sm_{arch}",
        "--ptxas-options=-v",
        f"--include-path={CSRC}",
        *(f"--include-path={path}" for path in includes()),
    ]
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
    try:
        for name in names:
            library.nvrtcAddNameExpression(program, name.encode())
        failed = library.nvrtcCompileProgram(
            program, len(options), (ctypes.c_char_p * len(options))(*map(str.encode, options))
        )
        size = ctypes.c_size_t()
        library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        library.nvrtcGetProgramLog(program, text)
        log = text.value.decode()
        if failed:
            raise UserError(f"sm_{arch}: " + next((line for line in log.splitlines() if "error" in line), log[:200]))
        symbols = []
        for name in names:
            symbol = ctypes.c_char_p()
            library.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(symbol))
            assert symbol.value
            symbols.append(symbol.value.decode())
        return symbols, log
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    return Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None


def _required(package: str) -> Path:
    folder = _folder(package)
    assert folder
    return folder
