"""Kernels compiled offline take what their budgets allow; the tool that measures it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.resources import Resources, ptxas_usage
from fastmmkd.ops import OPERATIONS
from fastmmkd.ops.providers import HAS_TRITON, INTERPRETED

if not HAS_TRITON or INTERPRETED:
    pytest.skip("Triton does not compile here", allow_module_level=True)

import triton
import triton.language as tl
from triton._C.libtriton import native_specialize_impl
from triton.backends.compiler import BaseBackend

from bench import cross_compile
from bench.cross_compile_triton import binary_of, compile_triton, job
from fastmmkd.kernels.launch import launch, recorded
from fastmmkd.testing.specimens import specimens

MAIN = list({specimen.function: specimen for specimen in reversed(specimens()) if specimen.main}.values())
VOLTA_SHARED = 96 * 1024
MOST_SPILLED = 64
"""Bytes of a thread: what was measured to be fastest may spill a little."""


@pytest.mark.parametrize(("arch", "dtype"), [(70, "fp16"), (70, "fp32"), (80, "fp16"), (90, "fp16"), (90, "fp32")])
@pytest.mark.parametrize("specimen", MAIN, ids=lambda x: x.function)
def test_kernels_stay_within_their_budgets(specimen, arch, dtype) -> None:
    resources = compile_triton([specimen], [arch], [dtype])
    assert resources
    assert not cross_compile.excesses(resources, cross_compile.read_budgets())
    assert all(r.spill_bytes <= MOST_SPILLED for r in resources)
    assert arch > 70 or all(r.shared_bytes <= VOLTA_SHARED for r in resources)


@pytest.mark.parametrize("arch", [80, 90])
def test_only_kernels_with_a_dot_have_one(arch) -> None:
    """Triton makes a TF32 dot of some sums of products, inexact, and wrong where few are added up."""
    without = [
        x for x in specimens() if "tl.dot" not in Path(x.module.__file__).read_text() and "x 1024" not in x.shape
    ]
    jobs = {job(launch, arch) for x in without for launch in x.launches(torch.float32, arch)}
    assert len(jobs) > 10
    assert not [one.name for one in jobs if "mma" in binary_of(one).asm["ptx"]]


def test_everything_that_is_launched_has_a_specimen() -> None:
    functions = {function for op in OPERATIONS.values() if "triton" in op.kernels for function in op.functions}
    assert {specimen.function for specimen in MAIN} == functions


def test_budgets_are_the_largest_values_and_replace_only_what_was_measured() -> None:
    def taken(arch: int, registers: int, shared: int) -> Resources:
        return Resources("a", "triton", arch, "fp16", "any", 128, registers, 0, shared)

    most = cross_compile.budgets([taken(70, 32, 8), taken(70, 40, 4)])
    assert most == {"a": {"sm_70": {"registers": 40, "spill_bytes": 0, "shared_bytes": 8}}}
    assert cross_compile.merged({"a": {"sm_80": {}, "sm_70": {}}, "b": {"sm_70": {}}}, most) == {
        "a": {"sm_70": most["a"]["sm_70"], "sm_80": {}},
        "b": {"sm_70": {}},
    }
    assert not cross_compile.excesses([taken(70, 40, 8)], most)
    (said,) = cross_compile.excesses([taken(70, 41, 8)], most)
    assert said == "a, sm_70, fp16, any: 41 registers, allowed 40"
    assert len(cross_compile.excesses([taken(90, 41, 8)], most)) == 2


def test_the_table_names_everything() -> None:
    text = cross_compile.render([Resources("norm", "cuda", 80, "fp16", "d = 40", 128, 64, 4, 512)])
    row = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert row == ["norm", "cuda", "sm_80", "fp16", "d = 40", "64", "4", "512", "128", "50%"]


def test_what_ptxas_says() -> None:
    log = """ptxas info    : Compiling entry function 'one' for 'sm_80'
ptxas info    : Function properties for one
    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]
ptxas info    : Compiling entry function 'two' for 'sm_80'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 24 registers, used 0 barriers, 380 bytes cmem[0]
"""
    assert ptxas_usage(log) == {"one": (255, 20, 1024), "two": (24, 0, 0)}


@triton.jit(do_not_specialize=["size"])
def _kernel(x, pair, n, size, scale, BLOCK: tl.constexpr):
    tl.store(x + tl.arange(0, BLOCK) + n, scale)


def test_launches_are_specialised_as_the_jit_would() -> None:
    x = torch.empty(64, device="meta", dtype=torch.float16)
    args = x, (x[1:], 1, (48, None)), 1, 1, 2.5
    with recorded() as launches:
        launch(_kernel, (1,), *args, BLOCK=16, num_warps=2)
    compiled = job(launches[0], 80)
    assert dict(compiled.signature) == {
        "x": "*fp16",
        "pair": ("*fp16", "constexpr", ("i32", "constexpr")),
        "n": "constexpr",
        "size": "i32",
        "scale": "fp32",
        "BLOCK": "constexpr",
    }
    assert dict(compiled.constants) == {(1, 1): 1, (1, 2, 1): None, (2,): 1, (5,): 16}
    assert compiled.aligned == ((0,), (1, 2, 0))
    assert dict(compiled.options) == {"num_warps": 2}
    for (name, kind), value in zip(compiled.signature, args, strict=False):
        assert native_specialize_impl(BaseBackend, value, False, name != "size", True)[0] == kind


def test_bfloat16_is_left_out_where_there_is_none() -> None:
    assert compile_triton(MAIN, [70], ["bf16"]) == []
