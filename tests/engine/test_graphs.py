"""Captured losses and steps against eager ones, with a stand-in for CUDA graphs."""

import copy
import gc
import weakref
from typing import ClassVar

import pytest
import torch

from fastmmkd.engine.graphs import GraphedLoss, GraphedStep
from tests.engine.fake_capture import FakeCapture, NoHostSync


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))


def loss_of(model, data):
    def loss(rows):
        error = (model(data[rows]) - data[rows].sum(-1, keepdim=True)).square()
        return error.mean(), torch.stack([error.detach().mean(), error.detach().amax()])

    return loss


DATA = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
BATCHES = [torch.randint(20, (5,), generator=torch.Generator().manual_seed(i)) for i in range(4)]


def test_a_graphed_loss_has_the_gradients_of_the_eager_one() -> None:
    eager, model, capture = network(), network(), FakeCapture()
    graphed = GraphedLoss(loss_of(model, DATA), model.parameters(), BATCHES[:1], capture)
    assert capture.captured == 2
    for rows, scale in zip(BATCHES, (1.0, 1024.0, 0.5, 3.0), strict=True):
        expected, expected_parts = loss_of(eager, DATA)(rows)
        loss, parts = graphed(rows)
        assert torch.equal(loss, expected)
        assert torch.equal(parts, expected_parts)
        for x, y in zip(model.parameters(), eager.parameters(), strict=True):
            x.grad = y.grad = None
        (expected * scale).backward()
        (loss * scale).backward()
        for x, y in zip(model.parameters(), eager.parameters(), strict=True):
            torch.testing.assert_close(x.grad, y.grad)
    assert capture.replayed == 8


def test_a_graphed_step_takes_the_eager_steps_under_a_schedule() -> None:
    eager, model = network(), network()

    def run(model, step_of):
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)  # without it a CPU reads the step count
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)
        step, losses = step_of(optimizer), []
        for rows in BATCHES:
            losses.append(step(rows).clone())
            schedule.step()
        return losses

    def eager_step(optimizer):
        def step(rows):
            optimizer.zero_grad()
            loss, parts = loss_of(eager, DATA)(rows)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(eager.parameters(), 0.5)
            optimizer.step()
            return parts

        return step

    def graphed_step(optimizer):
        clip = lambda: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)  # noqa: E731
        return GraphedStep(loss_of(model, DATA), optimizer, clip, BATCHES[:1], FakeCapture())

    expected, losses = run(eager, eager_step), run(model, graphed_step)
    torch.testing.assert_close(losses, expected)
    torch.testing.assert_close(list(model.parameters()), list(eager.parameters()))


def test_a_graphed_step_leaves_weights_and_state_as_they_were() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    loss_of(model, DATA)(BATCHES[0])[0].backward()
    optimizer.step()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    runs = []

    class Counting(FakeCapture):
        def __call__(self, run):
            runs.append((copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict()["state"])))
            return super().__call__(lambda: torch.zeros(1))

    GraphedStep(loss_of(model, DATA), optimizer, lambda: None, BATCHES[:1], Counting())
    torch.testing.assert_close(runs[0], before)


class Marked(torch.autograd.Function):
    """The identity, whose node in the graph of a backward pass can be watched."""

    nodes: ClassVar[list[weakref.ref]] = []

    @staticmethod
    def forward(ctx, x):
        Marked.nodes.append(weakref.ref(ctx))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad


def test_a_graphed_loss_lets_autograds_nodes_go() -> None:
    """Those that accumulate gradients would otherwise stay those of the capture, on its stream."""
    model = network()
    loss, Marked.nodes = loss_of(lambda x: Marked.apply(model(x)), DATA), []
    graphed = GraphedLoss(loss, model.parameters(), BATCHES[:1], FakeCapture())
    gc.collect()
    assert Marked.nodes
    assert all(node() is None for node in Marked.nodes)
    graphed_loss, _ = graphed(BATCHES[1])
    graphed_loss.backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("whole", [False, True], ids=["forward and backward", "whole step"])
def test_a_rehearsal_leaves_buffers_as_they_were(whole) -> None:
    model, counts = network(), torch.zeros(1)

    def loss(rows):
        counts.add_(1)
        return loss_of(model, DATA)(rows)

    if whole:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
        step = GraphedStep(loss, optimizer, lambda: None, BATCHES[:1], FakeCapture(), [counts])
    else:
        step = GraphedLoss(loss, model.parameters(), BATCHES[:1], FakeCapture(), [counts])
    assert counts.item() == 0
    step(BATCHES[0])
    assert counts.item() == 1


def test_a_step_that_cannot_be_captured_leaves_no_trace() -> None:
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
    before = copy.deepcopy(model.state_dict())

    class Refusing(FakeCapture):
        def __call__(self, run):
            super().__call__(run)
            raise RuntimeError("operation not permitted")

    with pytest.raises(RuntimeError, match="operation not permitted"):
        GraphedStep(loss_of(model, DATA), optimizer, lambda: None, BATCHES[:1], Refusing())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert isinstance(optimizer.param_groups[0]["lr"], float)
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.unique(),
        lambda x: x.repeat_interleave(torch.tensor([1, 2, 3])),
        lambda x: torch.equal(x, x),
        lambda x: x + x.new_tensor(1.0),
    ],
)
def test_what_a_capture_refuses(run) -> None:
    with pytest.raises(RuntimeError, match="a capture cannot"), NoHostSync():
        run(torch.tensor([1.0, -1.0, 2.0]))


def test_what_a_capture_allows() -> None:
    x = torch.tensor([1.0, -1.0, 2.0])
    rows, mask = torch.tensor([0, 2]), torch.tensor([True, False, True, False])
    with NoHostSync():
        chosen = x[rows].repeat_interleave(2).masked_fill(mask, 0)
    assert chosen.tolist() == [0, 1, 0, 2]
