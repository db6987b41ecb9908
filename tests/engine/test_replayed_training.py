"""Training by replayed graphs, step for step as eager training; without a GPU by a stand-in for CUDA graphs."""

import copy

import pytest
import torch

from fastmmkd.engine.flat_adam import FlatAdam
from fastmmkd.engine.graphs import CudaCapture, GraphedLoss, GraphedStep
from tests.engine.fake_capture import FakeCapture
from tests.engine.tiny_methods import BATCH, METHODS, MODELS, build

STEPS = 6
RATE = 2**-7
"""A captured rate is a float32 tensor; this one is the same in every precision."""
NO_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, NO_GPU])]


def capture(device: str):
    return CudaCapture() if device == "cuda" else FakeCapture()


def batches(device: str) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Index vectors `[S, B]` and epochs, the second epoch with other missing patterns."""
    generator = torch.Generator().manual_seed(5)
    rows = [torch.stack([torch.randperm(40, generator=generator)[:BATCH] for _ in range(MODELS)]) for _ in range(STEPS)]
    return [(x.to(device), torch.tensor(i // 3, device=device)) for i, x in enumerate(rows)]


def adam(module, device):
    return torch.optim.Adam(module.parameters(), lr=RATE, fused=True, capturable=device == "cuda")


def clip(module):
    return torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0, foreach=True)


def eager(module, loss, device) -> torch.Tensor:
    optimizer, losses = adam(module, device), []
    for inputs in batches(device):
        optimizer.zero_grad()
        total, parts = loss(*inputs)
        total.backward()
        clip(module)
        optimizer.step()
        losses.append(parts.clone())
    return torch.stack(losses)


def forward_and_backward(module, loss, device) -> torch.Tensor:
    graphed = GraphedLoss(loss, module.parameters(), batches(device)[0], capture(device))
    return eager(module, graphed, device)


def whole_step(module, loss, device) -> torch.Tensor:
    step = GraphedStep(loss, adam(module, device), lambda: clip(module), batches(device)[0], capture(device))
    return torch.stack([step(*inputs).clone() for inputs in batches(device)])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("replayed", [forward_and_backward, whole_step], ids=lambda f: f.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_replay_equals_eager_step_for_step(method, replayed, device, tmp_path) -> None:
    task = "classification-2" if method == "corrkd" else "regression"
    module, loss = build(method, task, tmp_path, device=device)
    start = copy.deepcopy(module.state_dict())
    expected, weights = eager(module, loss, device), copy.deepcopy(module.state_dict())
    module.load_state_dict(start)
    losses = replayed(module, loss, device)
    torch.testing.assert_close(losses, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(module.state_dict(), weights, rtol=1e-6, atol=1e-7)
    assert not torch.allclose(expected[0], expected[-1])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_a_replayed_flat_update_equals_the_eager_one(method, dtype, device, tmp_path) -> None:
    """As training takes it: master weights in fp32, each model clipped by itself, one of them stopped half-way."""
    task = "classification-2" if method == "corrkd" else "regression"

    def run(step_of) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
        module, loss = build(method, task, tmp_path, device=device, dtype=dtype)
        update = FlatAdam(module.parameters(), dtype, 1.0, False, lr=RATE)
        step, losses = step_of(update, loss), []
        for i, inputs in enumerate(batches(device)):
            update.stop([1] if i >= STEPS // 2 else [])
            losses.append(step(*inputs).clone())
        return torch.stack(losses), update.weights, update.skipped(STEPS)

    def eagerly(update, loss):
        def step(*inputs):
            update.zero_grad()
            total, parts = loss(*inputs)
            total.backward()
            update.step()
            return parts

        return step

    def replayed(update, loss):
        return GraphedStep(loss, update, lambda: None, batches(device)[0], capture(device))

    (expected, weights, skipped), (losses, own, skipped_too) = run(eagerly), run(replayed)
    limit = 1e-6 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(losses, expected, rtol=limit, atol=limit)
    torch.testing.assert_close(own, weights, rtol=limit, atol=limit)
    assert skipped == skipped_too == [0, STEPS // 2]
    assert not torch.allclose(expected[0], expected[-1])
