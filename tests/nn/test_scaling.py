"""Unit vectors, of which 0 is none."""

from __future__ import annotations

import pytest
import torch

from fastmmkd.nn.scaling import unit_length


def test_lengths_by_hand() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0], [-2.0, 0.0]])
    assert unit_length(x).tolist() == [pytest.approx([0.6, 0.8]), [0.0, 0.0], pytest.approx([-1.0, 0.0])]


def test_a_zero_vector_has_gradient_zero() -> None:
    x = torch.zeros(2, 3, requires_grad=True)
    unit_length(x).sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


def test_gradient() -> None:
    x = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(unit_length, x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_neither_overflows_nor_vanishes(dtype: torch.dtype) -> None:
    """Squares of 1e3 and of 1e-4 do not exist in fp16."""
    for scale in (1e3, 1e-4):
        x = torch.full((1, 4), scale, dtype=dtype)
        found = unit_length(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), torch.full((1, 4), 0.5), rtol=1e-2, atol=0)
