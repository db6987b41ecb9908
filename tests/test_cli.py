"""The command line: what a command imports, and what it refuses before anything heavy is imported."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import fastmmkd
from fastmmkd.cli import main, train_main
from fastmmkd.engine import commands
from fastmmkd.errors import Lost

ROOT = Path(__file__).parents[1]
LATER = ("deepspeed", "matplotlib", "tensorboard")
HEAVY = ("torch", "sklearn", *LATER)
COMMANDS = (
    *(
        (),
        ("train",),
        ("eval",),
        ("predict",),
        ("report",),
        ("ablate",),
        ("suite",),
        ("profile",),
        ("build",),
        ("env",),
    ),
    *(("data",), ("data", "import"), ("data", "inspect"), ("data", "synth")),
)


def run(code: str, heavy: tuple[str, ...] = HEAVY) -> list[str]:
    """The lines that a fresh Python prints; the last names the heavy packages that it has imported."""
    code += f"\nimport sys\nprint(*(name for name in {heavy} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return (done.stdout + done.stderr).split("\n")[:-1]


def test_help_imports_nothing_heavy() -> None:
    calls = [[*command, "--help"] for command in COMMANDS]
    printed = run(
        "from contextlib import suppress\nfrom fastmmkd.cli import main, train_main\n"
        f"for words in {calls}:\n    with suppress(SystemExit):\n        main(words)\n"
        "with suppress(SystemExit):\n    train_main(['--help'])"
    )
    assert printed[-1] == ""
    assert sum(line.startswith("usage: ") for line in printed) == len(COMMANDS) + 1


def test_every_command_is_tried(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    listed = capsys.readouterr().out.partition("{")[2].partition("}")[0]
    assert set(listed.split(",")) == {command[0] for command in COMMANDS if command}


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"fastmmkd {fastmmkd.__version__}\n"


def test_lost_processes_are_one_line_with_the_command_that_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose(args: object) -> int:
        raise Lost("another process has ended")

    monkeypatch.setattr(commands, "run_train", lose)
    monkeypatch.setenv("RANK", "3")
    host = f"{socket.gethostname()}, rank 3"
    assert train_main(["--local_rank=1", "--config", "a b.json"]) == 1
    said = f"error: {host}: another process has ended; to go on, start all processes again: "
    assert capsys.readouterr().err == f"{said}train.py --config 'a b.json' --resume\n"
    assert main(["train", "--config", "a.json", "--resume"]) == 1
    assert capsys.readouterr().err == f"{said}fastmmkd train --config a.json --resume\n"


def test_commands_that_are_for_one_process_refuse_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slurm = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_STEP_NODELIST": "a,b", "WORLD_SIZE": ""}
    for name, value in (slurm | {"RANK": "", "MASTER_ADDR": "", "MASTER_PORT": "", "LOCAL_RANK": ""}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RANK")
    assert main(["report", "runs/a", "--out", "runs/b"]) == 2
    said = "error: fastmmkd report: 2 processes were started; expected one, only train takes several\n"
    assert capsys.readouterr().err == said


class TestRefusals:
    """Before DeepSpeed is imported; what needs no method, before torch is."""

    @pytest.fixture
    def config(self, tiny_config: dict, tmp_path: Path) -> Path:
        path = tmp_path / "tiny.json"
        path.write_text(json.dumps(tiny_config))
        return path

    @staticmethod
    def refusals(*calls: list[str], heavy: tuple[str, ...] = HEAVY) -> list[str]:
        """What each call says as it exits with 2, in one process that has not imported what is heavy by then."""
        code = "from fastmmkd.cli import main\nimport sys\nsys.stderr = sys.stdout\n"
        printed = run(code + f"for words in {list(calls)}:\n    assert main(words) == 2, words", heavy)
        assert printed[-1] == ""
        assert len(printed) == len(calls) + 1
        return [line.removeprefix("error: ") for line in printed[:-1]]

    def test_by_the_config(self, config: Path, tmp_path: Path) -> None:
        train = ["train", "--config", str(config)]
        absent, steps = self.refusals(
            ["train", "--config", str(tmp_path / "none.json")], ["profile", "--config", str(config), "--steps", "0"]
        )
        assert absent.startswith(f"{tmp_path / 'none.json'}: no such config file")
        assert steps == "--steps 0: expected 1 or more"
        unknown, value, teacher = self.refusals(
            [*train, "--set", "train.epoch=2"],
            [*train, "--set", "train.epochs=0"],
            [*train, "--teacher", "runs/other"],
            heavy=LATER,
        )
        assert unknown.startswith(f"{config}: train.epoch: unknown key; ")
        assert value.startswith(f"{config}: train.epochs: expected a number greater than 0, got 0")
        assert teacher.startswith("--teacher runs/other: this run has no teacher phase")

    def test_by_what_cannot_be_a_name(self, config: Path, tmp_path: Path) -> None:
        train, long = ["train", "--config", str(config)], "a" * 300
        found = self.refusals(
            [*train, "--output", ""],
            [*train, "--output="],
            [*train, "--data", ""],
            ["report", "", "--out", "x"],
            [*train, "--output", str(tmp_path / long)],
        )
        assert found[:4] == [
            "after --output: empty; expected a value",
            "--output: empty; expected a value",
            "after --data: empty; expected a value",
            "after report: empty; expected a value",
        ]
        assert found[4].endswith(": File name too long")
        (nothing,) = self.refusals([*train, "--set", 'data.path=""'], heavy=LATER)
        assert nothing == f"{config}: data.path: expected the name of a file"

    def test_by_the_data_file(self, config: Path, tiny_store: Path, tmp_path: Path) -> None:
        words, absent = ["--config", str(config)], str(tmp_path / "absent.h5")
        out = ["--out", str(tmp_path / "out")]
        lines = self.refusals(["train", *words, "--data", absent], ["profile", *words, "--data", absent])
        lines += self.refusals(
            ["suite", *words, *out, "--data", absent], ["ablate", *words, *out, "--data", absent], heavy=LATER
        )
        assert all(line.startswith(f"{absent}: no such data file; import the real features") for line in lines)
        large = f"train.batch_size: 41, but {tiny_store} has 40 training samples; expected at most that"
        large += ", --set train.batch_size=40"
        big = ["--set", "train.batch_size=41"]
        assert self.refusals(["train", *words, *big], ["profile", *words, *big]) == [large, large]
        assert self.refusals(["suite", *words, *out, *big], heavy=LATER) == [f"tiny: {large}"]
        kind, metric = self.refusals(
            ["train", *words, "--set", "train.task=emotions-binary"],
            ["train", *words, "--set", "train.select=f1"],
            heavy=LATER,
        )
        assert kind.startswith(f"train.task: emotions-binary needs emotions labels, {tiny_store} has score labels")
        assert metric.startswith("train.select: 'f1' is no metric of regression; expected one of f1_non0, ")

    def test_by_the_runs_folder(self, config: Path, trained: Path, tmp_path: Path) -> None:
        stray = tmp_path / "stray"
        (stray / "seed_1").mkdir(parents=True)
        train = ["train", "--config", str(config), "--out"]
        held, no_run, no_model = self.refusals(
            [*train, str(trained)], [*train, str(stray)], ["eval", "--run", str(tmp_path)]
        )
        other, no_file = self.refusals(
            [*train, str(trained), "--resume", "--seeds", "1,2", "--set", "model.width=16"],
            ["predict", "--run", str(trained), "--data", str(config), "--out", str(tmp_path / "a.csv")],
            heavy=LATER,
        )
        assert held == f"{trained}: already holds a run; expected --resume to continue it, or another --out"
        assert other == f"{trained / 'run.json'}: --resume with another config: model.width was 8, is 16"
        assert no_run == f"{stray}: holds seed_1 but no run.json; expected a run, or an empty folder"
        assert no_model.startswith(f"{tmp_path / 'run.json'}: ")
        assert no_file.startswith(f"{config}: a file of this name cannot be told apart, expected a store (.h5)")
