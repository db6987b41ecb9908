"""Kernels that installation did not compile: a wheel brings their sources, the first use compiles them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fastmmkd import building
from fastmmkd.errors import UserError
from fastmmkd.ops import extension, first_use

ROOT = Path(__file__).parents[1]
COPIED = ("setup.py", "pyproject.toml", "README.md", "fastmmkd", "kernels", "csrc", "docs")
TRAINING = """
import sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder)]  # of this checkout
import torch
from fastmmkd import ops
from fastmmkd.ops import extension
x = torch.randn(2, 3, 8)
before, _ = ops.explain("residual_layer_norm", x).provider, extension.ensure()
print(before, ops.explain("residual_layer_norm", x).provider, extension.missing or "loaded")
assert torch.isfinite(ops.residual_layer_norm(x, x, x[:, 0], x[:, 1])).all()
"""
BUILD = """
import sys
sys.modules["torch"] = None
sys.argv = ["setup.py", "-q", *{}]
__file__ = "setup.py"
exec(open("setup.py").read())
"""
needs_extension = pytest.mark.skipif(extension.module is None, reason=extension.missing or "-")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source distribution that a build without torch makes."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("packages")
    for path in map(ROOT.joinpath, COPIED):
        if path.is_dir():
            shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(path, source)
    for command in ("bdist_wheel", "sdist"):
        code = BUILD.format([command, "--dist-dir", str(out)])
        done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    return out


def test_wheel_and_source_distribution_bring_everything(packages) -> None:
    (wheel,) = packages.glob("*.whl")
    (archive,) = packages.glob("*.tar.gz")
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    with tarfile.open(archive) as file:
        in_archive = {name.partition("/")[2] for name in file.getnames()}
    csrc = {str(x.relative_to(ROOT / "csrc")) for x in (ROOT / "csrc").rglob("*") if x.suffix in building.SOURCES}
    kernels = {x.name for x in (ROOT / "kernels").glob("*.py")} | {"launch_parameters.json"}
    assert len(csrc) > 40
    assert {f"fastmmkd/_csrc/{name}" for name in csrc} <= in_wheel
    assert {f"fastmmkd/kernels/{name}" for name in kernels} <= in_wheel
    assert {f"csrc/{name}" for name in csrc} <= in_archive
    assert {f"kernels/{name}" for name in kernels} <= in_archive
    assert "fastmmkd/_docs/paper_results.json" in in_wheel
    assert "docs/paper_results.json" in in_archive
    assert {"setup.py", "pyproject.toml", "fastmmkd/building.py"} <= in_archive


@pytest.mark.slow
def test_an_installed_wheel_compiles_once(packages, tmp_path) -> None:
    (wheel,) = packages.glob("*.whl")
    site, cache = tmp_path / "site", tmp_path / "cache"
    zipfile.ZipFile(wheel).extractall(site)
    environment = {**os.environ, "PYTHONPATH": str(site), "FASTMMKD_CACHE": str(cache)}

    def use() -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-c", TRAINING], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )

    first, second = use(), use()
    assert first.stdout.split() == ["reference", "cpp", "loaded"], first.stderr
    assert [line.split(":")[0] for line in first.stderr.splitlines() if "compil" in line] == ["fastmmkd"] * 2
    assert second.stdout.split() == ["cpp", "cpp", "loaded"]
    assert "compil" not in second.stderr


@needs_extension
def test_it_is_compiled_once_for_all_processes(monkeypatch, tmp_path, capsys) -> None:
    calls = []

    def compiled(csrc: Path, target: Path) -> None:
        calls.append(csrc)
        shutil.copy(extension.module.__file__, target)

    monkeypatch.setenv("FASTMMKD_CACHE", str(tmp_path))
    monkeypatch.setattr(first_use, "_compile", compiled)
    assert first_use.kept() is None
    path = first_use.compile_once()
    assert path == first_use.compile_once() == first_use.kept()
    assert path.parent.parent == tmp_path
    assert calls == [ROOT / "csrc"]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "fastmmkd: compiling the kernels for this machine, once; about a minute ..."
    assert said[1].endswith(f"kept in {path.parent}")


def test_what_does_not_compile_is_said_and_not_tried_again(monkeypatch, tmp_path) -> None:
    calls = []

    def fails(csrc: Path, target: Path) -> None:
        calls.append(csrc)
        raise UserError("the kernels cannot be compiled: no C++ compiler")

    monkeypatch.setenv("FASTMMKD_CACHE", str(tmp_path))
    monkeypatch.setattr(first_use, "_compile", fails)
    for again in (False, False, True):
        with pytest.raises(UserError, match="cannot be compiled: no C\\+\\+ compiler"):
            first_use.compile_once(again)
    assert len(calls) == 2


def test_no_compiler_is_one_line(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"^the kernels cannot be compiled: no C\+\+ compiler$"):
        first_use._compile(ROOT / "csrc", tmp_path / "_C.so")
