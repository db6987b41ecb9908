"""Records are appended and found again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import records
from fastmmkd.errors import UserError

CPU = torch.device("cpu")


def test_a_record_never_replaces_another(tmp_path: Path) -> None:
    paths = [
        records.append("kernels", {"n": 1}, CPU, tmp_path, "2026-01-02"),
        records.append("kernels", {"n": 2}, CPU, tmp_path, "2026-01-02"),
        records.append("parity", {"n": 3}, CPU, tmp_path, "2026-01-01"),
        records.append("kernels", {"n": 0}, CPU, tmp_path, "2025-12-31"),
    ]
    assert [path.name for path in paths] == [
        "2026-01-02_kernels_1.json",
        "2026-01-02_kernels_2.json",
        "2026-01-01_parity_1.json",
        "2025-12-31_kernels_1.json",
    ]
    newest = records.newest(tmp_path)
    assert {kind: record["n"] for (kind, _), record in newest.items()} == {"kernels": 2, "parity": 3}


def test_the_tenth_of_a_day_is_newer_than_the_ninth(tmp_path: Path) -> None:
    for n in range(1, 12):
        records.append("kernels", {"n": n}, CPU, tmp_path, "2026-01-02")
    assert [record["n"] for record in records.newest(tmp_path).values()] == [11]


def test_a_record_says_what_it_was_taken_on(tmp_path: Path) -> None:
    path = records.append("parity", {}, CPU, tmp_path)
    record = records.read(path)
    assert record["schema"] == 1
    assert {"python", "torch", "triton", "deepspeed"} <= set(record["versions"])
    assert record["device"]["threads"] == torch.get_num_threads()
    assert path.parent.name == records.slug(record["device"])
    assert torch.__version__ in records.described(record)


@pytest.mark.parametrize(
    ("device", "slug"),
    [
        ({"name": "AMD EPYC", "threads": 2, "instruction set": "avx512"}, "amd_epyc_2_threads_avx512"),
        ({"name": "NVIDIA H100 80GB HBM3", "capability": "9.0"}, "nvidia_h100_80gb_hbm3"),
    ],
)
def test_slugs(device: dict, slug: str) -> None:
    assert records.slug(device) == slug


def test_another_schema_is_refused(tmp_path: Path) -> None:
    path = records.append("parity", {}, CPU, tmp_path)
    path.write_text(json.dumps({"fastmmkd": 1}))
    with pytest.raises(UserError, match="not a record of schema 1"):
        records.newest(tmp_path)
