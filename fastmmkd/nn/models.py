"""Several independent models as one module whose parameters and buffers start with S, and one of them again.

What cannot be several models at once, such as `torch.nn.LSTM`, is wrapped in `Alone`; state that is no parameter is a
`Bank`.

Shape legend: S models, N samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


class Alone(nn.Module):
    """A module of one model, whose parameters and buffers have no axis of models; its method has `grouped=False`.

    It is called with and returns what the module itself does: leave out the axis of models before, put it back after.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Bank(nn.Module):
    """A table of what is known of every training sample: a buffer `[S, N, ...]`, float32 or int64 whatever the weights
    are, part of checkpoints, stacks of models and graph snapshots, not of the exported network.

    Args:
        shape: `(N, ...)`.
        dtype: float32 or an integer type.
    """

    values: torch.Tensor

    def __init__(self, shape: Sequence[int], dtype: torch.dtype = torch.float32, models: int = 1) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(models, *shape, dtype=dtype))

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Bank:
        self.values = self.values.to(fn(self.values).device)  # another device, but never another dtype
        return self


def models_of(module: nn.Module) -> int:
    """S, how many models a module holds: the first axis of all its parameters and buffers; 1 with something `Alone`.

    Raises:
        ValueError: a tensor does not have that axis; it is named.
    """
    grouped = dict(_grouped(module))
    if len(grouped) < len(list(_tensors(module))):
        return 1
    sizes = {name: tensor.shape[0] if tensor.dim() else 0 for name, tensor in grouped.items()}
    models = next(iter(sizes.values()), 1)
    for name, size in sizes.items():
        if size != models:
            raise ValueError(
                f"{type(module).__name__}.{name} is {list(grouped[name].shape)}; expected {models} models as its first "
                "axis, or an `Alone` around what cannot be several models at once"
            )
    return models


def stack_models(modules: Sequence[Module]) -> Module:
    """Modules of one architecture and one model each as one: the first takes the others' parameters and buffers over.

    Raises:
        ValueError: a tensor has no axis of models, or there are several modules and they hold something `Alone`.
    """
    first, *others = modules
    for module in modules:
        if models_of(module) != 1:
            raise ValueError(f"{type(module).__name__} holds {models_of(module)} models; expected modules of one")
    if others:
        alone = [name for name, part in first.named_modules() if isinstance(part, Alone)]
        if alone:
            raise ValueError(f"{type(first).__name__}.{alone[0]} is Alone; expected one module, not {len(modules)}")
        for tensors in zip(*(map(_second, _tensors(module)) for module in modules), strict=True):
            tensors[0].data = torch.cat([tensor.data for tensor in tensors])
    return first


def model_state(module: nn.Module, index: int) -> dict[str, torch.Tensor]:
    """The state of one model of a stack, without banks, under the names and in the shapes that it has alone.

    Raises:
        ValueError: a tensor has no axis of models.
    """
    models_of(module)
    grouped, banks = {name for name, _ in _grouped(module)}, _within(module, Bank)
    state = {name: x for name, x in module.state_dict().items() if not name.startswith(banks)}
    return {name: x[index : index + 1] if name in grouped else x for name, x in state.items()}


def load_model(module: nn.Module, state: dict[str, torch.Tensor]) -> None:
    """Take over what `model_state` gave; banks stay as they are.

    Raises:
        RuntimeError: it is the state of another module.
    """
    banks = _within(module, Bank)
    module.load_state_dict({n: x for n, x in module.state_dict().items() if n.startswith(banks)} | state)


def _tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _grouped(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Those that are no part of something `Alone`."""
    alone = _within(module, Alone)
    yield from ((name, tensor) for name, tensor in _tensors(module) if not name.startswith(alone))


def _within(module: nn.Module, kind: type[nn.Module]) -> tuple[str, ...]:
    """What the names of tensors in modules of a kind begin with."""
    return tuple(f"{name}." for name, part in module.named_modules() if isinstance(part, kind))


def _second(pair: tuple[str, torch.Tensor]) -> torch.Tensor:
    return pair[1]
