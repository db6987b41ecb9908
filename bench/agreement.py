"""Whether contenders compute the same: nothing is timed that does not.

A ReLU whose input is within rounding of 0 may be open in one contender and shut in another; both are right, and a
parameter's gradient may then differ by a hundredth in float32. So nobody is held to the reference in the same
precision. First loss and gradients are compared with those of float64, of the very same weights, features and missing
draws, and a contender may err by twice what plain PyTorch errs: the padded reference as it is, and as it is when
weights and features move by a few roundings, which lets every ReLU that is about to switch do so. Float64 has rows as
ours does: what padding changes is an error like any other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from bench.contenders import WITH_REFERENCE, Contender
from bench.entry import Failed
from bench.padding import PADDED
from fastmmkd.blocks import Config
from fastmmkd.data.dataset import Dataset
from fastmmkd.engine.step import Objective, untrained_objective

FACTOR = 2.0
"""Times the largest error of plain PyTorch."""
FLOOR = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Relative errors that nobody is refused for: about what rounding the result alone leaves of it in half precision."""
NEGLIGIBLE = 1e-2
"""A gradient that is this small beside the whole may err by as much of the whole, as far as the floor goes."""
MOVED = 8
"""References whose weights and features are moved."""
ROUNDINGS = {torch.float32: 4.0, torch.float16: 0.5, torch.bfloat16: 0.5}
"""How far at most, in units of the relative precision. In float32 a handful of ReLUs may switch and each must have its
turn; in half precision hundreds do, and it is enough that every fourth number becomes its neighbour."""

Gradients = dict[str, torch.Tensor]


class Disagreement(Failed):
    """A contender computes something else; one line."""


class Errors(NamedTuple):
    """Of a loss and its gradients, against the exact ones; relative."""

    loss: float
    whole: float
    """Of all gradients as one vector."""
    along: float
    """How much too long or too short that vector is along the exact one: rounding points anywhere, a factor does
    not."""
    length: float
    """How much too long or too short it is by itself."""
    parameters: dict[str, float]
    """Of each gradient, in units of the whole's norm."""


class Agreement:
    """The exact first step of a config, and how far plain PyTorch is from it.

    Args:
        config: the run.
        dataset: what contenders train on.
        device, dtype: where and in which precision they do.
    """

    def __init__(self, config: Config, dataset: Dataset, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.dtype, floor = config, dtype, FLOOR[dtype]
        with WITH_REFERENCE():
            self.loss, self.gradients = self._first(exactly(untrained_objective(config, dataset, [1], device, dtype)))
            self.norm = norm(self.gradients)
            objective = untrained_objective(config, dataset, [1], device, dtype, resident=PADDED)
            plain_errors = [self.errors(*self._first(objective))]
            for draw in range(MOVED):
                with moved(objective, ROUNDINGS[dtype] * torch.finfo(dtype).eps, draw) as moved_objective:
                    plain_errors.append(self.errors(*self._first(moved_objective)))

        def limit(errors: Iterable[float]) -> float:
            return FACTOR * max(errors) + floor

        self.allowed = Errors(
            limit(e.loss for e in plain_errors),
            limit(e.whole for e in plain_errors),
            limit(e.along for e in plain_errors),
            limit(e.length for e in plain_errors),
            {
                name: FACTOR * max(e.parameters[name] for e in plain_errors) + floor * self._size(name)
                for name in self.gradients
            },
        )

    def errors(self, loss: torch.Tensor, gradients: Gradients) -> Errors:
        """Of gradients by the names of the exact ones; where they have others, only what does not ask for names."""
        loss_error = (loss - self.loss).abs().item() / self.loss.abs().clamp_min(1e-3).item()
        length = abs(norm(gradients) / self.norm - 1)
        if gradients.keys() != self.gradients.keys():
            return Errors(loss_error, 0.0, 0.0, length, {})
        off = {name: (gradients[name] - g).norm().item() / self.norm for name, g in self.gradients.items()}
        product = sum((gradients[name] * g).sum().item() for name, g in self.gradients.items())
        whole = sum(x * x for x in off.values()) ** 0.5
        return Errors(loss_error, whole, abs(product / self.norm**2 - 1), length, off)

    def check(self, contender: Contender) -> float:
        """Hold a contender's first loss and gradients to the exact ones.

        Returns:
            The largest relative error of a parameter's gradient; where parameters are laid out otherwise, of the norm
            of all.

        Raises:
            Disagreement: they differ by more than what is allowed.
        """
        loss, gradients = contender.first()
        gradients = {name: g.double() for name, g in gradients.items()}
        same_layout = contender.module is contender.objective.module
        if same_layout and gradients.keys() != self.gradients.keys():
            names = ", ".join(sorted(gradients.keys() ^ self.gradients.keys()))
            raise Disagreement(f"it and the exact step differ in which parameters have a gradient: {names}")
        errors, allowed = self.errors(loss.double(), gradients), self.allowed
        _hold(f"its first loss, {loss.item():.6g} in place of {self.loss.item():.6g},", errors.loss, allowed.loss)
        if not same_layout:
            _hold("the norm of its first gradients", errors.length, allowed.length)
            return errors.length
        for name, off in errors.parameters.items():
            size = self._size(name)
            _hold(f"its first gradient of {name}", off / size, allowed.parameters[name] / size)
        _hold("its first gradient as a whole", errors.whole, allowed.whole)
        _hold("the length of its first gradient along the exact one", errors.along, allowed.along)
        return max(off / self._size(name) for name, off in errors.parameters.items())

    def _first(self, objective: Objective) -> tuple[torch.Tensor, Gradients]:
        loss, gradients = Contender(self.config, objective, 1, WITH_REFERENCE).first()
        return loss.double(), {name: g.double() for name, g in gradients.items()}

    def _size(self, name: str) -> float:
        """What the error of a parameter's gradient is put beside, in units of the whole's norm."""
        return self.gradients[name].norm().item() / self.norm + NEGLIGIBLE


def _hold(what: str, error: float, allowed: float) -> None:
    if not error <= allowed:
        raise Disagreement(f"{what} is off by {error:.1e} of the exact one; allowed {allowed:.1e}")


def norm(gradients: Gradients) -> float:
    """Of all gradients as one vector."""
    return sum(g.square().sum().item() for g in gradients.values()) ** 0.5


def exactly(objective: Objective) -> Objective:
    """The same in float64: weights and features keep the values they were rounded to."""
    for module in (objective.module, *objective.module.frozen):
        module.double()
    objective.split.features = [x.double() for x in objective.split.features]
    return _asked_again(objective)


@contextmanager
def moved(objective: Objective, distance: float, draw: int) -> Iterator[Objective]:
    """The same, while inside the block every weight and feature is off by up to `distance` of itself."""
    modules = (objective.module, *objective.module.frozen)
    tensors = [*(p.detach() for module in modules for p in module.parameters()), *objective.split.features]
    before = [x.clone() for x in tensors]
    generator = torch.Generator().manual_seed(draw)
    for x in tensors:
        by = (2 * torch.rand(x.shape, generator=generator, dtype=torch.float64) - 1) * distance
        x.copy_(x.double() * (1 + by.to(x.device)))
    try:
        yield _asked_again(objective)
    finally:
        for x, value in zip(tensors, before, strict=True):
            x.copy_(value)


def _asked_again(objective: Objective) -> Objective:
    """The same, with what its frozen networks make of the data now."""
    return Objective(objective.module, objective.split, objective.views, objective.seeds)
