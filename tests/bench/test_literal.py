"""docs/fidelity.md names code and keys that exist, and lists what separates literal configs from shipped ones."""

from __future__ import annotations

import importlib
import json
import re
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from bench import literal, report
from fastmmkd.blocks import TeacherBlock
from fastmmkd.methods import METHODS

FIDELITY = (report.ROOT / "docs" / "fidelity.md").read_text(encoding="utf-8")
DECISIONS = [cells for line in FIDELITY.splitlines() if len(cells := line.split(" | ")) == 5]
BLOCKS = ("data", "model", "missing", "teacher", "loss", "train", "eval")

CONFIG: dict[str, Any] = {
    "method": "umdf",
    "data": {"path": "data/x.h5"},
    "train": {"task": "regression", "batch_size": 8, "epochs": 3},
    "deepspeed": {
        "optimizer": {"type": "Adam", "params": {"lr": 0.001}},
        "gradient_clipping": 1.0,
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 100}},
    },
}


def write(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(CONFIG | changes))


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    plain = {"optimizer": {"type": "Adam", "params": {"lr": 0.002}}, "scheduler": None}
    for data in ("mosi", "mosei"):
        write(tmp_path / f"umdf_{data}.json")
    write(tmp_path / "umdf_mosi_literal.json", data={"path": "data/x.h5", "clip": None}, deepspeed=plain)
    write(tmp_path / "umdf_mosei_literal.json", data={"path": "data/x.h5", "clip": None})
    return tmp_path


def rows(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]


def test_every_key_that_differs_is_listed_with_the_data_sets_where_it_does(configs: Path) -> None:
    assert rows(literal.literal_table("umdf", configs)) == [
        ["`data.clip`", "10.0", "null", "mosei, mosi"],
        ["`deepspeed.gradient_clipping`", "1.0", "–", "mosi"],
        ["`deepspeed.optimizer.params.lr`", "0.001", "0.002", "mosi"],
        ["`deepspeed.scheduler`", '"WarmupLR"', "null", "mosi"],
    ]


def test_only_methods_with_literal_configs_have_a_table(configs: Path) -> None:
    assert literal.names(configs) == tuple(literal.parts(configs)) == ("literal_umdf",)


def test_the_code_that_decisions_name_is_there() -> None:
    named = [
        name for cells in DECISIONS for name in re.findall(r"`([a-z_]+(?:\.[\w.]+)?:[\w.]+|[a-z_]+\.[\w.]+)`", cells[1])
    ]
    assert named
    for name in named:
        module, _, attribute = name.partition(":")
        code = importlib.import_module(f"fastmmkd.{module}")
        if attribute:
            *owner, last = attribute.split(".")
            of = attrgetter(".".join(owner))(code) if owner else code
            assert hasattr(of, last) or last in of.__annotations__, name


def test_the_keys_that_decisions_name_are_in_the_schema() -> None:
    known = {
        f"{block}.{key}"
        for schema in (method.config for method in METHODS.values())
        for block in BLOCKS
        for key in getattr(schema.model_fields[block].annotation, "model_fields", {})
    } | {f"teacher.{key}" for key in TeacherBlock.model_fields}
    named = {key for cells in DECISIONS for key in re.findall(rf"`((?:{'|'.join(BLOCKS)})\.\w+)`", cells[3])}
    assert named
    assert named <= known
