"""Building and leaving out the C++ extension."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastmmkd.ops import extension

ROOT = Path(__file__).parents[1]
RUN_SETUP = "import runpy, sys; sys.argv = ['setup.py', '--name']; {}runpy.run_path('setup.py', run_name='__main__')"


def run(arguments: list[str], folder: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, **variables}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
    )


@pytest.mark.parametrize(
    ("hide", "variables", "reason"),
    [
        ("", {"CXX": "no-such-compiler"}, "no C++ compiler"),
        ("sys.modules['torch'] = None; ", {}, "torch, or setuptools, is not visible to this build"),
    ],
)
def test_without_a_compiler_or_torch_the_package_is_pure_python(hide, variables, reason) -> None:
    done = run(["-c", RUN_SETUP.format(hide)], **variables, FASTMMKD_EXT="auto")
    assert done.returncode == 0
    assert done.stdout.strip() == "fastmmkd"
    expected = f"fastmmkd: the kernels are not compiled now ({reason}); they will be on first use"
    assert [line for line in done.stderr.splitlines() if "kernels are not" in line] == [expected]
    forced = run(["-c", RUN_SETUP.format(hide)], **variables, FASTMMKD_EXT="cpu")
    assert forced.returncode == 1
    assert forced.stderr.splitlines()[-1] == f"FASTMMKD_EXT=cpu: {reason}"


def test_where_there_is_a_compiler_there_is_the_extension() -> None:
    """Else every test that needs it would be left out, and nobody would notice."""
    if os.environ.get("FASTMMKD_EXT") != "none" and shutil.which("c++"):
        assert extension.missing == ""


def test_leaving_the_extension_out_and_misspelling_it() -> None:
    assert run(["setup.py", "--name"], FASTMMKD_EXT="none").returncode == 0
    wrong = run(["setup.py", "--name"], FASTMMKD_EXT="gpu")
    assert wrong.returncode == 1
    assert wrong.stderr.strip() == "FASTMMKD_EXT=gpu: expected one of auto, cpu, cuda, none"


def test_sources_that_do_not_compile(tmp_path) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("fastmmkd", "kernels", "csrc"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "fastmmkd" / "building.py", tmp_path / "fastmmkd")
    (tmp_path / "csrc" / "registration.cpp").write_text("not C++")
    done = run(["setup.py", "build_ext", "--inplace"], tmp_path, FASTMMKD_EXT="auto")
    assert done.returncode == 0
    assert "the kernels are not compiled now (it does not compile: " in done.stderr
    forced = run(["setup.py", "build_ext", "--inplace"], tmp_path, FASTMMKD_EXT="cpu")
    assert forced.returncode == 1
    assert forced.stderr.splitlines()[-1].startswith("FASTMMKD_EXT=cpu: it does not compile: ")


PROBE = """
import torch, fastmmkd
from fastmmkd import ops
from fastmmkd.ops import extension
assert fastmmkd.__file__.startswith({folder!r}), fastmmkd.__file__
x = torch.randn(2, 3, 8)
with ops.use_provider("cpp"):
    fast = ops.residual_layer_norm(x, x, x[:, 0], x[:, 1])
with ops.use_provider("reference"):
    torch.testing.assert_close(fast, ops.residual_layer_norm(x, x, x[:, 0], x[:, 1]))
print(extension.build_info()["torch"], extension.build_info()["instruction set"])
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_the_extension_compiles_from_source(tmp_path) -> None:
    import torch

    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    for folder in ("fastmmkd", "kernels", "csrc"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    built = run(["setup.py", "build_ext", "--inplace"], tmp_path, FASTMMKD_EXT="cpu")
    assert built.returncode == 0, built.stdout + built.stderr
    used = run(["-c", PROBE.format(folder=str(tmp_path))], tmp_path, FASTMMKD_ISA="baseline")
    assert used.stdout.split() == [torch.__version__.split("+")[0], "baseline"], used.stderr
    unknown = run(["-c", "from fastmmkd.ops import extension; print(extension.missing)"], tmp_path, FASTMMKD_ISA="sse9")
    assert "FASTMMKD_ISA=sse9: not one that this CPU has" in unknown.stdout + unknown.stderr
