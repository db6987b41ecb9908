"""Commands in odd surroundings: terminals that know ASCII alone, arguments that name no file, pipes and devices."""

from __future__ import annotations

import io
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastmmkd.cli import main
from fastmmkd.data import store
from fastmmkd.data.dataset import Dataset
from fastmmkd.errors import CannotWrite, UserError
from fastmmkd.files import read_json, replacing

pytestmark = pytest.mark.usefixtures("process_state")


def said_in_ascii(monkeypatch: pytest.MonkeyPatch, *words: object) -> str:
    """What a command writes to a standard output that knows ASCII alone."""
    raw = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii", errors="strict", write_through=True))
        assert main(list(map(str, words))) == 0
        return raw.getvalue().decode("ascii")


class TestAsciiTerminals:
    def test_inspect(
        self, tiny_dataset: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        dataset = tiny_dataset()
        dataset.source, dataset.report["notes"] = "Müller", ["naïve"]
        store.write(dataset, tmp_path / "a.h5")
        text = said_in_ascii(monkeypatch, "data", "inspect", tmp_path / "a.h5")
        assert "M\\xfcller" in text
        assert "## " in text
        assert "\\u2588" not in text

    def test_predict(self, trained: Path, tiny_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        out = tmp_path / "für \udcff.csv"
        text = said_in_ascii(monkeypatch, "predict", "--run", trained, "--data", tiny_store, "--out", out)
        assert "f\\xfcr \\udcff.csv: 66 predictions" in text
        assert out.stat().st_size

    def test_report(self, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "160")
        text = said_in_ascii(monkeypatch, "report", trained, "--paper-data", "mosi", "--out", tmp_path / "é")
        assert "+-" in text
        assert "38.52 *" in text
        assert "  published: the papers' numbers on MOSI" in text
        assert "*: worse than" in text
        assert "\\xe9" in text


LONG = "x" * 300


class TestNamesOfNoFile:
    @pytest.mark.parametrize("name", ["", "a\0b", LONG, f"{LONG}/a.h5"])
    @pytest.mark.parametrize(
        "words",
        [
            ["data", "inspect", "NAME"],
            ["data", "import", "--format", "mmsa", "NAME", "--out", "a.h5"],
            ["data", "import", "--format", "csd", "NAME", "--out", "a.h5"],
            ["data", "import", "--format", "mfn", "NAME", "--out", "a.h5"],
            ["data", "synth", "--like", "mosi", "--fraction", "0.01", "--out", "NAME"],
            ["report", "NAME", "--out", "report"],
            ["report", "RUN", "--out", "NAME"],
            ["predict", "--run", "NAME", "--data", "DATA", "--out", "a.csv"],
            ["predict", "--run", "RUN", "--data", "NAME", "--out", "a.csv"],
            ["predict", "--run", "RUN", "--data", "DATA", "--out", "NAME"],
            ["eval", "--run", "NAME"],
            ["eval", "--run", "RUN", "--data", "NAME", "--out", "out"],
            ["train", "--config", "NAME", "--out", "out"],
        ],
        ids=lambda words: " ".join(words),
    )  # fmt: skip
    def test_one_line_and_nothing_is_left(
        self,
        name: str,
        words: list[str],
        trained: Path,
        tiny_store: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        monkeypatch.chdir(tmp_path)
        places = {"NAME": name, "RUN": str(trained), "DATA": str(tiny_store)}
        assert main([places.get(word, word) for word in words]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert said.count("\n") == 1
        assert not any(path.is_file() for path in tmp_path.rglob("*"))

    @pytest.mark.parametrize("name", ["/", "."])
    def test_a_folder_is_not_written_over(
        self, trained: Path, tiny_store: Path, name: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["predict", "--run", str(trained), "--data", str(tiny_store), "--out", name]) == 2
        assert capsys.readouterr().err == f"error: {name}: cannot write this file (it is a folder)\n"


PREDICT = ["predict", "--run", "RUN", "--data", "DATA", "--out", "OUT"]


class TestPipes:
    """They are waited for for ever, and what is no file must not be replaced by one."""

    @pytest.fixture
    def pipe(self, tmp_path: Path) -> Path:
        os.mkfifo(tmp_path / "pipe")
        return tmp_path / "pipe"

    def test_none_is_read(self, pipe: Path) -> None:
        with pytest.raises(UserError, match="pipe: not a file; expected a list"):
            read_json(pipe, "a list")

    def test_none_is_replaced(self, pipe: Path) -> None:
        refused = pytest.raises(CannotWrite, match=r"pipe: cannot write this file \(it is a pipe or a device\)")
        with refused, replacing(pipe) as temporary:
            temporary.write_text("x")
        assert pipe.is_fifo()
        assert [path.name for path in pipe.parent.iterdir()] == ["pipe"]

    @pytest.mark.parametrize(
        ("name", "words", "message"),
        [
            ("run.json", PREDICT, "expected a training run's run.json"),
            ("seed_1/model.safetensors", PREDICT, "expected a trained model"),
            ("results.json", ["report", "RUN", "--out", "OUT"], "expected the results of a run"),
            ("config.json", ["train", "--config", "RUN/config.json", "--out", "OUT"], "expected a config"),
        ],
    )
    def test_in_a_run(
        self,
        name: str,
        words: list[str],
        message: str,
        trained: Path,
        tiny_store: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        run = shutil.copytree(trained, tmp_path / "run")
        (run / name).unlink(missing_ok=True)
        os.mkfifo(run / name)
        places = {"RUN": str(run), "DATA": str(tiny_store), "OUT": str(tmp_path / "out")}
        assert main([places.get(word, word.replace("RUN", str(run))) for word in words]) == 2
        assert capsys.readouterr().err == f"error: {run / name}: not a file; {message}\n"
