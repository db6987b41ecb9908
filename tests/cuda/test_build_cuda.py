"""How the CUDA kernels are compiled, declared and built, as far as that shows without a GPU."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import cpp_extension

from bench import cross_compile_cuda
from bench.cross_compile_cuda import compile_cuda
from fastmmkd.errors import UserError
from fastmmkd.ops import OPERATIONS
from tests.cuda.emulated import COMPILER, built, needs_compiler, operations

ROOT = Path(__file__).parents[2]
needs_nvrtc = pytest.mark.skipif(bool(cross_compile_cuda.missing()), reason=cross_compile_cuda.missing() or "-")


@needs_compiler
def test_the_operations_have_the_schemas_of_the_package() -> None:
    operations()
    schemas = [x for x in torch._C._jit_get_all_schemas() if x.name.startswith("fastmmkd_emulated::")]
    of_package = {name for op in OPERATIONS.values() if "cuda" in op.kernels for name in op.functions}
    assert {schema.name.split("::")[1] for schema in schemas} == of_package
    for schema in schemas:
        name = schema.name.split("::")[1]
        package = str(getattr(torch.ops.fastmmkd, name).default._schema)
        assert str(schema).removeprefix("fastmmkd_emulated::") == package.removeprefix("fastmmkd::")


@needs_compiler
@needs_nvrtc
def test_the_binding_fits_the_headers_of_torch_for_cuda() -> None:
    includes = [*cpp_extension.include_paths(), *map(str, cross_compile_cuda.includes())]
    command = [str(COMPILER), "-std=c++20", "-fsyntax-only", "-DC10_CUDA_NO_CMAKE_CONFIGURE_FILE", "-Wall"]
    command += [f"-isystem{path}" for path in includes]
    command += [f"-I{ROOT / 'csrc'}", str(ROOT / "csrc" / "cuda" / "binding.cpp")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


@needs_nvrtc
def test_no_kernel_spills_and_all_fit_on_sm_70() -> None:
    found = compile_cuda(70)
    assert {x.dtype for x in found} == {"fp32", "fp16", "fp32 + fp16", "fp16 + fp32"}
    assert [x for x in found if x.spill_bytes] == []
    assert all(x.shared_bytes <= 48 * 1024 for x in found)
    assert all(x.occupancy() > 0 for x in found)


@needs_nvrtc
@pytest.mark.parametrize("arch", [75, 80, 90])
def test_no_kernel_spills_elsewhere(arch) -> None:
    found = compile_cuda(arch)
    assert ("bf16" in {x.dtype for x in found}) == (arch >= 80)
    assert [x for x in found if x.spill_bytes] == []


@needs_compiler
@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm")
def test_every_instantiation_is_compiled_for_every_architecture() -> None:
    """The launchers' own instantiations, as the emulation's library names them, against the list."""
    source = "".join(f.read_text() for f in (ROOT / "csrc" / "cuda").glob("*.cuh"))
    names = re.findall(r"__global__ void __launch_bounds__\([^)]*\) (\w+)\(", source)
    symbols = subprocess.run(["nm", "-C", built()], capture_output=True, text=True, check=True).stdout
    found = set(re.findall(rf"fastmmkd::cuda::((?:{'|'.join(names)})(?:<[^(]*>)?)\(", symbols))
    assert found == {kernel.name for kernel in cross_compile_cuda.kernels()}


@needs_nvrtc
def test_an_architecture_that_is_not_there() -> None:
    with pytest.raises(UserError, match="sm_60: expected one of 70, 75, 80, 90"):
        compile_cuda(60)


def setup_name(before: str = "", **variables: str) -> subprocess.CompletedProcess:
    """`setup.py --name` after the statements `before`."""
    run = (
        f"import runpy, sys; {before}sys.argv = ['setup.py', '--name']; runpy.run_path('setup.py', run_name='__main__')"
    )
    environment = {**os.environ, **variables}
    return subprocess.run([sys.executable, "-c", run], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_cuda_is_left_out_with_a_reason_and_insisted_on_loudly() -> None:
    pretend = "import torch; torch.version.cuda = None; "
    done = setup_name(pretend, FASTMMKD_EXT="auto")
    assert done.returncode == 0
    assert "fastmmkd: no CUDA kernels (torch is a build without CUDA)" in done.stderr.splitlines()
    forced = setup_name(pretend, FASTMMKD_EXT="cuda")
    assert forced.returncode == 1
    assert forced.stderr.splitlines() == ["FASTMMKD_EXT=cuda: torch is a build without CUDA"]


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_what_a_toolkit_is_used_for(tmp_path) -> None:
    """A toolkit of two lines stands in; the module is described, not built."""
    toolkit = tmp_path / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "include").mkdir()
    (toolkit / "lib64").mkdir()
    (toolkit / "include" / "cuda_runtime_api.h").touch()
    nvcc = toolkit / "bin" / "nvcc"
    nvcc.write_text(
        "#!/bin/sh\n"
        "if [ $1 = --version ]; then echo 'Cuda compilation tools, release 12.8, V12.8.1'; "
        "else printf 'compute_70\\ncompute_80\\ncompute_100\\n'; fi\n"
    )
    nvcc.chmod(0o755)
    pretend = (
        "import torch, setuptools; torch.version.cuda = '{}'; "
        "torch.cuda._is_compiled, torch.cuda.is_available = lambda: True, lambda: False; "
        "setuptools.setup = lambda **given: [print(x.sources, x.define_macros) for x in given['ext_modules']]; "
    )
    variables = {"CUDA_HOME": str(toolkit), "FASTMMKD_EXT": "cuda"}
    described = setup_name(pretend.format("12.6"), **variables, TORCH_CUDA_ARCH_LIST="").stdout
    assert "'csrc/cuda/binding.cpp', 'csrc/cuda/cross_attention.cu'" in described
    assert "'csrc/cpu/cross_attention.cpp'" in described
    assert "12.8 for 7.0;8.0+PTX" in described
    assert "12.8 for 8.6" in setup_name(pretend.format("12.6"), **variables, TORCH_CUDA_ARCH_LIST="8.6").stdout
    other = setup_name(pretend.format("13.0"), **variables)
    assert other.stderr.splitlines()[-1] == "FASTMMKD_EXT=cuda: nvcc is 12.8, torch is built for CUDA 13.0"
