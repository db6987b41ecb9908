"""The flat update against torch's Adam and DeepSpeed's; what a gradient that is not finite does; what it costs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastmmkd.config import load_config, parse_config
from fastmmkd.engine import flat_adam as flat
from fastmmkd.engine.device import place, prepare_process, start_deepspeed, wrap
from fastmmkd.engine.flat_adam import FlatAdam, flat_adam
from fastmmkd.engine.graphs import GraphedStep
from fastmmkd.errors import UserError
from fastmmkd.methods.umdf import UMDF, UmdfLoss, UmdfModel
from fastmmkd.tasks import Task
from tests.engine.fake_capture import FakeCapture, NoHostSync
from tests.engine.tiny_methods import BATCH, build

SHAPES = [(3, 5), (1,), (40, 40), (), (7,)]
STEPS = 20


def parameters(models: int, seed: int = 0) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(models, *shape, generator=generator)) for shape in SHAPES]


def give_gradients(params: list[torch.nn.Parameter], step: int, scale: float = 1.0) -> None:
    """Gradients in the parameters' precision; some lie in memory as a product leaves them."""
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        gradient = (scale * torch.randn(p.shape, generator=generator)).to(p.dtype)
        p.grad = gradient.transpose(-1, -2).contiguous().transpose(-1, -2) if p.dim() > 2 else gradient


