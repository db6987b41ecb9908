"""The three methods, small, two models at once, on resident data; and their loss as a function of index vectors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from fastmmkd.config import CorrkdLoss, CorrkdModel, HrlfLoss, HrlfModel, MissingBlock, UmdfLoss, UmdfModel
from fastmmkd.data import store
from fastmmkd.data.batches import ResidentSplit
from fastmmkd.methods.corrkd import CorrKD, CorrkdNetwork
from fastmmkd.methods.hrlf import HRLF, HrlfNetwork
from fastmmkd.methods.umdf import UMDF
from fastmmkd.tasks import Task
from tests.conftest import make_dataset

COMPLETE = MissingBlock(enabled=False)
MODELS = 2
SIZES = {"width": 8, "heads": 2}
BATCH = 8


def umdf(task, dims, dropout=0.0):
    return UMDF(
        UmdfModel(**SIZES, dropout=dropout, mcim_layers=1, encoder_layers=1), UmdfLoss(), task, dims, MODELS
    ), None


def corrkd(task, dims, dropout=0.0):
    student, teacher = (CorrkdNetwork(CorrkdModel(**SIZES, dropout=dropout), task, dims, MODELS) for _ in range(2))
    return CorrKD(student, CorrkdLoss(), MODELS), teacher


def hrlf(task, dims, dropout=0.0):
    student, teacher = (
        HrlfNetwork(HrlfModel(**SIZES, dropout=dropout), HrlfLoss(), task, dims, MODELS) for _ in range(2)
    )
    return HRLF(student, HrlfLoss(), SIZES["width"], MODELS), teacher


METHODS = {"umdf": umdf, "corrkd": corrkd, "hrlf": hrlf}


def build(
    method: str,
    task: str,
    folder: Path,
    steps: tuple[int, int, int] = (6, 6, 6),
    device: str = "cpu",
    dropout: float = 0.0,
) -> tuple[torch.nn.Module, Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]]:
    """A method's module and `loss(rows [S, B], epoch [])`: the scalar to minimise, and the parts `[parts, S]`."""
    path = folder / "data.h5"
    store.write(make_dataset(steps), path)
    dataset, kind = store.read(path), Task(task)
    at = torch.device(device)
    split = ResidentSplit(dataset.splits["train"], dataset.normalisation, kind, 10.0, "missing", at, torch.float32)
    torch.manual_seed(0)
    module, teacher = METHODS[method](kind, dataset.feature_dims, dropout)
    module.to(at)
    if teacher:
        teacher.to(at).requires_grad_(False)
    seeds = torch.tensor([1, 2], device=at)

    def loss(rows, epoch):
        batch = split.training_batch(rows, seeds, epoch, module.versions, MissingBlock())
        taught = ()
        if teacher:
            whole = split.training_batch(rows, seeds, epoch, 1, COMPLETE)
            with torch.no_grad():
                taught = (teacher.represent(whole.features, whole.masks),)
        total, parts = module(batch.features, batch.masks, batch.targets, *taught, draw=batch.draw)
        return total, torch.stack(list(parts.values()))

    return module, loss
