"""Launch parameters: from a table that `python -m bench.tune` measured, or a kernel's own heuristic default.

The table, `launch_parameters.json`, maps architecture ("sm_90") to kernel to bucket to parameters; a bucket has every
size rounded up to a power of two. Nothing is tuned while a model trains. A module's `CANDIDATES` are what tuning tries
in place of its default.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from fastmmkd.kernels.launch import capability

TABLE = Path(__file__).with_name("launch_parameters.json")

Parameters = dict[str, int]


class Asked(NamedTuple):
    """A question to `parameters`."""

    kernel: str
    bucket: str
    default: Parameters


_trials: list[tuple[Parameters, list[Asked]]] = []


def parameters(kernel: str, default: Parameters, device: torch.device, **sizes: int) -> Parameters:
    """What to launch `kernel` with on `device` for these sizes: block sizes, num_warps, num_stages.

    Where the architecture or the bucket was not measured: `default`.
    """
    if _trials:
        candidate, asked = _trials[-1]
        asked.append(Asked(kernel, bucket(sizes), default))
        return default | candidate
    return _table().get(architecture(device), {}).get(kernel, {}).get(bucket(sizes), default)


@contextmanager
def trying(candidate: Parameters) -> Iterator[list[Asked]]:
    """Inside the block `parameters` gives the default with `candidate` in its place, and lists what it was asked."""
    asked: list[Asked] = []
    _trials.append((candidate, asked))
    try:
        yield asked
    finally:
        _trials.pop()


def bucket(sizes: dict[str, int]) -> str:
    """`{"T": 50, "keys": 150}` -> `"T=64,keys=256"`."""
    return ",".join(f"{name}={power_of_two(size)}" for name, size in sorted(sizes.items()))


def power_of_two(size: int) -> int:
    """The least power of two that is at least `size`, and at least 1."""
    return 1 << max(size - 1, 0).bit_length()


@cache
def _table() -> dict[str, dict[str, dict[str, Parameters]]]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {}


def architecture(device: torch.device) -> str:
    """The name of a device's, or a recording's, row in the table: "sm_90"; "" for the CPU."""
    return "" if device.type == "cpu" else "sm_{}{}".format(*capability(device))
