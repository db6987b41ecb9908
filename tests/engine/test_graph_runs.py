"""Whole runs with replayed steps, by a stand-in for CUDA graphs: what eager steps give; and who gets which steps."""

import pytest
import torch
from run_records import parameters, records, without_timings

from fastmmkd.config import parse_config
from fastmmkd.engine import flat_adam, step, trainer
from fastmmkd.engine.device import Placement
from fastmmkd.engine.flat_adam import FlatAdam
from fastmmkd.engine.step import graph_mode
from tests.engine.fake_capture import FakeCapture

RATE = 2**-8
"""A captured rate is a float32 tensor; this one is the same in every precision."""


@pytest.fixture
def captures(monkeypatch) -> list[FakeCapture]:
    """Every capture that a run makes, with a stand-in for CUDA graphs."""
    made: list[FakeCapture] = []

    def make(*_) -> FakeCapture:
        made.append(FakeCapture())
        return made[-1]

    monkeypatch.setattr(step._Replayed, "capture", make)
    return made


@pytest.fixture
def raw_of(tiny_store, tiny_config_of, distilled_config_of):
    """`raw_of(method)`: one seed, or three at once that stop at different times."""

    def make(method: str, together: bool = False) -> dict:
        raw = tiny_config_of(tiny_store) if method == "umdf" else distilled_config_of(method, tiny_store)
        raw["train"] |= {"select": "mae", "epochs": 2}
        raw["deepspeed"] |= {"zero_optimization": {"stage": 0}, "gradient_clipping": 0.5}
        # Without eps Adam blows up gradients that are mere rounding.
        raw["deepspeed"]["optimizer"]["params"] |= {"fused": True, "lr": RATE, "eps": 2**-10}
        if together:
            raw["train"] |= {"seeds": [1, 2, 3], "together": True, "epochs": 6, "patience": 1}
            raw["deepspeed"]["optimizer"]["params"]["lr"] = 2**-7
        return raw

    return make


def assert_close(ours, expected, seeds, phases) -> None:
    for phase in phases:
        for seed in seeds:
            a, b = (without_timings(records(run, seed, phase)) for run in (ours, expected))
            assert [r["step"] for r in a] == [r["step"] for r in b]
            for x, y in zip(a, b, strict=True):
                for key in ("train", "valid"):
                    assert x[key] == pytest.approx(y[key], rel=1e-4, abs=1e-4)
                assert x["engine"]["lr"] == y["engine"]["lr"]
            torch.testing.assert_close(parameters(ours, seed, phase), parameters(expected, seed, phase))


@pytest.mark.parametrize("mode", ["fwdbwd", "step"])
@pytest.mark.parametrize("method", ["umdf", "corrkd", "hrlf"])
def test_a_replayed_run_is_the_eager_one(method, mode, raw_of, train_tiny, tmp_path, monkeypatch, captures) -> None:
    expected = train_tiny(raw_of(method), tmp_path / "eager")
    monkeypatch.setattr(trainer, "graph_mode", lambda *_: (mode, None))
    replayed = train_tiny(raw_of(method), tmp_path / "replayed")
    phases = ("",) if method == "umdf" else ("teacher", "")
    assert_close(replayed, expected, [1], phases)
    assert len(captures) == len(phases)
    assert all(capture.replayed == 10 * capture.captured for capture in captures)  # 2 epochs of 5 steps


@pytest.mark.parametrize("mode", ["fwdbwd", "step"])
def test_seeds_that_stop_at_different_times(mode, raw_of, train_tiny, tmp_path, monkeypatch, captures) -> None:
    expected = train_tiny(raw_of("umdf", together=True), tmp_path / "eager")
    monkeypatch.setattr(trainer, "graph_mode", lambda *_: (mode, None))
    replayed = train_tiny(raw_of("umdf", together=True), tmp_path / "replayed")
    assert_close(replayed, expected, [1, 2, 3], [""])
    ends = {len(records(expected, seed)) for seed in (1, 2, 3)}
    assert len(ends) > 1
    assert len(captures) == 1  # the update looks on the device for who has stopped


