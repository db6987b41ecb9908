"""Small methods that use what the three do not: a bank, parameter groups, a phase before, an order, what is alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from run_records import assert_same_phase, engine_state, parameters, records
from torch import nn

import fastmmkd
from fastmmkd.blocks import Block, Config, ModelBlock
from fastmmkd.data.batches import Batch, Inputs, ResidentSplit, View
from fastmmkd.engine import step, trainer
from fastmmkd.errors import Interrupted, UserError
from fastmmkd.methods import METHODS
from fastmmkd.methods.method import FeatureDims, Method, Network, PhaseSpec
from fastmmkd.methods.objective import Losses
from fastmmkd.nn.grouped import GroupedLinear
from fastmmkd.nn.models import Alone, Bank
from fastmmkd.ops.layout import pack, take, unpack
from fastmmkd.ops.precision import accumulation
from tests.engine.fake_capture import FakeCapture

Train = Callable[..., Path]
SAMPLES = 40


class Small(Network):
    """Reads the last frame of each modality."""

    def __init__(self, config: Config, dims: FeatureDims) -> None:
        super().__init__()
        self.task = config.task
        self.embed = nn.ModuleList(GroupedLinear((1,), d, config.model.width) for d in dims)
        self.head = GroupedLinear((1,), config.model.width, 1)

    def represent(self, inputs: Inputs) -> torch.Tensor:
        """`[S, B, d]`."""
        of_modalities = zip(self.embed, inputs.features, inputs.layouts, strict=True)
        return sum(layer(take(x, layout.last)) for layer, x, layout in of_modalities)

    def losses(self, batch: Batch) -> Losses:
        joint = self.represent(batch.inputs)
        task = self.task.loss(self.head(joint), batch.targets)
        return Losses(task, {"task": task}, joint)

    def predict(self, inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
        joint = self.represent(inputs)
        return self.head(joint), joint


class WithBank(Small):
    """Remembers every sample's last error, and is drawn to what it remembers."""

    def __init__(self, config: Config, dims: FeatureDims) -> None:
        super().__init__(config, dims)
        self.bank = Bank((SAMPLES,))
        self.seen = Bank((SAMPLES,), torch.int64)

    def prepare(self, split: ResidentSplit) -> None:
        self.bank.values.fill_(1.0)
        assert split.size == SAMPLES

    def losses(self, batch: Batch) -> Losses:
        total, parts, joint = super().losses(batch)
        remembered = self.bank.values.gather(1, batch.rows)
        drawn = (accumulation(self.head(joint)).squeeze(-1) - remembered).square().mean(-1)
        self.last = accumulation(self.head(joint)).squeeze(-1).detach()
        return Losses(total + 0.1 * drawn, parts | {"drawn": drawn}, joint)

    def after_step(self, batch: Batch) -> None:
        self.bank.values.scatter_(1, batch.rows, self.last)
        self.seen.values.scatter_add_(1, batch.rows, torch.ones_like(batch.rows))


class WithGroups(Small):
    """The head learns ten times as fast."""

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [{"params": list(self.embed.parameters())}, {"params": list(self.head.parameters()), "lr": 0.03}]


class InOrder(Small):
    """Takes samples as they come, and counts epochs."""

    def __init__(self, config: Config, dims: FeatureDims) -> None:
        super().__init__(config, dims)
        self.taken: list[int] = []
        self.epochs: list[int] = []

    def order(self, rows: torch.Tensor, seed: int, epoch: int) -> torch.Tensor:
        return rows.roll(epoch)

    def after_step(self, batch: Batch) -> None:
        self.taken += batch.rows.flatten().tolist()

    def end_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


class Recurrent(Small):
    """A network that is one model: an nn.GRU knows no others."""

    def __init__(self, config: Config, dims: FeatureDims) -> None:
        super().__init__(config, dims)
        self.gru = Alone(nn.GRU(config.model.width, config.model.width, batch_first=True))

    def represent(self, inputs: Inputs) -> torch.Tensor:
        rows, layout = sum(layer(x) for layer, x in zip(self.embed, inputs.features, strict=True)), inputs.layouts[0]
        states, _ = self.gru(unpack(rows, layout)[0])
        return take(pack(states[None], layout), layout.last)


