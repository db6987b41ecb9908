from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from layouts import dump, mult_split, padded, random_clips, write_mfn

from fastmmkd.data import commands, store
from fastmmkd.errors import UserError
from fastmmkd.modalities import MODALITIES

Run = Callable[..., int]


@pytest.fixture
def run() -> Run:
    """Parse and run `data ...` as the command line does."""
    parser = argparse.ArgumentParser()
    commands.register(parser.add_subparsers(required=True))

    def run(*words: object) -> int:
        args = parser.parse_args(["data", *map(str, words)])
        return args.run(args)

    return run


@pytest.fixture
def mmmo(tmp_path: Path) -> Path:
    """A small folder in ICT-MMMO's shape: stars, no language in training, one NaN."""
    folder = tmp_path / "mmmo"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name, n in (("train", 20), ("valid", 4), ("test", 8)):
        clips = random_clips(rng, n)
        kept = [m for m in MODALITIES if (name, m) != ("train", "language")]
        features = {m: padded(clips, m, 5, "left") for m in kept}
        if name == "test":
            features["audio"][0, -1, 0] = np.nan
        write_mfn(folder, name, features, rng.integers(1, 6, n))
    return folder


def test_import_writes_and_says_what_was_cleaned(
    run: Run, mmmo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "new folder" / "mmmo.h5"
    assert run("import", "--format", "mfn", mmmo, "--out", out, "--dtype", "float16") == 0
    text = capsys.readouterr().out
    assert f"wrote {out}" in text
    assert "20/4/8 samples (train/valid/test)" in text
    assert "language 5 x 6, audio 5 x 4, visual 5 x 3" in text
    assert "audio: 1 NaN or infinite values set to 0" in text
    assert "labels stored as label - 3" in text
    assert "language is absent from 20 of 20 samples of train\n" in text
    assert store.read(out).label_map == "label - 3"


def test_import_with_resplit(run: Run, mmmo: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "mmmo.h5"
    run("import", "--format", "mfn", mmmo, "--out", out, "--resplit", 3)
    assert "re-split with seed 3" in capsys.readouterr().out
    dataset = store.read(out)
    assert dataset.report["resplit"]["seed"] == 3
    assert 0 < dataset.splits["train"].present[:, 0].sum() < 20
    assert [len(split) for split in dataset.splits.values()] == [20, 4, 8]


def test_inspect_prints_the_report(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rng = np.random.default_rng(0)
    steps = dict.fromkeys(MODALITIES, 5)
    content = {name: mult_split(random_clips(rng, 4), np.zeros((4, 1, 1)), steps) for name in store.SPLITS}
    run("import", "--format", "mult", dump(content, tmp_path / "mosi_data.pkl"), "--out", tmp_path / "a.h5")
    capsys.readouterr()
    assert run("inspect", tmp_path / "a.h5") == 0
    text = capsys.readouterr().out
    assert "MulT mosi_data.pkl" in text
    assert "lav 4" in text


def test_inspect_checks_the_hash(run: Run, mmmo: Path, tmp_path: Path) -> None:
    import h5py

    run("import", "--format", "mfn", mmmo, "--out", tmp_path / "a.h5")
    with h5py.File(tmp_path / "a.h5", "a") as file:
        file["train/labels"][0] = 0.25
    with pytest.raises(UserError, match="train/labels does not match its stored hash"):
        run("inspect", tmp_path / "a.h5")


def test_synth_writes_what_the_generator_makes(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "synth.h5"
    assert run("synth", "--like", "mosi", "--fraction", 0.02, "--seed", 1, "--out", out) == 0
    assert f"wrote {out}" in capsys.readouterr().out
    assert store.read(out).importer == "synthetic"


def test_an_output_folder_that_cannot_be_made_is_found_before_the_work(run: Run, mmmo: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="file: cannot create this folder"):
        run("import", "--format", "mfn", tmp_path / "nowhere", "--out", tmp_path / "file" / "a.h5")


@pytest.mark.parametrize(
    "words", [["import", "x", "--out", "a.h5"], ["import", "--format", "zip", "x", "--out", "a.h5"], ["synth"], []]
)
def test_bad_usage_exits_with_2(run: Run, words: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*words)
    assert stop.value.code == 2


def test_a_name_that_looks_like_markup(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "dir[" / "b].h5"  # "[/b]" would close a tag
    assert run("synth", "--like", "mosi", "--fraction", 0.01, "--out", out) == 0
    assert f"wrote {out}" in capsys.readouterr().out
