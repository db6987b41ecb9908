"""Several models as one: what is stacked and sliced, and what cannot be."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastmmkd.nn.grouped import GroupedLinear
from fastmmkd.nn.models import Alone, Bank, load_model, model_state, models_of, stack_models


class Grouped(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.layer = GroupedLinear((1,), 2, 3)
        self.bank = Bank((4, 2))
        with torch.no_grad():
            self.layer.weight.fill_(value)
            self.bank.values.fill_(value)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = GroupedLinear((1,), 2, 3)
        self.gru = nn.GRU(2, 3)


class RecurrentAlone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = GroupedLinear((1,), 2, 3)
        self.gru = Alone(nn.GRU(2, 3))


def test_parameters_and_buffers_are_stacked_and_sliced() -> None:
    stack = stack_models([Grouped(1.0), Grouped(2.0)])
    assert models_of(stack) == 2
    assert stack.bank.values.shape == (2, 4, 2)
    state = model_state(stack, 1)
    assert {name: (tuple(x.shape), x.unique().tolist()) for name, x in state.items() if "bias" not in name} == {
        "layer.weight": ((1, 2, 3), [2.0]),
    }
    fresh = Grouped(0.0)
    load_model(fresh, state)
    assert fresh.layer.weight.unique().tolist() == [2.0]
    assert not fresh.bank.values.any()
    with pytest.raises(RuntimeError, match="Missing key"):
        load_model(fresh, {"layer.bias": state["layer.bias"]})


def test_a_tensor_without_an_axis_of_models_is_named() -> None:
    message = r"Recurrent.gru.weight_ih_l0 is \[9, 2\]; expected 1 models as its first axis, or an `Alone` around"
    for use in (models_of, lambda module: model_state(module, 0), lambda module: stack_models([module])):
        with pytest.raises(ValueError, match=message):
            use(Recurrent())
    scalar = nn.Module()
    scalar.register_buffer("count", torch.zeros(()))
    scalar.layer = GroupedLinear((1,), 2, 3)
    with pytest.raises(ValueError, match=r"Module.count is \[\]; expected 1 models"):
        models_of(scalar)


def test_what_is_alone_is_exported_whole_and_not_stacked() -> None:
    module = RecurrentAlone()
    assert models_of(module) == 1
    state = model_state(module, 0)
    assert state["gru.module.weight_ih_l0"].shape == (9, 2)
    RecurrentAlone().load_state_dict(state)
    assert stack_models([module]) is module
    with pytest.raises(ValueError, match=r"RecurrentAlone\.gru is Alone; expected one module, not 2"):
        stack_models([RecurrentAlone(), RecurrentAlone()])
    x = torch.randn(5, 1, 2)
    torch.testing.assert_close(module.gru(x), module.gru.module(x))


def test_stacks_are_not_stacked_again() -> None:
    stack = stack_models([Grouped(1.0), Grouped(2.0)])
    with pytest.raises(ValueError, match="Grouped holds 2 models; expected modules of one"):
        stack_models([stack, Grouped(3.0)])


def test_a_bank_keeps_its_precision() -> None:
    module = Grouped(1.0).bfloat16()
    assert module.layer.weight.dtype == torch.bfloat16
    assert module.bank.values.dtype == torch.float32
    assert Bank((3,), torch.int64).half().values.dtype == torch.int64
    assert Bank((3,)).to("meta").values.is_meta
