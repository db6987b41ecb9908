"""A stand-in for CUDA graphs on a CPU: it repeats functions instead of kernels, and refuses what a capture would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {
    "_local_scalar_dense": "reads a value on the host (.item(), .tolist(), if, a slice of a tensor's length)",
    "item": "reads a value on the host",
    "equal": "compares on the host",
    "is_nonzero": "branches on a value",
    "nonzero": "has a shape that depends on values",
    "masked_select": "has a shape that depends on values",
    "_unique2": "has a shape that depends on values",
    "unique_dim": "has a shape that depends on values",
    "unique_consecutive": "has a shape that depends on values",
    "bincount": "has a shape that depends on values",
    "lift_fresh": "brings a value from the host (torch.tensor, new_tensor)",
    "repeat_interleave.Tensor": "has a shape that depends on values",
}


class NoHostSync(TorchDispatchMode):
    """Raises where an operation would make the host wait for the device."""

    def __enter__(self) -> Any:
        # On a CPU these are no operations.
        self.patches = pytest.MonkeyPatch()
        for name in ("tolist", "numpy"):
            self.patches.setattr(torch.Tensor, name, _refused(name))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.patches.undo()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__  # "nonzero.default"
        reason = WAITS.get(name) or WAITS.get(name.split(".")[0]) if name != "repeat_interleave.self_int" else None
        if reason:
            raise RuntimeError(f"{name} {reason}; a capture cannot")
        if any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in _indices(name, args)):
            raise RuntimeError(f"{name} with a bool index has a shape that depends on values; a capture cannot")
        return func(*args, **(kwargs or {}))


def _refused(name: str) -> Callable[..., Any]:
    def refuse(*_: Any) -> None:
        raise RuntimeError(f"{name} reads values on the host; a capture cannot")

    return refuse


def _indices(name: str, args: Any) -> list[Any]:
    return list(args[1]) if name.startswith(("index.", "index_put", "_index_put")) else []


class _WithoutEffect(NoHostSync):
    """A capture records and does not run: what operations write to is put back at the end, but for their own."""

    def __enter__(self) -> _WithoutEffect:
        self.before: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.made: dict[int, torch.UntypedStorage] = {}
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = args[i] if i < len(args) else (kwargs or {}).get(argument.name)
                for x in tree_leaves(written):
                    if isinstance(x, torch.Tensor) and id(x) not in self.before and not self._is_own(x):
                        self.before[id(x)] = x, x.detach().clone()
        given = {_memory(x) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and _memory(x) not in given:
                self.made[_memory(x)] = x.untyped_storage()  # kept, so that nothing else comes to lie there
        return result

    def _is_own(self, x: torch.Tensor) -> bool:
        return _memory(x) in self.made

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        with torch.no_grad():
            for x, value in self.before.values():
                x.copy_(value)


def _memory(x: torch.Tensor) -> int:
    return x.untyped_storage()._cdata


class FakeCapture:
    """Captures as `fastmmkd.engine.graphs.CudaCapture` does, with nothing but a CPU."""

    def __init__(self) -> None:
        self.captured = self.replayed = 0

    def warm_up(self, run: Callable[[], Any]) -> None:
        run()

    def __call__(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        with _WithoutEffect():
            result = run()
        static = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
        self.captured += 1

        def replay() -> None:
            fresh = [x for x in tree_leaves(run()) if isinstance(x, torch.Tensor)]
            with torch.no_grad():
                for to, x in zip(static, fresh, strict=True):
                    to.copy_(x)
            self.replayed += 1

        return replay, result
