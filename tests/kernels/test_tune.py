"""Launch parameters are chosen by measured time; a fake timer stands in for a GPU."""

from __future__ import annotations

import json
import math

import pytest
import torch

from bench import tune
from bench.tune import Measured
from fastmmkd.errors import UserError
from fastmmkd.kernels import parameters, residual_layer_norm
from fastmmkd.kernels.launch import recorded
from fastmmkd.ops.providers import HAS_TRITON
from fastmmkd.testing.specimens import Specimen, specimens

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")

DTYPES = (torch.float32, torch.float16)
DEFAULT, OTHER, THIRD = {"BR": 16}, {"BR": 8}, {"BR": 4}


def norm() -> Specimen:
    return next(x for x in specimens() if x.function == "residual_layer_norm")


def fewest_rows(call) -> float:
    """Faster the fewer rows a block has; 2 do not fit."""
    with recorded() as launches:
        call()
    rows = launches[0].options["BR"]
    return math.inf if rows == 2 else float(rows)


def test_every_candidate_is_timed_and_the_fastest_that_fits_is_chosen() -> None:
    measured = list(tune.measure([norm()], DTYPES, "meta", fewest_rows))
    assert len(measured) == len(DTYPES) * (1 + len(residual_layer_norm.CANDIDATES))
    assert {m.kernel for m in measured} == {"residual_layer_norm"}
    default, *others = measured[: len(measured) // 2]
    assert default.parameters == {"BR": 16, "num_warps": 4}
    assert default.share == 1.0
    assert [m.parameters for m in others] == residual_layer_norm.CANDIDATES
    (chosen,) = tune.fastest(measured)["residual_layer_norm"].values()
    assert chosen["BR"] == 4


def test_calls_of_a_bucket_decide_together() -> None:
    measured = [
        *(Measured("a", "n=16", *time) for time in ((DEFAULT, 1.0), (OTHER, 0.5), (THIRD, 0.7))),
        *(Measured("a", "n=16", *time) for time in ((DEFAULT, 1.0), (OTHER, 1.5), (THIRD, 0.9))),
        *(Measured("a", "n=32", *time) for time in ((DEFAULT, 1.0), (OTHER, 0.5), (THIRD, 0.7))),
    ]
    assert tune.fastest(measured) == {"a": {"n=16": THIRD, "n=32": OTHER}}


def test_the_default_stays_unless_another_is_clearly_faster() -> None:
    measured = [Measured("a", "n=16", DEFAULT, 1.0), Measured("a", "n=16", OTHER, 0.99)]
    assert tune.fastest(measured) == {"a": {"n=16": DEFAULT}}
    assert tune.fastest([measured[0], Measured("a", "n=16", OTHER, math.inf)]) == {"a": {"n=16": DEFAULT}}


def test_the_table_keeps_what_was_not_measured(tmp_path) -> None:
    table = tmp_path / "launch_parameters.json"
    tune.write(table, "sm_80", {"a": {"n=16": DEFAULT, "n=32": DEFAULT}, "b": {"n=16": DEFAULT}})
    tune.write(table, "sm_90", {"a": {"n=16": OTHER}})
    tune.write(table, "sm_80", {"a": {"n=16": THIRD}})
    assert json.loads(table.read_text()) == {
        "sm_80": {"a": {"n=16": THIRD, "n=32": DEFAULT}, "b": {"n=16": DEFAULT}},
        "sm_90": {"a": {"n=16": OTHER}},
    }


def test_a_launch_takes_what_the_table_says(tmp_path, monkeypatch) -> None:
    table = tmp_path / "launch_parameters.json"
    tune.write(table, "sm_90", tune.fastest(tune.measure([norm()], DTYPES, "meta", fewest_rows)))
    monkeypatch.setattr(parameters, "TABLE", table)
    parameters._table.cache_clear()
    try:
        rows = [norm().launches(torch.float16, arch)[0].options["BR"] for arch in (90, 80)]
    finally:
        parameters._table.cache_clear()
    assert rows == [4, 16]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(UserError, match="no CUDA device"):
        tune.main([])
