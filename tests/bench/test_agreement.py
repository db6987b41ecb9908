"""What contenders are held to: the exact step, by as much as plain PyTorch errs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

from bench import agreement, as_trained, lineup
from bench.agreement import Agreement, Disagreement
from bench.as_trained import AsTrained
from bench.contenders import WITH_REFERENCE, Contender
from bench.rounds import Clock
from bench.variants import AS_TRAINED, COMPILED, CROPPED, JAGGED, OURS, PLAIN, REFERENCE, SDPA, SEEDS
from fastmmkd.blocks import Config
from fastmmkd.data.dataset import Dataset
from fastmmkd.engine.device import DTYPES, prepare_process
from fastmmkd.engine.step import STEPS, Objective, untrained_objective
from tests.engine.fake_capture import FakeCapture

CPU = torch.device("cpu")
PRECISIONS = [torch.float32, torch.bfloat16]
Build = Callable[..., dict[str, Contender]]

pytestmark = pytest.mark.usefixtures("process_state")


@pytest.fixture(params=PRECISIONS, ids=str)
def exact(request: pytest.FixtureRequest, config: Config, dataset: Dataset) -> Agreement:
    return Agreement(config, dataset, CPU, request.param)


@pytest.fixture
def ours(build: Build, exact: Agreement) -> Contender:
    return build(OURS, dtype=exact.dtype)[OURS]


def largest(contender: Contender) -> torch.nn.Parameter:
    """The parameter with the largest gradient."""
    _, gradients = contender.first()
    name = max(gradients, key=lambda name: gradients[name].norm())
    return dict(contender.module.named_parameters())[name]


def test_in_double_precision_those_that_pad_or_fuse_are_the_reference(build: Build) -> None:
    contenders = build(REFERENCE, SDPA, CROPPED, JAGGED, dtype=torch.float64)
    _, expected = contenders[REFERENCE].first()
    fused = torch.nn.functional.scaled_dot_product_attention
    for name, contender in contenders.items():
        with mock.patch.object(torch.nn.functional, fused.__name__, side_effect=fused) as called:
            _, gradients = contender.first()
        assert called.called == (name in (SDPA, JAGGED))
        torch.testing.assert_close(gradients, expected, rtol=1e-9, atol=1e-12)


def test_all_contenders_agree(config: Config, build: Build, exact: Agreement) -> None:
    names = [name for name in lineup.names(config, CPU) if name not in (COMPILED, AS_TRAINED)]
    assert {OURS, REFERENCE, SDPA, CROPPED, JAGGED, SEEDS} | ({PLAIN} if config.method == "umdf" else set()) == {*names}
    errors = [exact.check(contender) for contender in build(*names, dtype=exact.dtype).values()]
    assert max(errors) < (1e-4 if exact.dtype == torch.float32 else 0.3)


@pytest.mark.parametrize(
    ("mode", "precision"),
    [("off", "fp32"), ("off", "bf16"), ("fwdbwd", "fp32"), ("fwdbwd", "bf16"), ("step", "fp32"), ("step", "bf16")],
)
def test_the_step_as_trained_agrees(
    mode: str, precision: str, config: Config, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision == "bf16":
        block = config.deepspeed | {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}
        config = config.model_copy(update={"deepspeed": block})
    monkeypatch.setattr(as_trained, "graph_mode", lambda *_: (mode, None))
    monkeypatch.setattr(STEPS[mode], "capture", FakeCapture, raising=False)
    prepare_process(config)
    contender = lineup.build(AS_TRAINED, config, dataset, 1, CPU, torch.float32)
    assert isinstance(contender, AsTrained)
    exact = Agreement(config, dataset, CPU, DTYPES[precision])
    assert exact.check(contender) < (1e-4 if precision == "fp32" else 0.3)
    assert contender.about == {"precision": precision, "train.graph": mode, "said": []}
    if mode != "step":  # what reached DeepSpeed was looked at
        assert contender.left.keys() == dict(contender.objective.module.named_parameters()).keys()
    before = contender.take(*contender.keys(0)[::2], []).clone()
    for _ in range(30):
        contender(0, Clock(CPU))
    assert contender.take(*contender.keys(0)[::2], [])[0] < before[0]


def test_one_wrong_gradient_is_refused(ours: Contender, exact: Agreement) -> None:
    largest(ours).register_hook(lambda grad: 1.5 * grad)
    with pytest.raises(Disagreement, match=r"its first gradient of \S+ is off by .* of the exact one; allowed"):
        exact.check(ours)


def test_a_gradient_of_twenty_to_the_nineteen_is_refused(ours: Contender, exact: Agreement) -> None:
    for parameter in ours.module.parameters():
        parameter.register_hook(lambda grad: 0.95 * grad)
    with pytest.raises(Disagreement, match="is off by"):
        exact.check(ours)


def test_another_loss_is_refused(ours: Contender, exact: Agreement) -> None:
    forward = ours.forward
    ours.forward = lambda batch: 1.05 * forward(batch)
    with pytest.raises(Disagreement, match=r"its first loss, .* is off by 5"):
        exact.check(ours)


def test_a_term_that_is_left_out_is_refused(build: Build, config: Config, dataset: Dataset) -> None:
    """A twentieth of the gradient of one parameter, in another direction than the gradient."""
    exact = Agreement(config, dataset, CPU, torch.float32)
    (ours,) = build(OURS).values()

    def without(grad: torch.Tensor) -> torch.Tensor:
        term = torch.randn(grad.shape, generator=torch.Generator().manual_seed(0))
        return grad - 0.05 * grad.norm() * term / term.norm()

    largest(ours).register_hook(without)
    with pytest.raises(Disagreement, match="its first gradient of"):
        exact.check(ours)


def test_a_gradient_that_is_missing_is_refused(ours: Contender, exact: Agreement) -> None:
    name, parameter = next(iter(ours.module.named_parameters()))
    parameter.requires_grad_(False)
    with pytest.raises(Disagreement, match=f"which parameters have a gradient: {name}"):
        exact.check(ours)


def test_nothing_finite_is_no_agreement(ours: Contender, exact: Agreement) -> None:
    largest(ours).register_hook(lambda grad: grad * torch.nan)
    with pytest.raises(Disagreement, match="is off by nan"):
        exact.check(ours)


EDGE = {"umdf": "hidden", "corrkd": "network.hidden", "hrlf": "network.stack.0"}
"""A layer whose every output goes through a ReLU to the loss."""


def test_a_relu_that_is_about_to_switch_does_not_decide(
    config: Config, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bias of one unit brings its input within rounding of 0 for one sample; being open or shut is both right."""
    layer = EDGE[config.method]

    def input_of_the_unit() -> torch.Tensor:
        objective, seen = agreement.exactly(untrained_objective(config, dataset, [1], CPU, torch.float32)), []
        linear = objective.module.get_submodule(layer)
        linear.register_forward_hook(lambda module, args, out: seen.append(args[0].detach()))
        Contender(config, objective, 1, WITH_REFERENCE).first()
        return seen[0].flatten(0, -2)[0] @ linear.weight[0].detach() + linear.bias[0].detach()  # of the first sample

    inputs = input_of_the_unit()
    unit = inputs.abs().argmin()

    def at_the_edge(*args: Any, **how: Any) -> Objective:
        objective = untrained_objective(*args, **how)
        with torch.no_grad():
            objective.module.get_submodule(layer).bias[0, unit] -= inputs[unit]
        return objective

    def contender(nudge: float) -> Contender:
        objective = at_the_edge(config, dataset, [1], CPU, torch.float32)
        with torch.no_grad():
            objective.module.get_submodule(layer).bias[0, unit] += nudge
        return Contender(config, objective)

    monkeypatch.setattr(agreement, "untrained_objective", at_the_edge)
    exact = Agreement(config, dataset, CPU, torch.float32)
    errors = [exact.check(contender(nudge)) for nudge in (1e-6, -1e-6)]
    assert min(errors) < 1e-4
    assert max(errors) > 1e-3, "the unit does not matter"


def test_the_exact_step_misses_what_the_others_miss(config: Config, dataset: Dataset) -> None:
    objective = untrained_objective(config, dataset, [1], CPU, torch.bfloat16)
    exact = agreement.exactly(untrained_objective(config, dataset, [1], CPU, torch.bfloat16))
    keys = Contender(config, objective).keys(0)
    drawn, exactly_drawn = (o.draw(keys.rows, keys.epoch).inputs for o in (objective, exact))
    for x, y in zip(drawn.features, exactly_drawn.features, strict=True):
        assert torch.equal(x.double(), y)
    for x, y in zip(drawn.masks, exactly_drawn.masks, strict=True):
        assert torch.equal(x, y)
        assert not x.all()


def test_moved_weights_come_back(config: Config, dataset: Dataset) -> None:
    objective = untrained_objective(config, dataset, [1], CPU, torch.float32)
    before = [p.clone() for p in objective.module.parameters()]
    with agreement.moved(objective, 1e-3, draw=0):
        now = zip(objective.module.parameters(), before, strict=True)
        assert 1e-4 < max(((p - b).abs().max() / b.abs().max()).item() for p, b in now) <= 1e-3
    for p, b in zip(objective.module.parameters(), before, strict=True):
        assert torch.equal(p, b)
