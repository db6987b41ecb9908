"""Where a run computes: the fallbacks of precision, and what is done about the noise of others."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from fastmmkd.config import parse_config
from fastmmkd.engine.device import (
    Placement,
    output_to,
    place,
    prepare_process,
    refuse_absent,
    start_deepspeed,
    warnings_to,
    wrap,
)
from fastmmkd.engine.interruption import InterruptionWatch
from fastmmkd.errors import UserError
from fastmmkd.methods.method import Trainable

FP16 = {"fp16": {"enabled": True, "initial_scale_power": 8}, "zero_optimization": {"stage": 1}}
BF16 = {"bf16": {"enabled": True}}
V100, A100 = (7, 0), (8, 0)


@pytest.fixture
def placed(tiny_config: dict, monkeypatch: pytest.MonkeyPatch) -> Any:
    """`placed(deepspeed keys, capability=None for no GPU, device="auto")` -> Placement."""

    def run(block: dict, capability: tuple[int, int] | None = None, device: str = "auto") -> Placement:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
        monkeypatch.setenv("LOCAL_RANK", "1")
        tiny_config["deepspeed"] |= block
        tiny_config["train"]["device"] = device
        return place(parse_config(tiny_config))

    return run


class TestPlacement:
    def test_fp16_is_kept_on_a_v100(self, placed: Any) -> None:
        placement = placed(FP16, V100)
        assert placement.device == torch.device("cuda:1")
        assert (placement.precision, placement.dtype) == ("fp16", torch.float16)
        assert placement.deepspeed["fp16"] == FP16["fp16"]
        assert placement.note is None

    def test_fp16_becomes_bf16_where_that_is_better(self, placed: Any) -> None:
        placement = placed(FP16, A100)
        assert (placement.precision, placement.dtype) == ("bf16", torch.bfloat16)
        assert "fp16" not in placement.deepspeed
        assert placement.deepspeed["bf16"] == {"enabled": True}
        assert placement.note == "deepspeed.fp16: a GPU has bf16, which needs no loss scale"

    @pytest.mark.parametrize(("capability", "device"), [(None, "auto"), (None, "cpu"), (V100, "cpu"), (A100, "cpu")])
    def test_fp16_becomes_fp32_without_a_gpu(self, placed: Any, capability: Any, device: str) -> None:
        placement = placed(FP16, capability, device)
        assert (placement.device, placement.precision) == (torch.device("cpu"), "fp32")
        assert not {"fp16", "bf16"} & set(placement.deepspeed)
        assert placement.note == "deepspeed.fp16 needs a GPU: training in fp32 on the CPU"

    @pytest.mark.parametrize(("stage", "on_the_cpu"), [(1, 0), (2, 2)])
    def test_the_stage_that_only_fp16_needs_goes_with_it(self, placed: Any, stage: int, on_the_cpu: int) -> None:
        block = FP16 | {"zero_optimization": {"stage": stage}}
        assert placed(block).deepspeed["zero_optimization"]["stage"] == on_the_cpu
        assert placed(block, V100).deepspeed["zero_optimization"]["stage"] == stage

    def test_deepspeed_is_not_told_of_what_is_null(self, placed: Any) -> None:
        nulls = dict.fromkeys(("scheduler", "fp16", "bf16", "zero_optimization", "gradient_clipping"))
        placement = placed(nulls, V100)
        assert placement.precision == "fp32"
        assert not {"scheduler", "fp16", "bf16", "zero_optimization"} & set(placement.deepspeed)
        assert placement.deepspeed["gradient_clipping"] == 0.0, "left out, it would be DeepSpeed's 1"

    @pytest.mark.parametrize("stage", [0, 2])
    def test_bf16_becomes_fp16_on_a_v100_with_a_stage_that_scales(self, placed: Any, stage: int) -> None:
        placement = placed(BF16 | {"zero_optimization": {"stage": stage}}, V100)
        assert placement.precision == "fp16"
        assert "bf16" not in placement.deepspeed
        assert placement.deepspeed["zero_optimization"]["stage"] == max(1, stage)
        assert placement.note == "deepspeed.bf16: a GPU has none; training in fp16"

    @pytest.mark.parametrize(("block", "capability"), [(BF16, None), (BF16, A100), ({}, V100), ({}, None)])
    def test_nothing_else_changes(self, placed: Any, block: dict, capability: tuple[int, int] | None) -> None:
        placement = placed(block, capability)
        assert placement.note is None
        assert placement.precision == ("bf16" if block else "fp32")

    def test_the_cpu_may_be_asked_for(self, placed: Any) -> None:
        placement = placed(BF16, V100, device="cpu")
        assert (placement.device, placement.precision) == (torch.device("cpu"), "bf16")

    def test_a_gpu_that_is_not_there(self, placed: Any) -> None:
        with pytest.raises(UserError, match="torch sees no CUDA device"):
            placed({}, device="cuda")

    def test_the_config_itself_stays_as_it_is(self, tiny_config: dict, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        tiny_config["deepspeed"] |= FP16
        config = parse_config(tiny_config)
        before = config.model_dump()
        assert place(config).deepspeed["train_batch_size"] == 8
        assert config.model_dump() == before


class TestNoise:
    def test_output_of_python_and_of_native_code_goes_to_the_file(
        self, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        path = tmp_path / "folder" / "log"
        print("before")
        with output_to(path):
            os.write(1, b"native\n")
            os.write(2, b"native error\n")
        print("after")
        assert path.read_text() == "native\nnative error\n"
        assert capfd.readouterr() == ("before\nafter\n", "")

    def test_output_returns_after_an_error(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(ValueError, match="x"), output_to(tmp_path / "log"):
            raise ValueError("x")
        print("after", file=sys.stderr)
        assert capfd.readouterr() == ("", "after\n")

    def test_a_warning_is_written_once(self, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
        path = tmp_path / "log"
        with warnings_to(path):
            for _ in range(3):
                with warnings.catch_warnings():  # as torch does; it makes Python forget what it has shown
                    warnings.simplefilter("always")
                    warnings.warn("deprecated by someone", FutureWarning, stacklevel=1)
        assert path.read_text().count("FutureWarning: deprecated by someone") == 1
        assert not recwarn.list


class TestInterruptionWatch:
    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_a_signal_is_remembered(self, number: int) -> None:
        before = signal.getsignal(number)
        with InterruptionWatch() as watch:
            assert not watch.agreed(torch.device("cpu"), at_agreement=True)
            signal.raise_signal(number)
            assert watch.requested
            assert watch.agreed(torch.device("cpu"), at_agreement=False)
        assert signal.getsignal(number) is before

    def test_a_second_ctrl_c_stops_at_once(self) -> None:
        with InterruptionWatch():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)  # the launcher sends it after Ctrl-C
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    def test_one_within_another_hears_and_tells(self) -> None:
        """What comes while a run is evaluated stops those after it; what came before a run, that run."""
        with InterruptionWatch() as outer:
            with InterruptionWatch() as inner:
                signal.raise_signal(signal.SIGTERM)
            assert inner.requested
            assert outer.requested
            with InterruptionWatch() as next_one:
                assert next_one.requested


class Layer(torch.nn.Linear, Trainable):
    """Every output is a model of its own, with a row of the weights and a bias."""


@pytest.fixture
def engine_of(tiny_config: dict, tmp_path: Path, process_state: None) -> Any:
    """`engine_of(block)`: DeepSpeed's engine on the CPU around a layer; the block's keys in place of the config's."""
    config = parse_config(tiny_config)
    prepare_process(config)
    placement, log_file = place(config), tmp_path / "deepspeed.log"
    deepspeed = start_deepspeed(placement, log_file)

    def make(block: dict) -> Any:
        torch.manual_seed(0)
        return wrap(deepspeed, Layer(4, 3), placement.deepspeed | block, log_file)

    return make


