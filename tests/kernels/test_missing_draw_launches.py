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
    assert launch.grid[2] == 3


def test_no_launch_without_rows() -> None:
    features, masks, present, sample, seed, *rest = DRAWS[0].arguments(Make(torch.float16))
    with recorded() as launches:
        drawn, _ = missing_draw(features, masks, present, sample[:, :0], seed, *rest)
    assert not launches
    assert drawn[0].shape == (1, 0, *features[0].shape[1:])


def test_more_modalities_than_a_launch_takes() -> None:
    features, masks, *rest = DRAWS[0].arguments(Make(torch.float16))
    with pytest.raises(UserError, match="4 modalities; expected 1 to 3"):
        missing_draw([*features, features[0]], [*masks, masks[0]], *rest)