class Pretrained(Small):
    """Starts from the embedding that an earlier phase has learnt, and keeps near to what that predicts."""

    def __init__(self, config: Config, dims: FeatureDims, earlier: Small) -> None:
        super().__init__(config, dims)
        self.frozen = (earlier,)
        if earlier.head.weight.shape[0] == 1:  # one model is built at a time
            self.embed.load_state_dict(earlier.embed.state_dict())

    def teach(self, complete: Inputs) -> torch.Tensor:
        return self.frozen[0].predict(complete)[0]

    def losses(self, batch: Batch) -> Losses:
        total, parts, joint = super().losses(batch)
        near = (accumulation(self.head(joint)) - accumulation(batch.taught)).square().mean((1, 2))
        return Losses(total + near, parts | {"near": near}, joint)


class SmallConfig(Config):
    method: Literal["small"]
    model: ModelBlock = ModelBlock()
    teacher: None = None
    loss: Block = Block()


def method_of(network: type[Small], phases: tuple[PhaseSpec, ...] = (), grouped: bool = True) -> Method:
    alone = PhaseSpec("network", lambda config, dims, earlier: network(config, dims), (View.MISSING,))
    make = (lambda config, dims: Small(config, dims)) if network is Pretrained else network
    return Method("small", "Small", "2026-01", SmallConfig, make, phases or (alone,), grouped=grouped)


@pytest.fixture
def raw(tiny_config: dict) -> dict:
    train = tiny_config["train"] | {"epochs": 2, "select": "mae"}
    return tiny_config | {"method": "small", "model": {"width": 8}, "train": train}


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`use(network, ...)`: the method "small" is that of the network."""
    return lambda *arguments, **settings: monkeypatch.setitem(METHODS, "small", method_of(*arguments, **settings))


def built(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What runs train from now on."""
    modules: list[Any] = []
    initialize = trainer.Trainer._initialize

    def noting(self: Any, module: Any) -> Any:
        modules.append(module)
        return initialize(self, module)

    monkeypatch.setattr(trainer.Trainer, "_initialize", noting)
    return modules


@pytest.mark.parametrize("mode", ["off", "fwdbwd", "step"])
def test_a_bank_is_filled_resumed_replayed_and_not_exported(
    mode: str, use: Any, raw: dict, train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(WithBank)
    expected = train_tiny(raw, tmp_path / "expected")
    monkeypatch.setattr(step._Replayed, "capture", FakeCapture)
    monkeypatch.setattr(trainer, "graph_mode", lambda *_: (mode, None))
    with pytest.raises(Interrupted):
        train_tiny(raw, tmp_path / "run", stop_after=7)
    resumed = train_tiny(raw, tmp_path / "run", resume=True)
    if mode == "off":
        assert_same_phase(resumed, expected)
    for name, value in parameters(resumed).items():
        torch.testing.assert_close(value, parameters(expected)[name], rtol=1e-4, atol=1e-5)
    assert not any("bank" in name or "seen" in name for name in parameters(resumed))
    assert fastmmkd.load(resumed).module.bank.values.shape == (1, SAMPLES)
    states = [next(s["module"] for s in engine_state(run).values() if "module" in s) for run in (resumed, expected)]
    for name in ("bank.values", "seen.values"):
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-4, atol=1e-5)
    assert states[0]["seen.values"].sum() == 2 * SAMPLES
    assert records(resumed)[-1]["train"].keys() == {"loss", "task", "drawn"}


def test_banks_of_several_models(use: Any, raw: dict, train_tiny: Train, tmp_path: Path) -> None:
    use(WithBank)
    raw["train"] |= {"seeds": [1, 2], "together": True}
    together = train_tiny(raw, tmp_path / "together")
    for seed in (1, 2):
        alone = raw | {"train": raw["train"] | {"seeds": [seed], "together": False}}
        expected = train_tiny(alone, tmp_path / f"alone_{seed}")
        for name, value in parameters(together, seed).items():
            torch.testing.assert_close(value, parameters(expected, seed)[name], rtol=1e-4, atol=1e-5)


