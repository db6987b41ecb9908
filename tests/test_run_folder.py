"""Names and layout of a run's folder: what is documented is what a run leaves."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastmmkd import run_folder
from fastmmkd.errors import UserError


def test_a_run_leaves_what_the_layout_names(trained: Path) -> None:
    assert run_folder.__doc__
    left = {path.name for path in trained.iterdir()} | {path.name for path in (trained / "seed_1").iterdir()}
    documented = re.sub(r"\.json, \.md, \.csv", ".json, results.md, results.csv", run_folder.__doc__)
    for name in left:
        assert re.sub(r"seed_\d+", "seed_<s>", name) in documented, name
    assert run_folder.parts_of_a_run(trained) == [trained / "seed_1", trained / "seed_2"]
    assert run_folder.seeds_with_model(trained, [3, 2, 1]) == [2, 1]
    assert run_folder.is_evaluated(run_folder.seed_directory(trained, 1))
    assert run_folder.phase_marker("teacher") == Path("teacher/teacher.json")


def test_seeds_trained_together(tmp_path: Path) -> None:
    for first in (4, 2):
        folder = run_folder.together_directory(tmp_path, first)
        folder.mkdir()
        (folder / run_folder.GROUP_FILE).touch()
    assert [path.parent.name for path in run_folder.group_files(tmp_path)] == ["together_2", "together_4"]
    assert [path.name for path in run_folder.parts_of_a_run(tmp_path)] == ["together_2", "together_4"]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run\.json: No such file or directory; expected a training run's run\.json"):
        run_folder.read_record(tmp_path)
    (tmp_path / "run.json").write_text('{"config": {}}')
    with pytest.raises(UserError, match="expected the keys config, data_hash, precision"):
        run_folder.read_record(tmp_path)
    (tmp_path / "run.json").write_text('{"config": {}, "data_hash": "0", "precision": "fp32", "version": 1}')
    with pytest.raises(UserError, match=r"run\.json: of version 1, expected 2: positions count .*; train it anew$"):
        run_folder.read_record(tmp_path)
