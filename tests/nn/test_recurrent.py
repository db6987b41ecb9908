"""Recurrences over rows against loops over one sample's frames, and what they do not depend on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastmmkd.nn.dropout import number_dropouts
from fastmmkd.nn.recurrent import Recurrence, States
from fastmmkd.ops.layout import Layout, pack, unpack
from fastmmkd.ops.philox import DrawKeys
from tests.engine.fake_capture import NoHostSync
from tests.handmade import ragged_layout, samples_of
from tests.literal_recurrence import literal

D_IN, D = 3, 4
LENGTHS = [[5, 1, 4, 2]]
FORMS = {
    "one direction": {},
    "two directions": {"backwards": True},
    "two layers": {"layers": 2},
    "two layers of two directions": {"layers": 2, "backwards": True},
}


def layout() -> Layout:
    return ragged_layout(LENGTHS, spare=2)


def made(cell: Any, **form: Any) -> Recurrence:
    torch.manual_seed(2)
    net = Recurrence(cell, D_IN, D, **form).double()
    number_dropouts(net)
    return net


def rows(of: Layout, features: int = D_IN) -> torch.Tensor:
    x = torch.randn(1, of.rows, features, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return (x * of.factor(x.dtype).unsqueeze(-1)).requires_grad_()


def counted(of: Layout) -> torch.Tensor:
    """The frames of the first sample are interrupted, those of the third end early; the last sample has none."""
    counts = of.is_somebodys.clone()
    counts[0, [1, 2, 9, 10, 11]] = False
    return counts


def value(states: States) -> torch.Tensor:
    """Something that depends on all of it."""
    return sum((i + 1) * x.sin().sum() for i, x in enumerate([*states.outputs, *states.last]))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_states_and_gradients_are_those_of_a_loop(cell: str, form: dict[str, Any]) -> None:
    net, of = made(cell, **form), layout()
    x, counts = rows(of), counted(of)
    states = net(x, counts, of)
    expected = [literal(net, *sample) for sample in zip(samples_of(x, of), samples_of(counts, of), strict=True)]
    for direction, (outputs, last) in enumerate(zip(*states, strict=True)):
        torch.testing.assert_close(samples_of(outputs, of), [made[0][direction] for made in expected])
        torch.testing.assert_close(last[0], torch.stack([made[1][direction] for made in expected]))
        assert not outputs[~of.is_somebodys].any()
    loss = sum((i + 1) * x.sin().sum() for made in expected for i, x in enumerate([*made[0], *made[1]]))
    wanted = [x, *net.parameters()]
    torch.testing.assert_close(torch.autograd.grad(value(states), wanted), torch.autograd.grad(loss, wanted))


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_it_is_torchs_own_on_a_sample(cell: str) -> None:
    net, frames = made(cell, layers=2, backwards=True), 5
    torchs = {"lstm": nn.LSTM, "gru": nn.GRU}[cell](D_IN, D, 2, bidirectional=True).double()
    for i, layer in enumerate(net.layers):
        for alone, suffix in zip(layer, ("", "_reverse"), strict=True):
            for name, parameter in alone.module.named_parameters():
                getattr(torchs, name.replace("l0", f"l{i}") + suffix).data.copy_(parameter)
    of = ragged_layout([[frames]])
    x = rows(of)
    states = net(x, of.is_somebodys, of)
    torch.testing.assert_close(torch.cat(states.outputs, -1)[0], torchs(x[0])[0])


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_neither_padding_nor_the_batch_matters(cell: str) -> None:
    """Padding before the frames, after all of them, or other samples."""
    net, of = made(cell, layers=2, backwards=True, dropout=0.4), layout()
    x, counts = rows(of), counted(of)
    draw = DrawKeys(torch.tensor([[7, 2, 9, 4]]), torch.tensor([3]), torch.tensor(1))
    expected = net(x, counts, of, draw)
    longest = 9
    padded = Layout.of(torch.full((1, 4), longest), 4 * longest, longest, is_uniform=True)
    shift = longest - of.lengths[0]

    def before(rows_of: torch.Tensor) -> torch.Tensor:
        moved = torch.zeros(1, 4, longest, *rows_of.shape[2:], dtype=rows_of.dtype)
        for b, sample in enumerate(samples_of(rows_of, of)):
            moved[0, b, shift[b] :] = sample
        return pack(moved, padded)

    states = net(before(x.detach()), before(counts), padded, draw)
    for outputs, wanted in zip(states.outputs, expected.outputs, strict=True):
        torch.testing.assert_close(outputs, before(wanted.detach()))
    torch.testing.assert_close(states.last, expected.last)
    for b in range(4):
        alone = ragged_layout([[LENGTHS[0][b]]])
        one = (pack(unpack(y, of)[:, b, : alone.longest].unsqueeze(1), alone) for y in (x, counts))
        own = net(*one, alone, draw._replace(sample=draw.sample[:, b : b + 1]))
        torch.testing.assert_close(own.last, [last[:, b : b + 1] for last in expected.last])


def test_a_dropped_frame_is_a_step_and_one_that_does_not_count_is_none() -> None:
    net, of = made("lstm"), ragged_layout([[3]])
    x = rows(of).detach().clone()
    x[0, 1] = 0
    counts = torch.tensor([[True, False, True]])
    short = ragged_layout([[2]])
    skipped = net(x, counts, of).last[0]
    torch.testing.assert_close(net(x[:, [0, 2]], short.is_somebodys, short).last[0], skipped)
    assert not torch.allclose(net(x, of.is_somebodys, of).last[0], skipped)


def test_dropout_lies_between_layers() -> None:
    of = layout()
    draw = DrawKeys(torch.tensor([[7, 2, 9, 4]]), torch.tensor([3]), torch.tensor(1))
    one, two = made("gru", dropout=0.5), made("gru", layers=2, dropout=0.5)
    for net, changes in ((one, False), (two, True)):
        x = rows(of)
        last, dropped = net.eval()(x, counted(of), of).last[0], net(x, counted(of), of, draw).last[0]
        assert torch.equal(last, dropped) != changes
    with pytest.raises(ValueError, match="dropout needs the keys"):
        two.train()(rows(of), counted(of), of)


@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_nobody_waits_for_the_device(cell: str) -> None:
    net, of = made(cell, layers=2, backwards=True).float(), layout()
    x, counts = rows(of).detach().float(), counted(of)
    with NoHostSync():
        value(net(x, counts, of)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
