"""A step's operator calls and launches do not creep up."""

from __future__ import annotations

import pytest
import torch

from fastmmkd.ops import extension
from fastmmkd.ops.providers import HAS_TRITON

if extension.missing or not HAS_TRITON:
    pytest.skip(extension.missing or "triton is not installed", allow_module_level=True)

from bench.observe import PredictedLaunches
from bench.step_counts import CONFIGS, count, main
from bench.workload import Shape
from fastmmkd.config import load_config
from fastmmkd.ops import cross_attention

SMALL = Shape(6, (9, 7, 5))
"""Sizes do not matter for the counts, as long as a loss has more than a few rows."""


@pytest.mark.parametrize(
    ("method", "calls", "launches"), [("umdf", 320, 660), ("corrkd", 320, 320), ("hrlf", 600, 515)]
)
def test_a_step_calls_no_more_than_it_did(method, calls, launches) -> None:
    stages = count(load_config(CONFIGS / f"{method}_mosei.json"), SMALL)
    assert sum(stage.calls for stage in stages.values()) <= calls
    assert sum(stage.launches for stage in stages.values()) <= launches


def test_what_is_counted() -> None:
    x, weight = torch.ones(2, 3, 4, requires_grad=True), torch.ones(2, 4, 4)
    with PredictedLaunches() as view:
        x.transpose(0, 1)
    with PredictedLaunches() as product:
        torch.baddbmm(torch.ones(2, 1, 4), x, weight)
    mask = torch.ones(2, 1, 3, dtype=torch.bool)
    with PredictedLaunches() as attention:
        cross_attention(x[:, None], [x[:, None]], [x[:, None]], [mask], 2).sum().backward()
    assert view.launches == 0
    assert product.launches == 1 + 2  # ones, too
    # sum and its gradient, which is copied as it has no strides; one kernel each way; three sums into x
    assert attention.calls["fastmmkd::cross_attention"] == attention.calls["fastmmkd::cross_attention_backward"] == 1
    assert attention.launches >= 2 + 2


def test_the_command_prints_a_row_for_each_config(capsys) -> None:
    assert main(["--config", str(CONFIGS / "demo.json")]) == 0
    assert "demo" in capsys.readouterr().out
