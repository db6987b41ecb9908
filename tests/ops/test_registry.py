import pytest
import torch

from fastmmkd import ops
from fastmmkd.errors import UserError


def test_explain_names_provider_and_reason() -> None:
    for op in ops.OPERATIONS:
        choice = ops.explain(op)
        assert choice.provider in ops.PROVIDERS
        assert choice.reason


def test_forcing_the_reference_by_environment_or_block(monkeypatch) -> None:
    monkeypatch.setenv("FASTMMKD_PROVIDER", "reference")
    assert ops.explain("js_divergence").reason == "forced by FASTMMKD_PROVIDER"
    with ops.use_provider("reference"):
        assert ops.explain("js_divergence").reason == "forced by use_provider"


def test_a_provider_that_cannot_run_fails_loudly(monkeypatch) -> None:
    monkeypatch.setenv("FASTMMKD_PROVIDER", "cuda")
    with pytest.raises(UserError, match="FASTMMKD_PROVIDER=cuda: js_divergence has no such implementation"):
        ops.js_divergence(torch.zeros(1, 2, 2), torch.zeros(1, 2, 2))
    monkeypatch.setenv("FASTMMKD_PROVIDER", "tritn")
    with pytest.raises(UserError, match="not a provider; expected one of triton, cuda, cpp, reference"):
        ops.explain("js_divergence")
    with pytest.raises(UserError, match="not a provider"), ops.use_provider("fast"):
        pass
