"""Files that once were read wrongly are refused or read; and a few new ones that are nearly right."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.fuzz.mutations import mutated
from tests.fuzz.run import CORPUS, Reader
from tests.fuzz.targets import TARGETS

CASES = sorted(path for path in CORPUS.rglob("*") if path.is_file())
OF_FILES = [name for name, target in TARGETS.items() if target.mutable == "*"]
"""Those that need no trained run."""


@pytest.fixture(scope="module")
def reader() -> Iterator[Reader]:
    made = Reader()
    yield made
    made.close()


@pytest.mark.parametrize("case", CASES, ids=lambda path: "/".join(path.relative_to(CORPUS).parts[:2]))
def test_what_was_found(case, reader, trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTMMKD_FUZZ_RUN", str(trained))
    name, _, *file = case.relative_to(CORPUS).parts
    TARGETS[name].make(tmp_path)
    shutil.copy(case, tmp_path.joinpath(*file))
    assert reader.finding(name, tmp_path) == ""


@pytest.mark.parametrize("name", OF_FILES)
def test_files_that_are_nearly_right(name, reader, tmp_path: Path) -> None:
    drawn, right = random.Random(name), tmp_path / "right"
    right.mkdir()
    TARGETS[name].make(right)
    assert reader.finding(name, right) == ""
    for i in range(10):
        folder = tmp_path / str(i)
        shutil.copytree(right, folder)
        file = drawn.choice(sorted(folder.iterdir()))
        file.write_bytes(mutated(file.name, file.read_bytes(), drawn))
        assert reader.finding(name, folder) == ""
