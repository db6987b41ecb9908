"""Gradient reversal, and discriminators that are sure of themselves; tests/methods/test_hrlf.py holds them to L_HAL."""

import pytest
import torch

from fastmmkd.nn.adversarial import Discriminator, reverse_gradient


def test_reversal_is_the_identity_with_the_gradients_sign_changed() -> None:
    x, weight = torch.tensor([1.0, -2.0], requires_grad=True), torch.tensor([3.0, 5.0])
    y = reverse_gradient(x)
    assert torch.equal(y, x)
    (y * weight).sum().backward()
    assert torch.equal(x.grad, -weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_discriminator_that_is_sure_and_wrong_is_finite(dtype) -> None:
    """Logits of 1e4 for the student, -1e4 for the teacher: `log sigmoid` would be infinite."""
    discriminator = Discriminator(1, 1, 1)
    with torch.no_grad():
        for parameter, value in zip(discriminator.parameters(), (1.0, 0.0, 2e4, -1e4), strict=True):
            parameter.fill_(value)
    discriminator.to(dtype)
    student = torch.ones(1, 2, 1, dtype=dtype, requires_grad=True)
    loss = discriminator(torch.zeros(1, 3, 1, dtype=dtype), student)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(2e4, rel=1e-2)
    loss.sum().backward()
    assert torch.isfinite(student.grad).all()
    assert (student.grad < 0).all()  # reversed: a descending student raises the logit that the discriminator lowers
