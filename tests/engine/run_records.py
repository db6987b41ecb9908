"""Reading back what a run wrote, and comparing two runs to the last bit. The phase "" is a seed's last one."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


def records(run: Path, seed: int = 1, phase: str = "") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / f"seed_{seed}" / phase / "metrics.jsonl").read_text().splitlines()]


def without_timings(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    lines = copy.deepcopy(lines)
    for record in lines:
        for key in ("seconds", "validation_seconds", "samples_per_second", "peak_memory_mb", "joules"):
            record["engine"].pop(key, None)
    return lines


def parameters(run: Path, seed: int = 1, phase: str = "") -> dict[str, torch.Tensor]:
    return load_file(str(run / f"seed_{seed}" / phase / "model.safetensors"))


def progress(run: Path, seed: int = 1, phase: str = "") -> dict[str, Any]:
    """What `latest.json` says of a seed alone, but for its files' hashes: DeepSpeed's do not depend on what they hold
    alone. `steps` are those of all epochs."""
    saved = json.loads((run / f"seed_{seed}" / phase / "checkpoints" / "latest.json").read_text())
    (own,) = saved["seeds"]
    return {"tag": saved["tag"], "world_size": saved["world_size"], "steps": saved["step"]} | own


def engine_state(run: Path, seed: int = 1, phase: str = "") -> dict[str, Any]:
    """Everything DeepSpeed saved: weights, optimiser, counters."""
    folder = run / f"seed_{seed}" / phase / "checkpoints" / progress(run, seed, phase)["tag"]
    return {file.name: torch.load(file, weights_only=False) for file in sorted(folder.iterdir())}


def assert_same(a: Any, b: Any, path: str = "") -> None:
    """Equal to the last bit, all the way down."""
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert list(a) == list(b), path
        for key in a:
            assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}.{i}")
    elif isinstance(a, (int, float, str, bool, type(None))):
        assert a == b, path


def assert_same_phase(a: Path, b: Path, seed: int = 1, phase: str = "") -> None:
    assert_same(parameters(a, seed, phase), parameters(b, seed, phase))
    assert_same(engine_state(a, seed, phase), engine_state(b, seed, phase))
    assert without_timings(records(a, seed, phase)) == without_timings(records(b, seed, phase))
    assert progress(a, seed, phase) == progress(b, seed, phase)


def assert_same_run(a: Path, b: Path, seed: int = 1) -> None:
    assert_same_phase(a, b, seed)
    assert (a / f"seed_{seed}" / "evaluation.json").read_text() == (b / f"seed_{seed}" / "evaluation.json").read_text()


def scalars(run: Path, tag: str) -> list[tuple[int, Any]]:
    events = EventAccumulator(str(run / "seed_1" / "tensorboard"))
    events.Reload()
    return [(event.step, pytest.approx(event.value, rel=1e-5)) for event in events.Scalars(tag)]