@pytest.mark.parametrize("mode", ["fwdbwd", "step"])
def test_a_replayed_run_goes_on_after_an_interruption(
    mode, raw_of, train_tiny, tmp_path, monkeypatch, captures
) -> None:
    monkeypatch.setattr(trainer, "graph_mode", lambda *_: (mode, None))
    expected = train_tiny(raw_of("umdf"), tmp_path / "whole")
    with pytest.raises(trainer.Interrupted):
        train_tiny(raw_of("umdf"), tmp_path / "parts", stop_after=7)
    resumed = train_tiny(raw_of("umdf"), tmp_path / "parts", resume=True)
    assert_close(resumed, expected, [1], [""])


@pytest.mark.parametrize("mode", ["fwdbwd", "step"])
def test_a_step_that_cannot_be_captured_is_eager_and_says_so(
    mode, raw_of, train_tiny, tmp_path, monkeypatch, captures, capsys
) -> None:
    expected = train_tiny(raw_of("umdf"), tmp_path / "eager")

    def refuse(self, run):
        raise RuntimeError("operation not permitted\nwhen the stream is capturing")

    monkeypatch.setattr(FakeCapture, "__call__", refuse)
    monkeypatch.setattr(trainer, "graph_mode", lambda *_: (mode, None))
    replayed = train_tiny(raw_of("umdf"), tmp_path / "replayed")
    assert_close(replayed, expected, [1], [""])
    said = "train.graph: the step cannot be captured (operation not permitted); steps are eager"
    assert capsys.readouterr().out.count(said) == 1


def test_a_step_of_another_optimiser_is_captured_anew_when_a_seed_stops(
    raw_of, train_tiny, tmp_path, monkeypatch, captures
) -> None:
    raw = raw_of("umdf", together=True)
    raw["deepspeed"]["optimizer"]["params"]["maximize"] = False  # a setting that the flat update does not know
    expected = train_tiny(raw, tmp_path / "eager")
    monkeypatch.setattr(trainer, "graph_mode", lambda *_: ("step", None))
    replayed = train_tiny(raw, tmp_path / "replayed")
    assert_close(replayed, expected, [1, 2, 3], [""])
    ends = {len(records(expected, seed)) for seed in (1, 2, 3)}
    assert len(captures) == len(ends) > 1


@pytest.mark.parametrize("mode", ["off", "fwdbwd", "step"])
def test_a_seed_whose_gradient_is_infinite_skips_that_step_alone(
    mode, raw_of, train_tiny, tmp_path, monkeypatch, captures, capsys
) -> None:
    raw = raw_of("umdf", together=True)
    raw["train"] |= {"epochs": 2, "patience": None}
    monkeypatch.setattr(trainer, "graph_mode", lambda *_: (mode, None))
    whole = train_tiny(raw, tmp_path / "whole")
    gather = FlatAdam._gather

    def poisoned(self) -> None:
        gather(self)
        self.gradient[1, 0] = torch.where(self.steps[0] == 3, torch.inf, self.gradient[1, 0])  # the fourth step

    monkeypatch.setattr(FlatAdam, "_gather", poisoned)
    assert "skipped" not in capsys.readouterr().out
    poisoned_run = train_tiny(raw, tmp_path / "poisoned")
    said = [line for line in capsys.readouterr().out.splitlines() if "skipped" in line]
    assert [line.split()[2] for line in said if line.endswith(" samples/s  1 step skipped")] == ["2", "2"]
    for seed, skipped in ((1, 0), (2, 1), (3, 0)):
        assert [r["engine"]["skipped_steps"] for r in records(poisoned_run, seed)] == [skipped, skipped]
        same = records(poisoned_run, seed)[-1]["train"] == pytest.approx(records(whole, seed)[-1]["train"], rel=1e-6)
        assert same == (not skipped)
    with pytest.raises(trainer.Interrupted):
        train_tiny(raw, tmp_path / "parts", stop_after=7)
    train_tiny(raw, tmp_path / "parts", resume=True)
    for seed in (1, 2, 3):
        a, b = (without_timings(records(tmp_path / name, seed)) for name in ("parts", "poisoned"))
        assert a == b


