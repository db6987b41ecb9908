"""A training step, from index vector to gradients, does nothing that a CUDA graph could not capture."""

from contextlib import nullcontext

import pytest
import torch

from fastmmkd.ops import use_provider
from tests.engine.fake_capture import NoHostSync
from tests.engine.tiny_methods import BATCH, METHODS, MODELS, build


@pytest.mark.parametrize("steps", [(6, 6, 6), (6, 9, 4)], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("provider", [None, "reference"])
@pytest.mark.parametrize("task", ["regression", "classification-2"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("method", METHODS)
def test_a_step_never_waits_for_the_device(method, dropout, task, provider, steps, tmp_path) -> None:
    module, loss = build(method, task, tmp_path, steps, dropout=dropout)
    rows, epoch = torch.arange(MODELS * BATCH).view(MODELS, BATCH), torch.tensor(0)
    with use_provider(provider) if provider else nullcontext(), NoHostSync():
        total, _ = loss(rows, epoch)
        total.backward()
    assert all(p.grad is not None for p in module.parameters())
