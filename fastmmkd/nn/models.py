"""Several independent models as one module whose parameters start with S, and one of them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def stack_models(modules: Sequence[Module]) -> Module:
    """Modules of one architecture, `[1, ...]` or more each, as one: the first takes the others' parameters over."""
    first, *others = modules
    if others:
        for parameters in zip(*(module.parameters() for module in modules), strict=True):
            parameters[0].data = torch.cat([parameter.data for parameter in parameters])
    return first


def model_state(module: nn.Module, index: int) -> dict[str, torch.Tensor]:
    """The state of one model of a stack, under the names and in the shapes that it has alone."""
    return {name: tensor[index : index + 1] for name, tensor in module.state_dict().items()}
