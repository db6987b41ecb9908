"""A training step, from index vector to gradients, does nothing that a CUDA graph could not capture."""

from contextlib import nullcontext

import pytest
import torch

from fastmmkd.config import CorrkdLoss, CorrkdModel, HrlfLoss, HrlfModel, MissingBlock, UmdfLoss, UmdfModel
from fastmmkd.data import store
from fastmmkd.data.batches import ResidentSplit
from fastmmkd.engine.phases import COMPLETE
from fastmmkd.methods.corrkd import CorrKD, CorrkdNetwork
from fastmmkd.methods.hrlf import HRLF, HrlfNetwork
from fastmmkd.methods.umdf import UMDF
from fastmmkd.ops import use_provider
from fastmmkd.tasks import Task
from tests.conftest import make_dataset
from tests.engine.fake_capture import NoHostSync

MODELS = 2
SIZES = {"width": 8, "heads": 2}


def umdf(task, dims):
    return UMDF(UmdfModel(**SIZES, mcim_layers=1, encoder_layers=1), UmdfLoss(), task, dims, MODELS), None


def corrkd(task, dims):
    student, teacher = (CorrkdNetwork(CorrkdModel(**SIZES), task, dims, MODELS) for _ in range(2))
    return CorrKD(student, CorrkdLoss(), MODELS), teacher


def hrlf(task, dims):
    student, teacher = (HrlfNetwork(HrlfModel(**SIZES), HrlfLoss(), task, dims, MODELS) for _ in range(2))
    return HRLF(student, HrlfLoss(), SIZES["width"], MODELS), teacher


@pytest.mark.parametrize("steps", [(6, 6, 6), (6, 9, 4)], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("provider", [None, "reference"])
@pytest.mark.parametrize("task", ["regression", "classification-2"])
@pytest.mark.parametrize("method", [umdf, corrkd, hrlf], ids=lambda method: method.__name__)
def test_a_step_never_waits_for_the_device(method, task, provider, steps, tmp_path) -> None:
    store.write(make_dataset(steps), tmp_path / "data.h5")
    dataset = store.read(tmp_path / "data.h5")
    kind = Task(task)
    split = ResidentSplit(
        dataset.splits["train"], dataset.normalisation, kind, 10.0, "missing", torch.device("cpu"), torch.float32
    )
    module, teacher = method(kind, dataset.feature_dims)
    rows, seeds, epoch = torch.arange(16).view(2, 8), torch.tensor([1, 2]), torch.tensor(0)
    with use_provider(provider) if provider else nullcontext(), NoHostSync():
        batch = split.training_batch(rows, seeds, epoch, module.versions, MissingBlock())
        taught = ()
        if teacher:
            whole = split.training_batch(rows, seeds, epoch, 1, COMPLETE)
            with torch.no_grad():
                taught = (teacher.represent(whole.features, whole.masks),)
        loss, _ = module(batch.features, batch.masks, batch.targets, *taught)
        loss.backward()
    assert all(p.grad is not None for p in module.parameters())
