"""How many kernels a loss launches on a GPU, from recordings on the "meta" device: no GPU is needed."""

from collections.abc import Sequence
from importlib import import_module
from itertools import product

import pytest
import torch

pytest.importorskip("triton")

from fastmmkd.kernels.launch import Launch, recorded

INPUTS = {
    "pairwise_contrastive": 2,
    "jsd_mutual_information": 4,
    "gaussian_mmd": 2,
    "prototype_similarity": 2,
    "js_divergence": 2,
}
every_loss = pytest.mark.parametrize("name", INPUTS)


def launches(name: str, n: int, wanted: Sequence[bool], groups: int = 3) -> list[Launch]:
    """What the loss of groups of n rows launches; the shapes of its results are checked."""
    x = torch.empty(groups, n, 40, device="meta")
    inputs = {"jsd_mutual_information": [x, x, x[:, 0], x[:, 0, 0]]}.get(name, [x, x])
    constants = {
        "pairwise_contrastive": [9.0, 0, True],
        "prototype_similarity": [torch.empty(groups, n, dtype=torch.int64, device="meta"), 4],
    }.get(name, [])
    with recorded() as calls:
        loss, *grads = getattr(import_module(f"fastmmkd.kernels.{name}"), name)(*inputs, *constants, list(wanted))
    assert loss.shape == (groups,)
    assert [g.shape for g in grads] == [i.shape if w else (0,) for i, w in zip(inputs, wanted, strict=True)]
    return calls


SMALL = {"gaussian_mmd": 8}
"""The MMD of n samples joins 2 n."""
MOST = {"prototype_similarity": 3}
"""Each of its passes needs the one before of all rows."""


@every_loss
def test_a_small_batch_takes_one_launch(name) -> None:
    for wanted in product((False, True), repeat=INPUTS[name]):
        assert len(launches(name, SMALL.get(name, 16), wanted)) == 1


@every_loss
def test_a_large_batch_takes_few_whatever_its_size(name) -> None:
    for n in (1000, 8192):
        for wanted in product((False, True), repeat=INPUTS[name]):
            assert len(launches(name, n, wanted)) == MOST.get(name, 2)


@pytest.mark.parametrize("name", ["gaussian_mmd", "pairwise_contrastive", "jsd_mutual_information"])
def test_pairs_of_128_rows_fill_the_gpu_in_few_steps(name) -> None:
    """Rows and other rows are divided among 64 to 128 programs a group and side, of 8 steps each."""
    launch = launches(name, 128, [True] + [False] * (INPUTS[name] - 1), groups=1)[0]
    assert 64 <= torch.Size(launch.grid).numel() <= 128
    rows = (2 if name == "gaussian_mmd" else 1) * 128
    blocks, steps = -(-rows // launch.options["BN"]), -(-128 // launch.options["BM"])
    assert blocks * steps == 8 * torch.Size(launch.grid).numel()


@pytest.mark.parametrize("name", ["pairwise_contrastive", "jsd_mutual_information"])
@pytest.mark.parametrize("n", [16, 128])
def test_an_unwanted_side_takes_no_programs(name, n) -> None:
    """The gradient of the second input is a pass of its own, in the same launch."""

    def programs(*wanted: bool) -> int:
        return torch.Size(launches(name, n, wanted + wanted[:1] * (INPUTS[name] - 2))[0].grid).numel()

    assert programs(False, False) == programs(True, False)
    assert programs(True, True) == 2 * programs(True, False)


@every_loss
def test_no_groups_take_no_launch(name) -> None:
    assert launches(name, 128, [True] * INPUTS[name], groups=0) == []
