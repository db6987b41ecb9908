"""What something was made with."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastmmkd import provenance
from fastmmkd.cli import main


def test_a_package_that_is_not_there_has_no_version() -> None:
    assert provenance.package_version("torch") == torch.__version__
    assert provenance.package_version("no-such-package") is None


def test_the_commit_says_whether_there_are_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"rev-parse": "abc\n", "status": ""}

    def git(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[0] == "git"
        return subprocess.CompletedProcess(command, 0, answers[command[3]])

    monkeypatch.setattr(subprocess, "run", git)
    assert provenance.commit() == "abc"
    answers["status"] = " M setup.py\n"
    assert provenance.commit() == "abc+changes"


@pytest.mark.parametrize("error", [FileNotFoundError("git"), subprocess.CalledProcessError(128, "git")])
def test_without_git_or_its_answer_the_commit_is_unknown(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def no_git(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(subprocess, "run", no_git)
    assert provenance.commit() == "unknown"


def test_a_checkout_trains_without_a_git_binary(
    train_tiny: Callable[..., Path], tiny_config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".git").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "fastmmkd" / "provenance.py"))
    monkeypatch.setenv("PATH", str(tmp_path))
    tiny_config["train"]["epochs"] = 1
    run = train_tiny(tiny_config, tmp_path / "run")
    assert json.loads((run / "run.json").read_text())["commit"] == "unknown"
    assert main(["env"]) == 0


def test_a_cpu_is_named_by_its_architecture() -> None:
    assert provenance.device_name(torch.device("cpu")) == f"{platform.machine()} CPU"
    assert provenance.cpu_brand()


def test_the_code_has_a_hash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same in a checkout, where the kernels lie beside the package, and installed."""
    hashes = []
    for kernels, content in (("kernels", "a"), ("fastmmkd/kernels", "a"), ("fastmmkd/kernels", "another")):
        root = tmp_path / str(len(hashes))
        for name, text in ((f"{kernels}/a.py", content), ("fastmmkd/b.py", "b")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        monkeypatch.setattr(provenance, "__file__", str(root / "fastmmkd" / "provenance.py"))
        hashes.append(provenance.code_hash())
    assert hashes[0] == hashes[1] != hashes[2]
