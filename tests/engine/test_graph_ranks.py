"""Two processes that replay their steps, by a stand-in for CUDA graphs: collectives inside, one decision for both."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp

from fastmmkd.config import parse_config
from fastmmkd.distributed import gather_rows, rank, world_size
from fastmmkd.engine.device import place, prepare_process, start_deepspeed, wrap
from fastmmkd.engine.step import STEPS, EagerSteps, Objective, unmarked
from fastmmkd.methods.method import Trainable
from tests.conftest import make_config
from tests.engine.fake_capture import FakeCapture

WORLD, MODELS, BATCH, WIDTH, ROUNDS = 2, 3, 8, 6, 5
INFINITE = 3
"""The step in which a gradient of model 1 is not finite in the last process alone."""
DATA = torch.randn(40, WIDTH, generator=torch.Generator().manual_seed(1))
WAYS: dict[str, tuple[int, str]] = {
    "eager": (0, "off"),
    "forward and backward": (0, "fwdbwd"),
    "whole step": (0, "step"),
    "ZeRO 1": (1, "off"),
    "ZeRO 1, forward and backward": (1, "fwdbwd"),
    "whole step, refused": (0, "step"),
    "forward and backward, refused": (0, "fwdbwd"),
}
"""ZeRO stage and `STEPS`."""


class Toy(Trainable):
    """A loss over the whole batch, as the methods have them."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.weight = torch.nn.Parameter(torch.randn(MODELS, WIDTH, 4, generator=generator))
        self.bias = torch.nn.Parameter(torch.zeros(MODELS, 1, 4))

    def forward(self, x: torch.Tensor, poison: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        z = gather_rows(x @ self.weight + self.bias)
        each = z.square().mean((1, 2)) + z.mean(1).pow(4).sum(-1) + (poison * self.bias).sum((1, 2))
        return each.sum(), {"loss": each.detach()}


class Refusing(FakeCapture):
    """Fails in the last process, when all that belongs to the capture has run."""

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        captured = super().__call__(run)
        whole = isinstance(captured[1], torch.Tensor)  # the parts; a loss is captured in two
        if rank() == WORLD - 1 and (whole or self.captured == 2):
            raise RuntimeError("operation not permitted")
        return captured


class ToyObjective(Objective):
    """What `Objective` does, on data of its own."""

    def __init__(self, module: Toy) -> None:
        self.module, self.stage = module, unmarked

    def draw(self, rows: torch.Tensor, epoch: torch.Tensor) -> Any:
        mine = rank() == world_size() - 1
        poison = torch.where((epoch == INFINITE) & mine, torch.inf, torch.zeros(MODELS, 1, 1))
        return DATA[rows], torch.stack([torch.zeros(1, 1), poison[1], torch.zeros(1, 1)])

    def loss(self, batch: Any, forward: Any = None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return forward(*batch)


def trained(deepspeed: Any, block: dict[str, Any], log: Path, way: str) -> dict[str, Any]:
    """The models after a few steps, who skipped how many, what was said, and what each step's loss was."""
    stage, mode = WAYS[way]
    engine = wrap(deepspeed, Toy(), block | {"zero_optimization": {"stage": stage}}, log)
    said: list[str] = []
    step: EagerSteps = STEPS[mode](engine, ToyObjective(engine.module), None, said.append)
    step.capture = Refusing if "refused" in way else FakeCapture  # type: ignore[attr-defined]
    half = BATCH // world_size()
    losses = []
    for at in range(ROUNDS):
        generator = torch.Generator().manual_seed(at)
        rows = torch.stack([torch.randperm(40, generator=generator)[:BATCH] for _ in range(MODELS)])
        mine = rows[:, rank() * half : (rank() + 1) * half]
        losses.append(step(mine, torch.tensor(at if stage == 0 else 0), []).clone())
    outcome = {
        "weights": [p.detach().clone() for p in engine.module.parameters()],
        "skipped": step.skipped(MODELS),
        "said": said,
        "losses": torch.stack(losses),
        "replays": getattr(step, "graphed", None) is not None,
    }
    engine.destroy()
    return outcome


def work(index: int, world: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    place_of = {
        "RANK": index,
        "LOCAL_RANK": index,
        "WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    os.environ.update({key: str(value) for key, value in place_of.items()} | {"DS_ACCELERATOR": "cpu"})
    raw = make_config(folder / "none.h5")
    raw["deepspeed"]["optimizer"]["params"] |= {"lr": 2**-6, "eps": 2**-10}
    config = parse_config(raw)
    prepare_process(config)
    placement, log = place(config), folder / f"deepspeed_{world}_{index}.log"
    deepspeed = start_deepspeed(placement, log)
    outcomes = {way: trained(deepspeed, placement.deepspeed, log, way) for way in WAYS if world > 1 or way == "eager"}
    torch.save(outcomes, folder / f"{world}_{index}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """What every process of one, and of two, found each way."""
    folder = tmp_path_factory.mktemp("graph_ranks")
    for world in (1, WORLD):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(work, (world, port, folder), world)
    return {world: [torch.load(folder / f"{world}_{i}.pt") for i in range(world)] for world in (1, WORLD)}


def test_two_processes_take_the_steps_of_one_and_skip_the_same(of: dict[int, list[dict[str, Any]]]) -> None:
    (expected,) = of[1]
    for outcomes in of[WORLD]:
        torch.testing.assert_close(outcomes["eager"]["weights"], expected["eager"]["weights"], rtol=1e-5, atol=1e-6)
        assert outcomes["eager"]["skipped"] == expected["eager"]["skipped"] == [0, 1, 0]


@pytest.mark.parametrize(
    ("replayed", "eager"),
    [
        ("forward and backward", "eager"),
        ("whole step", "eager"),
        ("ZeRO 1, forward and backward", "ZeRO 1"),
    ],
)
def test_replayed_steps_are_the_eager_ones(of: dict[int, list[dict[str, Any]]], replayed: str, eager: str) -> None:
    for outcomes in of[WORLD]:
        assert outcomes[replayed]["replays"]
        assert outcomes[replayed]["said"] == []
        assert torch.equal(outcomes[replayed]["losses"].nan_to_num(), outcomes[eager]["losses"].nan_to_num())
        for a, b in zip(outcomes[replayed]["weights"], outcomes[eager]["weights"], strict=True):
            assert torch.equal(a, b)
        assert outcomes[replayed]["skipped"] == outcomes[eager]["skipped"]


@pytest.mark.parametrize("way", ["whole step, refused", "forward and backward, refused"])
def test_where_one_process_cannot_capture_none_replays(of: dict[int, list[dict[str, Any]]], way: str) -> None:
    reasons = ("another process could not", "operation not permitted")
    for outcomes, reason in zip(of[WORLD], reasons, strict=True):
        assert not outcomes[way]["replays"]
        assert outcomes[way]["said"] == [f"train.graph: the step cannot be captured ({reason}); steps are eager"]
        for a, b in zip(outcomes[way]["weights"], outcomes["eager"]["weights"], strict=True):
            assert torch.equal(a, b)