def test_groups_of_parameters_have_rates_of_their_own(
    use: Any, raw: dict, train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(WithGroups)
    engines = []
    wrap = trainer.wrap
    monkeypatch.setattr(trainer, "wrap", lambda *args: engines.append(wrap(*args)) or engines[-1])
    train_tiny(raw, tmp_path / "run")
    assert [group["lr"] for group in engines[0].optimizer.param_groups] == [0.003, 0.03]


def test_an_order_and_the_end_of_epochs_are_the_methods_own(
    use: Any, raw: dict, train_tiny: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(InOrder)
    modules = built(monkeypatch)
    train_tiny(raw, tmp_path / "run")
    assert modules[0].taken == [*range(SAMPLES), *torch.arange(SAMPLES).roll(1).tolist()]
    assert modules[0].epochs == [0, 1]


def test_what_is_alone_trains_resumes_and_predicts(use: Any, raw: dict, train_tiny: Train, tmp_path: Path) -> None:
    use(Recurrent, grouped=False)
    expected = train_tiny(raw, tmp_path / "expected")
    with pytest.raises(Interrupted):
        train_tiny(raw, tmp_path / "run", stop_after=7)
    resumed = train_tiny(raw, tmp_path / "run", resume=True)
    assert_same_phase(resumed, expected)
    assert parameters(resumed)["gru.module.weight_hh_l0"].shape == (24, 8)
    assert fastmmkd.load(resumed).module.gru.module.weight_hh_l0.shape == (24, 8)
    assert records(resumed)[-1]["train"]["loss"] < records(resumed)[0]["train"]["loss"]


def test_what_is_alone_is_not_trained_together(use: Any, raw: dict, train_tiny: Train, tmp_path: Path) -> None:
    use(Recurrent, grouped=False)
    raw["train"] |= {"seeds": [1, 2], "together": True}
    with pytest.raises(UserError, match=r"train\.together: Small trains one seed at a time; expected false"):
        train_tiny(raw, tmp_path / "run")


def test_three_phases_each_built_with_those_before(use: Any, raw: dict, train_tiny: Train, tmp_path: Path) -> None:
    def small(config: Config, dims: FeatureDims, earlier: Any) -> Small:
        return Small(config, dims)

    phases = (
        PhaseSpec("pretraining", small, (View.COMPLETE,), epochs=lambda config: 1, seed_offset=7),
        PhaseSpec("middle", lambda c, d, e: Pretrained(c, d, e["pretraining"]), (View.MISSING, View.COMPLETE)),
        PhaseSpec("student", lambda c, d, e: Pretrained(c, d, e["middle"]), (View.MISSING, View.COMPLETE)),
    )
    use(Pretrained, phases)
    raw["deepspeed"]["optimizer"]["params"]["lr"] = 0.05  # no phase may end at the floor
    expected = train_tiny(raw, tmp_path / "expected")
    folder = expected / "seed_1"
    assert (folder / "pretraining" / "pretraining.json").exists()
    assert (folder / "middle" / "middle.json").exists()
    assert len(records(expected, 1, "pretraining")) == 1
    for stop_after in (3, 8, 17):  # within each
        with pytest.raises(Interrupted):
            train_tiny(raw, tmp_path / f"run_{stop_after}", stop_after=stop_after)
        resumed = train_tiny(raw, tmp_path / f"run_{stop_after}", resume=True)
        for phase in ("pretraining", "middle", ""):
            assert_same_phase(resumed, expected, 1, phase)
    reused = train_tiny(raw, tmp_path / "reused", teacher=expected)
    assert not (reused / "seed_1" / "middle" / "metrics.jsonl").exists()
    assert_same_phase(reused, expected)


def test_a_phase_at_the_floor_is_built_on_where_it_says_so(
    use: Any, raw: dict, train_tiny: Train, tmp_path: Path
) -> None:
    """A method without a `teacher` block has no key that accepts it, and is not told of one."""
    pretraining = PhaseSpec("pretraining", lambda c, d, e: Small(c, d), (View.COMPLETE,), epochs=lambda config: 1)
    student = PhaseSpec("student", lambda c, d, e: Pretrained(c, d, e["pretraining"]), (View.MISSING, View.COMPLETE))
    raw["deepspeed"]["optimizer"]["params"]["lr"] = 1e-9
    use(Pretrained, (pretraining, student))
    with pytest.raises(UserError, match=r"not trained from this pretraining: .*learning rate, or --teacher\)$"):
        train_tiny(raw, tmp_path / "run")
    use(Pretrained, (replace(pretraining, accept_floor=lambda config: True), student))
    train_tiny(raw, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "seed_1" / "evaluation.json").exists()
