"""Partial sums of many programs, more than a parity test of a loss has rows for."""

import pytest
import torch

from fastmmkd.testing.losses import normal
from fastmmkd.testing.parity import PROVIDER, needs, poisoned_memory

pytestmark = [needs("gaussian_mmd"), pytest.mark.skipif(PROVIDER != "triton", reason="a part of the Triton kernels")]


@pytest.mark.parametrize("programs", [1, 2, 1024, 2500])
def test_every_program_is_added(programs) -> None:
    from fastmmkd.kernels.rows import add_up

    few, many = normal(3, programs), normal(3, 5, 7, 11)
    with poisoned_memory():
        of_few, of_many = torch.empty(3, device=few.device), torch.empty(3, 7, 11, device=few.device)
        add_up((few, of_few), (many, of_many), (few, few))
    torch.testing.assert_close(of_few, few.double().sum(1).float(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(of_many, many.double().sum(1).float(), rtol=1e-5, atol=1e-4)
