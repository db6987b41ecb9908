"""`fastmmkd ablate`: its rows, and which of them share a teacher."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastmmkd import run_results
from fastmmkd.blocks import Config
from fastmmkd.cli import main
from fastmmkd.config import load_config
from fastmmkd.engine import run
from fastmmkd.engine.suite import slug
from fastmmkd.errors import UserError
from fastmmkd.evaluation import plots, results
from fastmmkd.methods import METHODS

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize("method", [name for name, method in METHODS.items() if method.ablations])
def test_every_row_is_a_config_of_its_own(method: str) -> None:
    rows = METHODS[method].ablations
    first, *others = rows
    configs = {name: load_config(CONFIGS / f"{method}_mosi.json", list(rows[name])) for name in rows}
    assert configs[first] == load_config(CONFIGS / f"{method}_mosi.json")
    assert configs[first].method == method
    for i, name in enumerate(others):
        assert configs[name] not in [configs[other] for other in (first, *others[:i])], name
    assert len({slug(name) for name in configs}) == len(configs)


@pytest.mark.usefixtures("process_state")
def test_rows_are_trained_and_reported(
    tiny_config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plots, "curves", lambda path, runs: path.touch())
    monkeypatch.setattr(plots, "confusion", lambda path, results: path.touch())
    monkeypatch.setattr(run_results, "draw_embedding", lambda *arguments: None)
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_config | {"train": tiny_config["train"] | {"epochs": 1}}))
    rows, out = ("w/o L_logits", "UMDF"), tmp_path / "out"
    command = ["ablate", "--config", str(tmp_path / "tiny.json"), "--out", str(out), "--seeds", "3"]
    assert main([*command, "--only", rows[0], "--only", slug(rows[1])]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == ["UMDF: to do", "w/o L_logits: to do"]
    assert {path.name for path in out.iterdir() if path.is_dir()} == {"umdf", "without_l_logits"}
    assert results.read(out / "umdf").seeds == [3]
    record = json.loads((out / "without_l_logits" / "run.json").read_text())
    assert record["config"]["loss"]["lambda_logits"] == 0
    assert "| UMDF - w/o L_logits " in (out / "report.md").read_text()


def test_a_method_without_ablations(
    tiny_config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(METHODS, "umdf", replace(METHODS["umdf"], ablations={}))
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(tiny_config))
    assert main(["ablate", "--config", str(config), "--out", str(tmp_path / "out")]) == 2
    others = ", ".join(name for name, method in METHODS.items() if method.ablations)
    expected = f"error: {config}: UMDF has no ablations; expected a config of one of {others}\n"
    assert capsys.readouterr().err == expected


def test_a_row_that_is_not_there(tiny_config: dict, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "tiny.json").write_text(json.dumps(tiny_config))
    arguments = ["--config", str(tmp_path / "tiny.json"), "--out", str(tmp_path), "--only", "w/o MICM"]
    assert main(["ablate", *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: --only w/o MICM: no such row; expected one of UMDF, w/o L_fea, ")


class TestTeachers:
    """Rows of one architecture share the teachers that the full method trains first."""

    @pytest.fixture
    def teachers(self, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
        """Row's folder -> the folder its teachers come from, filled by `ablate`; training leaves teachers only."""
        sources: dict[str, str | None] = {}

        def train(config: Config, output: Path, resume: bool, teacher: Path | None) -> None:
            sources[output.name] = teacher and teacher.name
            for seed in config.train.seeds if config.teacher else ():
                folder = output / f"seed_{seed}" / "teacher"
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "teacher.json").touch()
            raise UserError("there are no results")

        monkeypatch.setattr(run, "train_run", train)
        self.data, self.out = str(tiny_store), tmp_path
        return sources

    def ablate(self, method: str, *rows: str) -> None:
        only = [argument for name in rows for argument in ("--only", name)]
        config = str(CONFIGS / f"{method}_mosi.json")
        small = ["--data", self.data, "--set", "train.batch_size=8"]
        assert main(["ablate", "--config", config, *small, "--out", str(self.out), *only]) == 2

    def test_corrkd(self, teachers: dict[str, Any]) -> None:
        self.ablate("corrkd")
        shared = dict.fromkeys(("without_scd", "without_cpd", "without_rcd"), "corrkd")
        assert teachers == {"corrkd": None} | shared | {"without_distillation": None}

    def test_hrlf_without_frf_has_an_architecture_of_its_own(self, teachers: dict[str, Any]) -> None:
        self.ablate("hrlf")
        shared = dict.fromkeys(("without_hmi", "without_hal"), "hrlf")
        assert teachers == {"hrlf": None, "without_frf": None} | shared | {"without_distillation": None}

    def test_teachers_of_an_earlier_call_are_used(self, teachers: dict[str, Any]) -> None:
        self.ablate("corrkd", "w/o SCD")
        assert teachers == {"without_scd": None}
        self.ablate("corrkd", "CorrKD", "w/o CPD")
        teachers.clear()
        self.ablate("corrkd", "w/o RCD")
        assert teachers == {"without_rcd": "corrkd"}

    def test_a_row_trains_its_own_where_a_seed_has_none(self, teachers: dict[str, Any]) -> None:
        self.ablate("corrkd", "CorrKD", "w/o SCD")
        (self.out / "corrkd" / "seed_1" / "teacher" / "teacher.json").unlink()
        teachers.clear()
        self.ablate("corrkd", "w/o RCD")
        assert teachers == {"without_rcd": None}
