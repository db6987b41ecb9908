"""Models whose files are whole and whose numbers are not what a training leaves."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fastmmkd
from fastmmkd.errors import UserError
from fastmmkd.model_file import serialised

Tensors = dict[str, torch.Tensor]
pytestmark = pytest.mark.usefixtures("process_state")


@pytest.fixture
def model(trained: Path, tmp_path: Path) -> Path:
    """The model of a copy of the trained run."""
    return shutil.copytree(trained, tmp_path / "run") / "seed_1" / "model.safetensors"


def put(name: str, value: float) -> Callable[[Tensors], None]:
    """Change the first number of a tensor."""

    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[0] = value

    return change


def as_integers(tensors: Tensors) -> None:
    tensors["head.weight"] = tensors["head.weight"].to(torch.int64)


def flat(tensors: Tensors) -> None:
    tensors["normalisation.audio.mean"] = tensors["normalisation.audio.mean"][None]


def lost(tensors: Tensors) -> None:
    del tensors["normalisation.visual.std"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("head.weight", float("nan")), "head.weight holds NaN or infinity, expected finite numbers"),
        (put("head.weight", float("-inf")), "head.weight holds NaN or infinity, expected finite numbers"),
        (as_integers, "head.weight is int64, expected floating-point numbers"),
        (
            put("normalisation.audio.mean", float("inf")),
            "normalisation.audio.mean holds NaN or infinity, expected finite",
        ),
        (
            put("normalisation.audio.std", float("nan")),
            "normalisation.audio.std holds NaN or infinity, expected finite",
        ),
        (put("normalisation.audio.std", 0.0), "normalisation.audio.std[0] is 0, expected a positive number"),
        (put("normalisation.visual.std", -1.0), "normalisation.visual.std[0] is -1, expected a positive number"),
        (flat, "normalisation.audio.mean and std are [1, 4] and [4], expected [d] each"),
        (lost, "not an exported model: there is no normalisation.visual.std"),
    ],
)
def test_a_model_that_cannot_predict(model: Path, change: Callable[[Tensors], None], message: str) -> None:
    """Its hash is right: somebody wrote it so."""
    tensors = load_file(model)
    change(tensors)
    model.write_bytes(serialised(tensors, {}))
    with pytest.raises(UserError) as caught:
        fastmmkd.load(model.parents[1])
    assert str(caught.value).startswith(f"{model}: {message}")
    assert "\n" not in str(caught.value)


def test_what_a_training_left_is_taken(model: Path) -> None:
    model.write_bytes(serialised(load_file(model), {}))
    fastmmkd.load(model.parents[1])