def trained(engine: Any) -> torch.Tensor:
    for x in torch.linspace(-2, 2, 48).view(4, 3, 4):
        engine.backward(engine(x.to(engine.module.weight.dtype)).square().sum())
        engine.step()
    weight = engine.module.weight.detach().clone()
    engine.destroy()
    return weight


def test_one_process_reduces_nothing_and_that_changes_no_bit(engine_of: Any) -> None:
    weights = []
    for reduces in (False, True):
        engine = engine_of({"optimizer": {"type": "SGD", "params": {"lr": 0.1}}})
        assert not engine.enable_backward_allreduce
        engine.enable_backward_allreduce = reduces
        weights.append(trained(engine))
    assert torch.equal(*weights)


@pytest.mark.parametrize("stage", [0, 2])
def test_deepspeed_does_not_wait_for_the_device_to_count_samples(
    stage: int, engine_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from deepspeed.accelerator import get_accelerator

    waits: list[str] = []
    wait = lambda *_: waits.append(sys._getframe(1).f_code.co_filename)  # noqa: E731
    monkeypatch.setattr(type(get_accelerator()), "synchronize", wait)
    trained(engine_of({"zero_optimization": {"stage": stage}}))
    assert not [file for file in waits if file.endswith("timer.py")]
    trained(engine_of({"zero_optimization": {"stage": stage}, "timers": {"throughput": {"enabled": True}}}))
    assert len([file for file in waits if file.endswith("timer.py")]) == 4  # twice in each step from the third on


def test_zero_finds_infinities_by_the_norm_alone(engine_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed's own search, gradient by gradient, is left out; a step is skipped all the same."""
    outcomes = {}
    for searches in (False, True):
        engine = engine_of({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}})
        if searches:
            del engine.optimizer.check_overflow
        for i, x in enumerate(torch.linspace(-2, 2, 48).view(4, 3, 4).bfloat16()):
            scale = torch.inf if i == 1 else 1.0
            engine.backward((engine(x).square() * scale).sum())
            engine.step()
        outcomes[searches] = engine.module.weight.detach().clone(), engine.skipped_steps
        engine.destroy()
    assert torch.equal(outcomes[False][0], outcomes[True][0])
    assert torch.isfinite(outcomes[False][0]).all()
    assert outcomes[False][1] == outcomes[True][1] == 1


def test_every_group_waits_as_long_as_the_config_says(engine_of: Any) -> None:
    """Those that DeepSpeed makes too, which torch would let wait for half an hour."""
    engine_of({"zero_optimization": {"stage": 2}}).destroy()
    groups = torch.distributed.distributed_c10d._world.pg_map
    assert len(groups) >= 2
    for group in groups:
        assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(seconds=600)


def test_more_processes_than_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    refuse_absent(torch.device("cuda", 1))
    refuse_absent(torch.device("cpu"))
    with pytest.raises(UserError, match=r"^LOCAL_RANK: 2, but torch sees 2 CUDA devices; expected a process for each$"):
        refuse_absent(torch.device("cuda", 2))
