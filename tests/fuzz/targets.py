"""What reads users' files, each with a right set of files to begin from: `TARGETS`.

A target's files are made in a folder; one of them is then replaced by a mutated one, and the target is run on it. It
may succeed or raise `UserError`. Anything else is a finding.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastmmkd.errors import UserError


@dataclass(frozen=True)
class Target:
    """Something that reads files."""

    make: Callable[[Path], None]
    """Writes right ones into a folder."""
    read: Callable[[Path], object]
    """Reads them."""
    mutable: str = "*"
    """Which files are mutated, as a pattern."""


def _store(folder: Path) -> None:
    from fastmmkd.data import store
    from tests.conftest import make_dataset

    store.write(make_dataset(), folder / "data.h5")


def _read_store(folder: Path) -> None:
    from fastmmkd.data import store

    store.read(folder / "data.h5")


def _inspect(folder: Path) -> None:
    _command("data", "inspect", folder / "data.h5")


def _command(*arguments: object) -> None:
    """A command of `fastmmkd`, which says what is wrong and gives 2."""
    from fastmmkd.cli import main

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([str(argument) for argument in arguments])
    if code not in (0, 2):
        raise AssertionError(f"exit code {code}: {said.getvalue()[-500:]}")
    if code == 2:
        raise UserError(said.getvalue())


def _config(folder: Path) -> None:
    from tests.conftest import make_config

    (folder / "config.json").write_text(json.dumps(make_config(folder / "data.h5")))


def _read_config(folder: Path) -> None:
    from fastmmkd.config import load_config

    load_config(folder / "config.json", [])


def _clips(name: str) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
    from tests.data.layouts import random_clips

    rng = np.random.default_rng(len(name))
    clips = random_clips(rng, 4)
    return clips, np.round(rng.uniform(-3, 3, len(clips)) * 3) / 3


STEPS = {"language": 5, "audio": 5, "visual": 5}
SOURCE_SPLITS = ("train", "valid", "test")


def _mmsa(folder: Path) -> None:
    from tests.data.layouts import dump, mmsa_split

    dump({name: mmsa_split(*_clips(name), name, STEPS) for name in SOURCE_SPLITS}, folder / "data.pkl")


def _mult(folder: Path) -> None:
    from tests.data.layouts import dump, mult_split

    splits = {name: mult_split(clips, y[:, None, None], STEPS) for name in SOURCE_SPLITS for clips, y in [_clips(name)]}
    dump(splits, folder / "data.pkl")


def _mfn(folder: Path) -> None:
    from tests.data.layouts import padded, write_mfn

    for name in SOURCE_SPLITS:
        clips, labels = _clips(name)
        write_mfn(folder, name, {m: padded(clips, m, 5, "left") for m in STEPS}, labels)


def _csd(folder: Path) -> None:
    from tests.data.layouts import write_csd

    rng, keys = np.random.default_rng(0), [f"video{i}[0]" for i in range(6)]
    intervals = np.array([[0.0, 0.4], [0.4, 1.0], [1.0, 1.5]])
    for root, width in (("glove_vectors", 6), ("COVAREP", 4), ("FACET", 3)):
        write_csd(folder / f"{root}.csd", root, {k: (rng.normal(size=(3, width)), intervals) for k in keys})
    labels = {k: (np.array([[float(i % 7 - 3)]]), np.array([[0.0, 1.5]])) for i, k in enumerate(keys)}
    write_csd(folder / "labels.csd", "Opinion Segment Labels", labels)


def _importing(format: str, name: str = "") -> Callable[[Path], None]:
    def read(folder: Path) -> None:
        from fastmmkd.data.importers import import_dataset

        import_dataset(format, folder / name if name else folder, resplit=1 if format == "csd" else None)

    return read


def _run(folder: Path) -> None:
    """A finished run, trained once and copied."""
    made = Path(os.environ["FASTMMKD_FUZZ_RUN"])
    shutil.copytree(made, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.png", "tensorboard", "*.log"))


def _read_run(folder: Path) -> None:
    from fastmmkd.predictor import load_all

    load_all(folder)


def _report(folder: Path) -> None:
    _command("report", folder, "--out", folder / "report")


TARGETS = {
    "config": Target(_config, _read_config),
    "store": Target(_store, _read_store),
    "inspect": Target(_store, _inspect),
    "mmsa": Target(_mmsa, _importing("mmsa", "data.pkl")),
    "mult": Target(_mult, _importing("mult", "data.pkl")),
    "mfn": Target(_mfn, _importing("mfn")),
    "csd": Target(_csd, _importing("csd")),
    "run": Target(_run, _read_run, "*.json*"),
    "model": Target(_run, _read_run, "*.safetensors"),
    "report": Target(_run, _report, "*.json*"),
}
