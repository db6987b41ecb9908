"""What can be imported as `fastmmkd.<name>`: the package and its kernels, nothing else that a checkout holds."""

from __future__ import annotations

import inspect
import os
import pickle
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import fastmmkd
from fastmmkd.kernels import launch, parameters

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", ["tests", "bench", "setup", "train", "configs", "csrc", "docs"])
def test_the_rest_of_a_checkout_is_no_part_of_the_package(name: str) -> None:
    assert find_spec(f"fastmmkd.{name}") is None


def test_kernels_are_those_beside_the_package() -> None:
    spec = find_spec("fastmmkd.kernels")
    assert spec is not None
    assert spec.origin == str(ROOT / "kernels" / "__init__.py")
    assert launch.__file__ == str(ROOT / "kernels" / "launch.py")
    assert list(fastmmkd.__path__) == [str(ROOT / "fastmmkd")]


def test_kernels_have_one_name_and_their_source() -> None:
    assert pickle.loads(pickle.dumps(parameters.power_of_two)) is parameters.power_of_two
    assert "def power_of_two" in inspect.getsource(parameters.power_of_two)
    pytest.importorskip("triton")
    from fastmmkd.kernels import rows

    assert "def load_rows(" in inspect.getsource(rows.load_rows.fn)


@pytest.mark.parametrize("folder", [ROOT, ROOT / "kernels"])
def test_another_process_finds_them_too(folder: Path) -> None:
    """From the checkout's root, and where a folder of the same names comes first."""
    code = "import fastmmkd.kernels.launch as module; print(module.__name__, module.__file__)"
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    printed = subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True)
    assert printed.stdout.split() == ["fastmmkd.kernels.launch", str(ROOT / "kernels" / "launch.py")], printed.stderr


def test_an_installation_has_the_sources_and_the_papers_tables(tmp_path: Path) -> None:
    """What `pip install` copies, without compiling anything."""
    command = ["setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "build_py", "-d", str(tmp_path / "lib")]
    environment = os.environ | {"FASTMMKD_EXT": "none"}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    package = tmp_path / "lib" / "fastmmkd"
    for name in ("_docs/paper_results.json", "_csrc/registration.cpp", "kernels/launch_parameters.json"):
        assert (package / name).exists()
    assert [path.name for path in (package / "_docs").iterdir()] == ["paper_results.json"]
    code = "from fastmmkd.evaluation import published; print(published.path(), len(published.shipped().rows))"
    printed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "lib", capture_output=True, text=True)
    assert printed.stdout.split() == [str(package / "_docs" / "paper_results.json"), "170"], printed.stderr
