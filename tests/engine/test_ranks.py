"""Two processes with half a batch each make the losses and gradients of one process with the whole batch, in fp64."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from fastmmkd.config import parse_config
from fastmmkd.distributed import gather_rows
from fastmmkd.methods.corrkd import CorrkdConfig
from fastmmkd.methods.hrlf import HrlfConfig
from fastmmkd.ops.philox import DrawKeys
from tests.handmade import batch_of, inputs_of, network_of, student_of

WORLD, BATCH, DIMS, STEPS = 2, 8, (5, 4, 3), (6, 5, 4)
SETTINGS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "corrkd": ("corrkd", "classification-3", {}),
    "corrkd, sum": ("corrkd", "classification-2", {"reduction": "sum", "lambda_scd": 0.1}),
    "corrkd, kl": ("corrkd", "classification-3", {"rcd": "kl"}),
    "corrkd, sum, kl": ("corrkd", "regression", {"reduction": "sum", "rcd": "kl"}),
    "corrkd, regression": ("corrkd", "regression", {"prototypes": 3}),
    "corrkd, emotions": ("corrkd", "emotions-binary", {}),
    "hrlf": ("hrlf", "classification-3", {}),
    "hrlf, regression": ("hrlf", "regression", {}),
    "hrlf, emotions": ("hrlf", "emotions-binary", {}),
    "corrkd, dropout": ("corrkd", "regression", {}),
    "hrlf, dropout": ("hrlf", "classification-3", {}),
}
"""Method, task, and keys of the loss block."""
OF_THE_BATCH = {"corrkd": {"scd", "cpd", "rcd"}, "hrlf": {"hmi"}}
"""Parts that are not means over samples."""

PartsAndGradients = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


def losses_and_gradients(setting: str, global_batch: bool, rows: slice) -> PartsAndGradients:
    """The parts and every parameter's gradient on some rows of a batch, averaged over processes as the engine does."""
    method, task, loss = SETTINGS[setting]
    margin = {"eta": 2.0} if method == "corrkd" else {}  # so that different samples are within it
    raw = {
        "method": method,
        "data": {"path": "none.h5"},
        "model": {"width": 4, "heads": 2, "encoder_layers": 1, "dropout": 0.3 if "dropout" in setting else 0.0},
        "teacher": {"epochs": 1},
        "loss": {"statistics_width": 8, "global_batch": global_batch} | margin | loss,
        "train": {"task": task, "batch_size": BATCH, "epochs": 1},
        "deepspeed": {"optimizer": {"type": "Adam"}},
    }
    config = parse_config(raw)
    assert isinstance(config, (CorrkdConfig, HrlfConfig))
    teacher = network_of(config, DIMS, seed=2).double().eval()
    student = student_of(config, DIMS, seed=1, teacher=teacher).double()
    generator = torch.Generator().manual_seed(3)
    features = [
        torch.randn(1, BATCH, t, d, dtype=torch.float64, generator=generator) for t, d in zip(STEPS, DIMS, strict=True)
    ]
    kept = [torch.rand(1, BATCH, t, generator=generator) < 0.6 for t in STEPS]
    kept[0][:, 2] = False
    whole = [torch.ones_like(mask) for mask in kept]
    targets = torch.randint(2, (1, BATCH, config.task.problems), generator=generator)
    if config.task.is_regression:
        targets = torch.randn(1, BATCH, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        taught = student.teach(inputs_of([x[:, rows] for x in features], [mask[:, rows] for mask in whole]))
    missing = [(x * mask.unsqueeze(-1))[:, rows] for x, mask in zip(features, kept, strict=True)]
    draw = DrawKeys(torch.arange(10, 10 + BATCH)[None, rows], torch.tensor([5]), torch.tensor(1))
    total, parts = student(batch_of(missing, [mask[:, rows] for mask in kept], targets[:, rows], taught, draw))
    total.backward()
    gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
    return averaged(parts), averaged(gradients)


def averaged(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if dist.is_initialized():
        for value in tensors.values():
            dist.all_reduce(value)
            value /= dist.get_world_size()
    return tensors


def gathered(shape: tuple[int, ...], rank: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    """A function of all rows, which are not contiguous in memory, and its gradient at a process's own."""
    generator = torch.Generator().manual_seed(4)
    whole = torch.randn(shape, dtype=torch.float64, generator=generator).transpose(1, 2)
    own = whole if rank is None else whole.chunk(WORLD, dim=1)[rank]
    own = own.requires_grad_() if own.is_leaf else own.detach().requires_grad_()
    joined = gather_rows(own)
    (joined.cumsum(1) ** 3).sum().backward()
    assert own.grad is not None
    return joined.detach(), own.grad


def work(rank: int, port: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=WORLD)
    half = BATCH // WORLD
    rows = slice(rank * half, (rank + 1) * half)
    outcome: dict[Any, Any] = {
        (setting, global_batch): losses_and_gradients(setting, global_batch, rows)
        for setting in SETTINGS
        for global_batch in (True, False)
    }
    outcome["gathered"] = gathered((2, 3, 6), rank)
    torch.save(outcome, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(work, (port, folder), WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(WORLD)]


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> dict[str, float]:
    assert a.keys() == b.keys()
    return {name: float((a[name] - b[name]).abs().max()) for name in a}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_part_and_gradient_is_that_of_the_whole_batch(of_two: list[dict[Any, Any]], setting: str) -> None:
    parts, gradients = losses_and_gradients(setting, True, slice(None))
    assert OF_THE_BATCH[SETTINGS[setting][0]] <= parts.keys()
    for averaged_parts, averaged_gradients in (outcome[setting, True] for outcome in of_two):
        assert max(largest_difference(averaged_parts, parts).values()) < 1e-10
        assert max(largest_difference(averaged_gradients, gradients).values()) < 1e-10
    assert all(value.abs().max() > 0 for name, value in gradients.items() if not name.endswith("bias"))


@pytest.mark.parametrize("setting", SETTINGS)
def test_parts_of_the_own_rows_alone_are_others(of_two: list[dict[Any, Any]], setting: str) -> None:
    """What is a mean over samples does not change, what the batch as a whole decides does."""
    method, _, loss = SETTINGS[setting]
    parts, gradients = losses_and_gradients(setting, False, slice(None))
    averaged_parts, averaged_gradients = of_two[0][setting, False]
    of_the_batch = OF_THE_BATCH[method] - ({"rcd"} if loss.get("rcd") == "kl" else set())
    for name, difference in largest_difference(averaged_parts, parts).items():
        assert (difference > 1e-8) == (name in of_the_batch or name == "loss"), name
    assert max(largest_difference(averaged_gradients, gradients).values()) > 1e-6


def test_rows_come_in_rank_order_however_they_lie_in_memory(of_two: list[dict[Any, Any]]) -> None:
    joined, gradient = gathered((2, 3, 6), rank=None)
    for rank, outcome in enumerate(of_two):
        own_joined, own_gradient = outcome["gathered"]
        assert torch.equal(own_joined, joined)
        torch.testing.assert_close(own_gradient / WORLD, gradient.chunk(WORLD, dim=1)[rank])
