"""The programs that the GPU check consists of, on a CPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_bundle, gpu_precompile, gpu_preflight, gpu_smoke, gpu_training, lineup
from bench.gpu_sections import pairs, sections, smoke_tests
from fastmmkd.config import load_config
from fastmmkd.errors import UserError
from fastmmkd.ops import OPERATIONS

ROOT = Path(__file__).parents[2]
HALF = """
import pytest, torch
from bench.pytest_record import importance

@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("value", [1, 2, 3])
def test_values(value, dtype):
    assert value < 3 or dtype is torch.float16, "three is too much"
"""


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(gpu_preflight, "PACKAGES", {"numpy": "numpy", "imaginary": "no_such_module"})
    assert gpu_preflight.main([str(tmp_path / "found.json"), "--rehearse"]) == 1
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["missing"] == ["imaginary: ModuleNotFoundError: No module named 'no_such_module'"]
    assert "python -m bench.gpu_bundle" in capsys.readouterr().out.splitlines()[-1]


def test_a_machine_with_all_that_is_needed_can_be_checked(tmp_path, capsys) -> None:
    assert gpu_preflight.main([str(tmp_path / "found.json"), "--rehearse"]) == 0
    record = json.loads((tmp_path / "found.json").read_text())
    assert record["device works"]
    assert record["packages"]["torch"] != "-"
    assert "the GPU check can run" in capsys.readouterr().out


def test_the_smoke_test_has_a_process_per_operation() -> None:
    assert [op for provider, op in smoke_tests() if provider == "triton"] == [
        name for name, op in OPERATIONS.items() if "triton" in op.kernels
    ]


def test_an_operation_that_is_wrong_and_one_that_dies_are_named(tmp_path, monkeypatch, capsys) -> None:
    tests = tmp_path / "test_two.py"
    tests.write_text(
        "import os\ndef test_add(): assert 1 + 1 == 3\ndef test_die(): os._exit(9)\ndef test_fine(): pass\n"
    )
    monkeypatch.setattr(gpu_smoke, "TESTS", str(tests))
    monkeypatch.setattr(gpu_smoke, "smoke_tests", lambda: [("triton", op) for op in ("add", "die", "fine", "none")])
    monkeypatch.setattr(gpu_smoke, "stand_in", lambda: {"FASTMMKD_PARITY": "cpp"})
    assert gpu_smoke.main([str(tmp_path / "found.json"), "--rehearse"]) == 1
    record = json.loads((tmp_path / "found.json").read_text())
    verdicts = {name: outcome["verdict"] for name, outcome in record.items()}
    assert verdicts == {
        "triton add": "WRONG in 1 of 1 cases",
        "triton die": "FAILED with exit code 9",
        "triton fine": "right (1 cases)",
        "triton none": "FAILED with exit code 5",
    }
    assert "assert (1 + 1) == 3" in capsys.readouterr().out
    assert any("assert (1 + 1) == 3" in text for text in record["triton add"]["failures"].values())


@pytest.mark.parametrize("workers", [1, 2])
def test_failures_are_printed_and_recorded_as_they_come(workers, tmp_path) -> None:
    (tmp_path / "test_half.py").write_text(HALF)
    options = ["-n", str(workers), "--dist", "worksteal"] if workers > 1 else ["-v"]
    command = [sys.executable, "-m", "pytest", "-p", "bench.pytest_record", "--found", str(tmp_path / "found.json")]
    command += ["-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", str(tmp_path), *options, str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert result.returncode == 1
    output = result.stdout.decode()
    assert output.index("three is too much") < output.index("short test summary")
    record = json.loads((tmp_path / "found.json").read_text())
    assert (record["passed"], record["failed"], record["finished"]) == (5, 1, True)
    ((test, traceback),) = record["failures"].items()
    assert test == "test_half.py::test_values[3-torch.float32] (call)"
    assert "three is too much" in traceback
    if workers == 1:  # fp16 comes last
        ran = [line for line in output.splitlines() if "::test_values[" in line and "%]" in line]
        assert ["torch.float16" in line for line in ran] == [False] * 3 + [True] * 3


def test_versions_are_those_of_the_constraints(tmp_path) -> None:
    path = tmp_path / "constraints.txt"
    path.write_text("torch==2.13.0\nTyping_Extensions==4.1 ; python_version == '3.11'\n")
    assert gpu_bundle.pinned(["typing-extensions", "torch"], path) == ["typing-extensions==4.1", "torch==2.13.0"]
    with pytest.raises(UserError, match=r"constraints.txt pins no numpy"):
        gpu_bundle.pinned(["numpy"], path)
    assert len(gpu_bundle.pinned(gpu_bundle.PACKAGES)) == len(gpu_bundle.PACKAGES)


def test_a_bundle_for_another_machine_does_not_fit(tmp_path) -> None:
    assert gpu_bundle.misfit(tmp_path) == f"there is none at {tmp_path}"
    for key, value in gpu_bundle.made_for().items():
        (tmp_path / gpu_bundle.MANIFEST).write_text(json.dumps(gpu_bundle.made_for() | {key: "other"}))
        assert gpu_bundle.misfit(tmp_path) == f"it was made for {key} other, here is {value}"
    (tmp_path / gpu_bundle.MANIFEST).write_text(json.dumps(gpu_bundle.made_for()))
    assert gpu_bundle.misfit(tmp_path) == ""


def test_losses_of_runs_are_compared() -> None:
    runs = [{"losses": [2.0, 1.0]}, {"losses": [2.0, 1.01]}]
    assert gpu_training.difference(runs) == pytest.approx(0.01)
    assert not gpu_training.difference([]) <= gpu_training.ALLOWED


def test_trainings_need_no_program_beside_python() -> None:
    """The `deepspeed` command is not there where its package was brought along."""
    assert {command[0] for command in gpu_training.TRAIN.values()} == {sys.executable}
    assert importlib.util.find_spec("deepspeed.launcher.runner")


@pytest.mark.parametrize(("device", "rehearsed"), [("cuda", False), ("cpu", True)])
def test_contenders_of_the_sections_are_there(device: str, rehearsed: bool) -> None:
    asked = 0
    for section in sections("A", rehearsed) + sections("B", rehearsed):
        if "--variants" in section.command:
            options = dict(pairs(section.command))
            config = load_config(ROOT / options["--config"])
            assert lineup.choose(options["--variants"], lineup.names(config, torch.device(device)))
            asked += 1
    assert asked == 2


def test_a_cache_of_triton_is_filled_and_moved(tmp_path) -> None:
    before = os.environ.get("TRITON_CACHE_DIR")
    count = gpu_precompile.precompile(tmp_path / "made", 90, ["js_divergence"])
    assert count
    assert os.environ.get("TRITON_CACHE_DIR") == before
    assert len(list((tmp_path / "made").rglob("*.cubin"))) > 1
    assert all(not path.stat().st_size for path in (tmp_path / "made").rglob("*.ptx"))
    assert gpu_precompile.settle(tmp_path / "made", tmp_path / "there") == count
    groups = list((tmp_path / "there").rglob("__grp__*.json"))
    paths = [Path(path) for group in groups for path in json.loads(group.read_text())["child_paths"].values()]
    assert len(paths) > len(groups) > 1
    assert all(path.exists() and path.is_relative_to(tmp_path / "there") for path in paths)