@pytest.mark.parametrize(
    ("wanted", "device", "precision", "stage", "expected", "why"),
    [
        ("auto", "cpu", "fp32", 0, "off", None),
        ("off", "cuda", "fp32", 0, "off", None),
        ("step", "cpu", "fp32", 0, "off", "train.graph: step, but a CPU has no graphs; steps are eager"),
        ("auto", "cuda", "fp32", 0, "step", None),
        ("auto", "cuda", "bf16", 1, "step", None),
        ("auto", "cuda", "bf16", 2, "fwdbwd", None),
        ("auto", "cuda", "fp16", 1, "fwdbwd", None),
        ("fwdbwd", "cuda", "fp16", 1, "fwdbwd", None),
        ("fwdbwd", "cuda", "bf16", 1, "fwdbwd", None),
        ("step", "cuda", "fp32", 1, "step", None),
        ("step", "cuda", "bf16", 0, "step", None),
        ("step", "cuda", "bf16", 2, "fwdbwd", "train.graph: step needs torch's Adam in fp32 or bf16, ZeRO stage 0,"),
        ("step", "cuda", "fp16", 1, "fwdbwd", "the run has fp16 and stage 1 in 1 process; the update is not captured"),
    ],
)
def test_who_gets_which_steps(wanted, device, precision, stage, expected, why, tiny_config) -> None:
    tiny_config["train"]["graph"] = wanted
    block = tiny_config["deepspeed"] | {"zero_optimization": {"stage": stage}}
    if precision != "fp32":
        block[precision] = {"enabled": True}
    placement = Placement(torch.device(device), precision, block, None)
    mode, line = graph_mode(parse_config(tiny_config), placement)
    assert mode == expected
    assert (line is None) == (why is None)
    assert (why or "") in (line or "")


@pytest.mark.parametrize(
    ("changed", "wanted", "expected"),
    [
        ({"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}, "auto", "fwdbwd"),
        ({"optimizer": {"type": "SGD", "params": {"lr": 0.1}}}, "step", "step"),
        ({"scheduler": {"type": "OneCycle", "params": {}}}, "auto", "fwdbwd"),
        ({"scheduler": {"type": "OneCycle", "params": {}}}, "step", "fwdbwd"),
        ({"scheduler": {"type": "WarmupLR", "params": {}}}, "auto", "step"),
    ],
)
def test_optimisers_and_schedules(changed, wanted, expected, tiny_config) -> None:
    tiny_config["train"]["graph"] = wanted
    placement = Placement(torch.device("cuda"), "fp32", tiny_config["deepspeed"] | changed, None)
    mode, line = graph_mode(parse_config(tiny_config), placement)
    assert mode == expected
    assert (line is None) == (wanted in ("auto", mode))


@pytest.mark.parametrize(("stage", "expected"), [(0, "step"), (1, "fwdbwd"), (2, "fwdbwd")])
def test_several_processes(stage, expected, tiny_config, monkeypatch) -> None:
    monkeypatch.setattr(step, "world_size", lambda: 2)
    monkeypatch.setattr(flat_adam, "world_size", lambda: 2)
    block = tiny_config["deepspeed"] | {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    placement = Placement(torch.device("cuda"), "bf16", block, None)
    assert graph_mode(parse_config(tiny_config), placement) == (expected, None)
    tiny_config["train"]["graph"] = "step"
    mode, line = graph_mode(parse_config(tiny_config), placement)
    assert mode == expected
    assert (line is None) == (mode == "step")
