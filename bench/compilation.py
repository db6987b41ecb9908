"""How `torch.compile` is kept from measuring what it did not compile."""

from __future__ import annotations

import torch

from fastmmkd.errors import UserError

LIMIT_SWITCHES = ("fail_on_recompile_limit_hit", "fail_on_cache_limit_hit")
"""Of torch._dynamo.config; the name that this torch has is the one that counts."""


def forget_compiled() -> None:
    """Have Dynamo count from 0, and fail at its limit.

    It counts compilations per code object, and what comes after its limit of 8 it runs eagerly without a word: a
    compiled reference that is none.

    Raises:
        UserError: this torch has no such switch.
    """
    from torch import _dynamo  # it takes a second that not every benchmark has to wait

    _dynamo.reset()
    switch = next((name for name in LIMIT_SWITCHES if hasattr(_dynamo.config, name)), None)
    if switch is None:
        raise UserError(f"torch {torch.__version__}: Dynamo has none of {', '.join(LIMIT_SWITCHES)}")
    setattr(_dynamo.config, switch, True)
