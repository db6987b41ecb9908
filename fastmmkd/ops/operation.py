"""What an operation says about itself; everything else that must know one reads it here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from fastmmkd.errors import UserError, nearest
from fastmmkd.ops.work import Work


@dataclass(frozen=True, eq=False)
class Op:
    """The entry of one operation; making one puts it into `OPERATIONS`.

    Without `kernels` it is run by its definition on every device.
    """

    name: str
    """That of its file and of the public function in it."""
    definition: Callable[..., Any]
    """What it computes, in plain PyTorch, with all the arguments of the public function: `fastmmkd.ops.reference`."""
    kernels: tuple[str, ...] = ()
    """The providers that have kernels of it: "triton" (`kernels/`), "cuda" and "cpp" (`csrc/`)."""
    compiled: Callable[..., Any] | None = None
    """What runs the kernels, with the arguments of the definition; None where there are none."""
    composed: Callable[..., Any] | None = None
    """What runs it where it has no kernels, with the arguments of the definition: a composition of other operations,
    each of which runs as it does by itself; None: the definition does."""
    gradient: Literal["", "forward", "backward"] = ""
    """Where kernels compute it: with the result, or in an operation of its own, `<name>_backward`; "" if nowhere."""
    work: Callable[..., Work] | None = None
    """What the kernels must move and compute, of the sizes that it names."""
    backward_work: Callable[..., Work] | None = None
    """The same of `<name>_backward`."""
    place: int = 1000
    """Where it stands in tables and among measurements, the smallest first: those that most of a step goes into."""

    def __post_init__(self) -> None:
        OPERATIONS[self.name] = self

    @property
    def functions(self) -> tuple[str, ...]:
        """The compiled operations that it consists of, which are also the functions that its kernels provide."""
        if not self.kernels:
            return ()
        return (self.name, backward_of(self.name)) if self.gradient == "backward" else (self.name,)


OPERATIONS: dict[str, Op] = {}
"""All operations by name, in the order of their places."""


def in_order() -> None:
    """Bring `OPERATIONS`, in which entries stand as they were made, into its order."""
    for op in sorted(OPERATIONS.values(), key=lambda op: (op.place, op.name)):
        OPERATIONS[op.name] = OPERATIONS.pop(op.name)


def backward_of(name: str) -> str:
    """The name of the operation that computes the gradient of another."""
    return f"{name}_backward"


def operation(name: str) -> Op:
    """The entry of the operation of that name.

    Raises:
        UserError: there is none.
    """
    if name not in OPERATIONS:
        known = nearest(name, OPERATIONS) or f"; expected one of {', '.join(OPERATIONS)}"
        raise UserError(f"{name}: not an operation{known}")
    return OPERATIONS[name]
