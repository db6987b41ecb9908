"""Partial sums of many programs, more than a parity test of a loss has rows for."""

import pytest
import torch

from tests.parity.losses import normal
from tests.parity.parity import PROVIDER, needs, poisoned_memory

pytestmark = [needs("gaussian_mmd"), pytest.mark.skipif(PROVIDER != "triton", reason="a part of the Triton kernels")]


@pytest.mark.parametrize("programs", [1, 2, 1024, 2500])
def test_every_program_is_added(programs) -> None:
    from fastmmkd.kernels.rows import add_up

    partial = normal(3, programs)
    with poisoned_memory():
        total = add_up(partial)
    torch.testing.assert_close(total, partial.double().sum(1).float(), rtol=1e-5, atol=1e-4)
