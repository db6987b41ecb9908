"""What is called compiled was compiled."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from torch._dynamo.testing import CompileCounter

from bench import compilation
from fastmmkd.errors import UserError

SIZES = range(2, 13)
"""More than the 8 of Dynamo's limit."""


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    switch = next(name for name in compilation.LIMIT_SWITCHES if hasattr(torch._dynamo.config, name))
    before = getattr(torch._dynamo.config, switch)
    yield
    torch._dynamo.reset()
    setattr(torch._dynamo.config, switch, before)


def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_every_size_is_compiled_where_the_others_were_forgotten() -> None:
    counter = CompileCounter()
    for n in SIZES:
        compilation.forget_compiled()
        torch.compile(doubled, dynamic=False, backend=counter)(torch.ones(n))
    assert counter.frame_count == len(SIZES)


def test_the_limit_is_an_error() -> None:
    compilation.forget_compiled()
    counter = CompileCounter()
    function = torch.compile(doubled, dynamic=False, backend=counter)
    with pytest.raises(Exception, match="limit"):
        [function(torch.ones(n)) for n in SIZES]
    assert counter.frame_count == 8


def test_a_torch_without_such_a_switch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "LIMIT_SWITCHES", ("no_such_switch",))
    with pytest.raises(UserError, match="Dynamo has none of no_such_switch"):
        compilation.forget_compiled()
