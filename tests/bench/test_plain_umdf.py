"""The plain baseline computes what the method computes, and is not handicapped by more parameters."""

from __future__ import annotations

import pytest
import torch

from bench.plain_umdf import Plain
from fastmmkd.methods.umdf import UMDF, UmdfLoss, UmdfModel
from fastmmkd.tasks import Task
from tests.handmade import batch_of

DIMS, BATCH, STEPS = (5, 4, 3), 3, 7


def batch(task: Task, masked_layers: str) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """One sample of the first version misses everything."""
    generator = torch.Generator().manual_seed(1)
    masks = [torch.rand(2 * BATCH, STEPS, generator=generator) < 0.6 for _ in DIMS]
    for mask in masks:
        mask[1] = False
    features = [
        torch.randn(2 * BATCH, STEPS, d, generator=generator, dtype=torch.float64) * mask.unsqueeze(-1)
        for d, mask in zip(DIMS, masks, strict=True)
    ]
    if masked_layers == "first":
        masks += [torch.ones_like(mask) for mask in masks]
    if task.is_regression:
        return features, masks, torch.randn(BATCH, generator=generator, dtype=torch.float64)
    return features, masks, torch.randint(0, 2, (BATCH, task.problems), generator=generator)


@pytest.mark.parametrize("kind", ["explicit", "sdpa"])
@pytest.mark.parametrize("name", ["regression", "emotions-binary"])
@pytest.mark.parametrize("masked_layers", ["all", "first"])
def test_plain_umdf_equals_umdf(name, kind, masked_layers) -> None:
    torch.manual_seed(0)
    task = Task(name)
    block = UmdfModel(width=8, heads=2, mcim_layers=2, encoder_layers=2)
    umdf = UMDF(block, UmdfLoss(lambda_fea=0.5, lambda_logits=2.0), task, DIMS).double()
    plain = Plain(umdf, kind).double()
    features, masks, targets = batch(task, masked_layers)
    loss, _ = umdf(batch_of([x[None] for x in features], [m[None] for m in masks], targets[None]))
    plain_loss = plain(features, masks, torch.arange(STEPS).expand(2 * BATCH, -1), targets)
    torch.testing.assert_close(plain_loss, loss)

    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in umdf.parameters())
    loss.backward()
    plain_loss.backward()
    squares = [sum(p.grad.square().sum() for p in model.parameters()) for model in (plain, umdf)]
    torch.testing.assert_close(*squares)
    query = torch.stack([plain.mcim[0].attentions[i].query.weight.grad.T for i in range(9)])
    torch.testing.assert_close(query, umdf.mcim[0].query.grad[0].flatten(0, 1))