def copies(params: list[torch.nn.Parameter]) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize(("kind", "decay"), [("Adam", 0.0), ("Adam", 0.1), ("AdamW", 0.1)])
def test_in_fp32_every_model_is_torchs_adam_with_clipping(models: int, kind: str, decay: float) -> None:
    params = parameters(models)
    each = [[torch.nn.Parameter(p[model].detach().clone()) for p in params] for model in range(models)]
    settings: dict[str, Any] = {"lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": decay}
    ours = FlatAdam(params, torch.float32, 2.0, kind == "AdamW", **settings)
    theirs = [getattr(torch.optim, kind)(own, **settings) for own in each]
    for step in range(STEPS):
        give_gradients(params, step, scale=0.01 if step % 2 else 1.0)  # below the limit, and above
        for model, (own, optimizer) in enumerate(zip(each, theirs, strict=True)):
            for p, whole in zip(own, params, strict=True):
                p.grad = whole.grad[model].clone()
            torch.nn.utils.clip_grad_norm_(own, 2.0)
            optimizer.step()
        ours.step()
    for model, own in enumerate(each):
        torch.testing.assert_close([p[model] for p in params], own, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("models", [1, 3])
def test_parameters_are_aligned_views_that_hold_the_master_weights(models: int, dtype: torch.dtype) -> None:
    params = parameters(models)
    before = copies(params)
    update = FlatAdam(params, dtype, 1.0, False, lr=0.5)
    for p, value in zip(params, before, strict=True):
        assert p.dtype == dtype
        assert p.is_contiguous()
        assert p.data_ptr() % 16 == 0
        assert torch.equal(p, value.to(dtype))
    assert float(update.weights.double().sum()) == pytest.approx(float(sum(x.double().sum() for x in before)))
    give_gradients(params, 0)
    update.step()
    assert not any(torch.equal(p, value.to(dtype)) for p, value in zip(params, before, strict=True))


def test_small_steps_add_up_in_the_master_weights() -> None:
    """bf16 alone would lose every one of them."""
    (param,) = made = [torch.nn.Parameter(torch.full((1, 8), 100.0))]
    update = FlatAdam(made, torch.bfloat16, 0.0, False, lr=0.01)
    for _ in range(100):
        param.grad = torch.ones_like(param)
        update.step()
    assert param[0, 0].item() == pytest.approx(99.0, abs=0.5)
    assert torch.allclose(update.weights[0, :8], torch.tensor(99.0))


def test_a_parameter_without_a_gradient_stays_and_the_others_do_not() -> None:
    params = parameters(2)
    before = copies(params)
    update = FlatAdam(params, torch.float32, 1.0, False)
    give_gradients(params, 0)
    params[2].grad = None
    update.step()
    unchanged = [torch.equal(p, value) for p, value in zip(params, before, strict=True)]
    assert unchanged == [False, False, True, False, False]


def test_parameters_of_different_numbers_of_models_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parameters of \[\(2,\), \(3,\)\] models; expected one number of models"):
        FlatAdam([torch.nn.Parameter(torch.zeros(n, 4)) for n in (2, 3)], torch.float32, 1.0, False)


class TestGradientsThatAreNotFinite:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("value", [float("inf"), float("nan")])
    def test_only_that_model_skips_that_step(self, value: float, dtype: torch.dtype) -> None:
        params, expected = parameters(3), parameters(3)
        ours, other = (FlatAdam(p, dtype, 1.0, False) for p in (params, expected))
        for step in range(4):
            give_gradients(params, step)
            give_gradients(expected, step)
            if step == 2:
                before, state = copies(params), copy.deepcopy(ours.state_dict()["state"])
                params[0].grad[1, 2, 0] = value
            with NoHostSync():
                ours.step()
            other.step()
            if step == 2:
                assert all(torch.equal(p[1], kept[1]) for p, kept in zip(params, before, strict=True))
                for name, kept in state.items():
                    assert torch.equal(ours.state_dict()["state"][name][1], kept[1]), name
        for p, q in zip(params, expected, strict=True):
            assert torch.equal(p[[0, 2]], q[[0, 2]])
            assert torch.isfinite(p).all()
        assert ours.skipped(4) == [0, 1, 0]
        assert other.skipped(4) == [0, 0, 0]

    def test_a_model_that_skips_goes_on_as_if_the_step_had_not_been(self) -> None:
        params, expected = parameters(1), parameters(1)
        ours, other = (FlatAdam(p, torch.float32, 1.0, False) for p in (params, expected))
        for step in range(5):
            give_gradients(params, step)
            if step in (0, 3):
                params[2].grad[0, 0, 0] = float("nan")
            else:
                give_gradients(expected, step)
                other.step()
            ours.step()
        assert all(torch.equal(p, q) for p, q in zip(params, expected, strict=True))
        assert ours.skipped(5) == [2]

    def test_it_is_so_without_clipping(self) -> None:
        params = parameters(2)
        update, before = FlatAdam(params, torch.float32, 0.0, False), copies(params)
        give_gradients(params, 0)
        params[4].grad[0, 3] = float("inf")
        update.step()
        assert all(torch.equal(p[0], value[0]) for p, value in zip(params, before, strict=True))
        assert not any(torch.equal(p[1], value[1]) for p, value in zip(params, before, strict=True))


def test_a_model_that_has_stopped_stays_as_it_is_whatever_its_gradient() -> None:
    params, expected = parameters(3), parameters(3)
    ours, other = (FlatAdam(p, torch.float32, 1.0, False) for p in (params, expected))
    for step in range(3):
        for own, update in ((params, ours), (expected, other)):
            give_gradients(own, step)
            update.step()
        if step == 0:
            ours.stop([1])
            before = copies(params)
    for p, q, value in zip(params, expected, before, strict=True):
        assert torch.equal(p[1], value[1])
        assert torch.equal(p[[0, 2]], q[[0, 2]])
    ours.stop([])
    give_gradients(params, 3)
    ours.step()
    assert not any(torch.equal(p[1], value[1]) for p, value in zip(params, before, strict=True))


class TestState:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("models", [1, 2])
    def test_it_goes_on_to_the_last_bit(self, models: int, dtype: torch.dtype, tmp_path: Path) -> None:
        params = parameters(models)
        update = FlatAdam(params, dtype, 1.0, False, lr=0.01)
        for step in range(3):
            give_gradients(params, step)
            update.step()
        update.param_groups[0]["lr"] = 0.005
        torch.save(update.state_dict(), tmp_path / "state.pt")
        others = parameters(models, seed=1)
        resumed = FlatAdam(others, dtype, 1.0, False, lr=0.01)
        resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
        for step in range(3):
            if step:
                for own, optimizer in ((params, update), (others, resumed)):
                    give_gradients(own, step)
                    optimizer.step()
            assert all(torch.equal(p, q) for p, q in zip(params, others, strict=True))
            assert torch.equal(update.weights, resumed.weights)

    def test_that_of_another_optimiser_is_refused(self) -> None:
        update, theirs = FlatAdam(parameters(1), torch.float32, 1.0, False), torch.optim.Adam(parameters(1))
        for saved in (None, theirs.state_dict(), FlatAdam(parameters(2), torch.float32, 1.0, False).state_dict()):
            with pytest.raises(UserError, match=r"^a checkpoint with another optimiser's state; expected flat master"):
                update.load_state_dict(saved)


ADAM = {"type": "Adam", "params": {"lr": 1e-3, "torch_adam": True, "adam_w_mode": False, "weight_decay": 0.0}}
STAGE_1 = {"zero_optimization": {"stage": 1}}


class TestWhoseItIs:
    @pytest.mark.parametrize(
        ("changed", "processes", "ours"),
        [
            ({}, 1, True),
            ({}, 2, True),
            ({"bf16": {"enabled": True}}, 1, True),
            (STAGE_1, 1, True),
            (STAGE_1, 2, False),
            ({"zero_optimization": {"stage": 2}}, 1, False),
            ({"fp16": {"enabled": False}}, 1, True),
            ({"fp16": {"enabled": True}} | STAGE_1, 1, False),
            ({"bf16": {"enabled": True, "check_grad_overflow": False}}, 1, False),
            ({"optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}}, 1, True),
            ({"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}, 1, False),
            ({"optimizer": {"type": "Adam", "params": {"torch_adam": True, "amsgrad": True}}}, 1, False),
            ({"optimizer": {"type": "Adam", "params": {"torch_adam": True, "fused": False}}}, 1, False),
            ({"optimizer": {"type": "SGD", "params": {"lr": 1e-3}}}, 1, False),
            ({"communication_data_type": "bf16"}, 1, False),
        ],
    )
    def test_blocks(self, changed: dict, processes: int, ours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(flat, "world_size", lambda: processes)
        assert (flat_adam({"optimizer": ADAM} | changed) is not None) == ours

    def test_its_settings_are_those_that_deepspeed_would_take(self) -> None:
        def made(**block: Any) -> FlatAdam:
            make = flat_adam({"optimizer": ADAM} | block)
            assert make is not None
            return make(parameters(1))

        assert made().clip == 1.0
        assert made(gradient_clipping=0.3).clip == 0.3
        assert made().adam is torch._fused_adam_
        assert made(bf16={"enabled": True}).flat.dtype == torch.bfloat16
        plain = made(optimizer={"type": "Adam", "params": {"torch_adam": True}})
        assert plain.adam is torch._fused_adamw_
        assert plain.param_groups[0]["weight_decay"] == 0.01


@pytest.fixture
def engine_of(tiny_config: dict, tmp_path: Path, process_state: None) -> Callable[..., Any]:
    """`engine_of(module, block)`: DeepSpeed's engine on the CPU; the block's keys in place of the tiny config's."""
    config = parse_config(tiny_config)
    prepare_process(config)
    placement, log_file = place(config), tmp_path / "deepspeed.log"
    deepspeed = start_deepspeed(placement, log_file)
    return lambda module, block: wrap(deepspeed, module, placement.deepspeed | block, log_file)


@pytest.fixture
def umdf() -> torch.nn.Module:
    """The network of the shipped UMDF config for MOSEI."""
    config = load_config(Path(__file__).parents[2] / "configs" / "umdf_mosei.json")
    assert isinstance(config.model, UmdfModel)
    torch.manual_seed(0)
    return UMDF(config.model, UmdfLoss(), Task("regression"), (300, 74, 35), 1)


class Calls(TorchDispatchMode):
    """Counts the operators that are called."""

    def __enter__(self) -> Calls:
        self.names: list[str] = []
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


NO_LAUNCH = {"view.default", "unsqueeze.default", "unbind.int"}


@pytest.mark.parametrize(("precision", "launches"), [("fp32", 10), ("bf16", 12)])
def test_the_update_of_umdf_takes_a_handful_of_launches(
    umdf: torch.nn.Module, engine_of: Callable[..., Any], precision: str, launches: int
) -> None:
    """Beside 97 views that the gradients are gathered by."""
    engine = engine_of(umdf, STAGE_1 | {"bf16": {"enabled": precision == "bf16"}})
    own = list(engine.module.parameters())
    assert len(own) == 97
    for p in own:
        p.grad = torch.ones_like(p)
    with NoHostSync(), Calls() as calls:
        engine.step()
    called = [name for name in calls.names if not name.startswith("_record_function")]
    assert len(called) - 97 <= 20, called
    assert len([name for name in called if name not in NO_LAUNCH]) == launches, called
    engine.destroy()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_twenty_steps_are_deepspeeds_own(precision: str, engine_of: Callable[..., Any]) -> None:
    from deepspeed.utils import safe_get_full_fp32_param

    size = UmdfModel(width=8, heads=2, mcim_layers=1, encoder_layers=1)
    module, rounded = UMDF(size, UmdfLoss(), Task("regression"), (5, 4, 3), 1), precision == "bf16"
    for p in module.parameters():
        p.data = p.data.bfloat16().float()  # what DeepSpeed starts from; the flat master weights would be finer
    twin = copy.deepcopy(module)
    block: dict[str, Any] = STAGE_1 | {"bf16": {"enabled": rounded}, "gradient_clipping": 0.5}
    unfused = {"type": "Adam", "params": ADAM["params"] | {"fused": False}}
    ours, theirs = engine_of(module, block | {"optimizer": ADAM}), engine_of(twin, block | {"optimizer": unfused})
    assert isinstance(ours.optimizer, FlatAdam)
    assert not isinstance(theirs.optimizer, FlatAdam)
    for step in range(STEPS):
        for engine in (ours, theirs):
            give = list(engine.module.parameters())
            # The same gradients for both: where theirs came from their own weights, rounding would part the two.
            generator = torch.Generator().manual_seed(step)
            scalar = sum((p.float() * torch.randn(p.shape, generator=generator)).sum() for p in give)
            engine.backward(scalar)
            engine.step()
    for p, q in zip(ours.module.parameters(), theirs.module.parameters(), strict=True):
        master = ours.optimizer.weights[0, p.storage_offset() :][: p.numel()].view(p.shape)
        torch.testing.assert_close(master, safe_get_full_fp32_param(q), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(p, q, rtol=2**-7 if rounded else 1e-6, atol=1e-6)  # the last of bf16's digits
    assert ours.global_steps == theirs.global_steps == STEPS
    ours.destroy()
    theirs.destroy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_is_the_eager_one_and_skips_as_it_does(dtype: torch.dtype) -> None:
    """With a schedule, a step that is skipped by one model, and one that stops."""

    def module_of() -> torch.nn.Module:
        torch.manual_seed(0)
        module = torch.nn.Module()
        module.weight = torch.nn.Parameter(torch.randn(3, 6, 2))
        module.bias = torch.nn.Parameter(torch.randn(3, 2))
        return module

    def loss_of(module: torch.nn.Module) -> Callable:
        def loss(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            each = (x.to(dtype) @ module.weight + module.bias[:, None]).float().square().mean((1, 2))
            return each.sum(), each.detach()

        return loss

    def inputs() -> Iterator[torch.Tensor]:
        for step in range(6):
            x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(step))
            if step == 3:
                x[1, 0, 0] = 1e30  # finite, its square is not
            yield x

    def run(step_of: Callable[[torch.nn.Module, FlatAdam], Callable]) -> tuple[list[torch.Tensor], list[float]]:
        module = module_of()
        update = FlatAdam(module.parameters(), dtype, 1.0, False, lr=2**-6)
        step = step_of(module, update)
        for i, x in enumerate(inputs()):
            update.stop([2] if i >= 4 else [])
            update.param_groups[0]["lr"] = 2.0 ** -(6 + i)
            step(x)
        return copies(list(module.parameters())), update.skipped(6)

    def eager(module: torch.nn.Module, update: FlatAdam) -> Callable:
        def step(x: torch.Tensor) -> None:
            update.zero_grad()
            loss_of(module)(x)[0].backward()
            update.step()

        return step

    def graphed(module: torch.nn.Module, update: FlatAdam) -> Callable:
        first = next(iter(inputs()))
        return GraphedStep(loss_of(module), update, lambda: None, [first], FakeCapture())

    expected, skipped = run(eager)
    weights, skipped_too = run(graphed)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    assert skipped == skipped_too == [0, 1, 2]  # the last has stopped two steps before the end


def test_a_rehearsal_leaves_master_weights_moments_and_counts(tmp_path: Path) -> None:
    module, loss = build("umdf", "regression", tmp_path)
    update = FlatAdam(module.parameters(), torch.float32, 1.0, False)
    rows = torch.arange(2 * BATCH).view(2, BATCH)
    loss(rows, torch.tensor(0))[0].backward()
    update.step()
    before, weights = copy.deepcopy(update.state_dict()["state"]), copies(list(module.parameters()))
    GraphedStep(loss, update, lambda: None, [rows, torch.tensor(0)], FakeCapture())
    for name, value in update.state_dict()["state"].items():
        assert torch.equal(value, before[name]), name
    assert all(torch.equal(p, value) for p, value in zip(module.parameters(), weights, strict=True))
    assert isinstance(update.param_groups[0]["lr"], torch.Tensor)
    assert isinstance(update.state_dict()["param_groups"][0]["lr"], float)
