"""L_FRF by hand, and its gradient; tests/methods/test_hrlf.py holds it to its loops."""

import pytest
import torch

from fastmmkd.nn.factorization import RepresentationFactorization


def first_and_second() -> RepresentationFactorization:
    """`Q_m = Z_m[0]` (doubled for the visual modality), `U_m = Z_m[1]`, `D_r(Q, U) = [Q, U]`, of positive Z."""
    frf = RepresentationFactorization(1, 2).double()
    with torch.no_grad():
        for parameter in frf.parameters():
            parameter.zero_()
        frf.sentiment.hidden.weight[:] = frf.modality.hidden.weight[:] = torch.eye(2)
        frf.sentiment.out.weight[:, :, 0, 0] = torch.tensor([1.0, 1.0, 2.0])
        frf.modality.out.weight[:, :, 1, 0] = 1.0
        frf.decoder.hidden.weight[:] = torch.eye(2, 4)
        frf.decoder.out.weight[:] = torch.eye(4, 2)
    return frf


def test_by_hand() -> None:
    """Q = (1, 2, 4) and U = (0, 5, 3); Z_ab = (Q_a, U_b) against Z_b, and E^S_a(Q_b, U_a) against Q_a.

    A second sample is 0 throughout: it adds nothing, and its gradient is finite.
    """
    frf = first_and_second()
    z = torch.zeros(1, 3, 2, 2, dtype=torch.float64)
    z[0, :, 0] = torch.tensor([[1.0, 0.0], [2.0, 5.0], [2.0, 3.0]])
    z.requires_grad_()
    q, u = frf(z)
    assert q[0, :, 0, 0].tolist() == [1.0, 2.0, 4.0]
    assert u[0, :, 0, 0].tolist() == [0.0, 5.0, 3.0]
    own = (0 + 0 + 2) / 3
    across = ((1 + 1) + (1 + 0) + (3 + 2)) / 6
    reread = ((0 + 1 + 3) + (1 + 0 + 2) + (2 + 0 + 4)) / 9
    loss = frf.loss(z, q, u)
    assert loss.item() == pytest.approx((own + across + reread) / 2, rel=1e-12)
    loss.sum().backward()
    assert torch.isfinite(z.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in frf.parameters())


def test_gradient() -> None:
    torch.manual_seed(0)
    frf = RepresentationFactorization(2, 4).double()
    z = torch.randn(2, 3, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: frf.loss(x, *frf(x)), z)


def test_it_is_least_where_all_samples_are_alike() -> None:
    """A decoder that knows one vector and nothing else, and Z that are that vector: 0, whatever Q and U are."""
    torch.manual_seed(0)
    frf = RepresentationFactorization(1, 4).double()
    z = torch.randn(4, dtype=torch.float64).expand(1, 3, 5, 4)
    assert frf.loss(z, *frf(z)).item() > 0.5
    with torch.no_grad():
        frf.decoder.out.weight.zero_()
        frf.decoder.out.bias.copy_(z[:, 0, 0])
    assert frf.loss(z, *frf(z)).item() < 1e-12
