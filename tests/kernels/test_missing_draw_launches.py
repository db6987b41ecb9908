"""The missing draw takes one launch whatever it draws; from recordings, so no GPU is needed."""

import pytest

pytest.importorskip("triton")

import torch

from fastmmkd.errors import UserError
from fastmmkd.kernels.launch import recorded
from fastmmkd.kernels.missing_draw import missing_draw
from fastmmkd.testing.specimens import Make, specimens

DRAWS = [x for x in specimens() if x.op == "missing_draw"]


@pytest.mark.parametrize("draw", DRAWS, ids=lambda x: x.shape)
def test_one_launch(draw) -> None:
    (launch,) = draw.launches(torch.float16, 80)
    named = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    longest = max(named[f"R{m}"] for m in range(3)) // (named["V"] * named["B"])
    assert launch.grid[0] == named["V"] * named["B"] + 1
    assert (launch.grid[1] - 1) * launch.options["BT"] < longest <= launch.grid[1] * launch.options["BT"]
    assert launch.grid[2] == 3


def test_no_launch_without_rows() -> None:
    *split, sample, seed, epoch, starts, _, _, versions, p_max, exact = DRAWS[0].arguments(Make(torch.float16))
    none = [0] * len(starts)
    keys = sample[:, :0], seed, epoch, [of[:, :1] for of in starts], none, none
    with recorded() as launches:
        drawn, _ = missing_draw(*split, *keys, versions, p_max, exact)
    assert not launches
    assert drawn[0].shape == (1, 0, split[0][0].shape[1])


def test_more_modalities_than_a_launch_takes() -> None:
    features, masks, *rest = DRAWS[0].arguments(Make(torch.float16))
    with pytest.raises(UserError, match="4 modalities; expected 1 to 3"):
        missing_draw([*features, features[0]], [*masks, masks[0]], *rest)
