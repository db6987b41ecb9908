"""How a compiled implementation is held to the fp64 reference: by the error of plain PyTorch in the same precision.

`FASTMMKD_PARITY` names the provider under test: "cpp" (the default), or "triton" or "cuda" on a CUDA device;
`TRITON_INTERPRET=1 FASTMMKD_PARITY=triton` holds the Triton kernels to the same cases without one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from fastmmkd.ops import extension, operation
from fastmmkd.ops.providers import INTERPRETED, obstacle

PROVIDER = os.environ.get("FASTMMKD_PARITY", "cpp")
DEVICE = torch.device("cpu" if PROVIDER == "cpp" or INTERPRETED else "cuda")
DTYPES = [
    dtype
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if not obstacle(PROVIDER, operation("residual_layer_norm"), DEVICE, [dtype])
]
EXAMPLES = 8 if INTERPRETED else 40
"""Of a property: interpreted, a program takes milliseconds."""
INSTRUCTION_SETS = extension.build_info()["instruction sets"].split(", ") if PROVIDER == "cpp" and DTYPES else ["-"]

if INTERPRETED:
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    _call = InterpretedFunction.__call__

    def _call_without_patching(self: InterpretedFunction, *args: Any, **kwargs: Any) -> Any:
        """triton.language is patched while a kernel runs; doing so again whenever it calls a function takes longest."""
        return self.rewrite()(*args, **kwargs) if self.fn.__globals__.get("tl") is tl else _call(self, *args, **kwargs)

    InterpretedFunction.__call__ = _call_without_patching

FLOOR = {torch.float32: 1e-6, torch.float16: 3e-4, torch.bfloat16: 2e-3}
"""An error, relative to the largest value, that is always allowed: a few roundings."""
BOUND = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""The error, relative to the largest value, that is never allowed to a kernel unless plain PyTorch makes it too."""
CANCELLED = 2e-6
"""What may be left of a sum of terms of size 1 that is 0."""


def needs(op: str) -> pytest.MarkDecorator:
    """Skip where the provider under test has no kernels of `op`."""
    reason = obstacle(PROVIDER, operation(op), DEVICE, [])
    return pytest.mark.skipif(bool(reason), reason=reason or "-")


only_cpp = pytest.mark.skipif(PROVIDER != "cpp", reason="threads and instruction sets are the CPU's")


def assert_as_exact(
    name: str, fast: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor, factor: float = 2.0, terms: float = 1.0
) -> None:
    """`fast` errs at most `factor` times as much as `plain`, both against `exact`, a sum of terms of size `terms`."""
    assert fast.shape == exact.shape
    assert fast.dtype == plain.dtype
    if exact.numel() == 0:
        return
    scale = exact.abs().max().item()
    error, plain_error = ((x.double() - exact).abs().max().item() for x in (fast, plain))
    allowed = factor * plain_error + FLOOR[fast.dtype] * scale
    allowed = min(allowed, max(BOUND[fast.dtype] * scale, plain_error)) + CANCELLED * terms
    assert error <= allowed, f"{name}: error {error:.2e}, allowed {allowed:.2e}, largest value {scale:.2e}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors hold NaN, so that an element that nobody writes is seen."""
    switches: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    switches.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        switches.fill_uninitialized_memory = before[1]


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """The C++ kernels use this instruction set."""
    if PROVIDER != "cpp":
        yield
        return
    extension.module.set_isa(name)
    try:
        yield
    finally:
        extension.module.set_isa(os.environ.get("FASTMMKD_ISA", ""))


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch's intra-op threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def value_and_gradients(
    function: Callable[..., torch.Tensor], inputs: Sequence[torch.Tensor], grad: torch.Tensor
) -> list[torch.Tensor]:
    """`function(*inputs)` and the gradients of its product with `grad` in every input."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]
