"""Runs with dropout: resumed, replayed, several seeds at once; and what has none."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_records import assert_same, parameters, records, without_timings

from fastmmkd.config import parse_config
from fastmmkd.data import store
from fastmmkd.engine import step, trainer
from fastmmkd.engine.profile import profile_steps
from fastmmkd.engine.teachers import identity
from fastmmkd.errors import Interrupted
from fastmmkd.nn.embedding import TemporalEmbedding
from tests.conftest import contained_process
from tests.engine.fake_capture import FakeCapture

Train = Callable[..., Path]
METHODS = ["umdf", "corrkd", "hrlf"]


@pytest.fixture(scope="module")
def raw_of(
    tiny_store: Path, tiny_config_of: Callable[[Path], dict], distilled_config_of: Callable[[str, Path], dict]
) -> Callable[[str], dict]:
    """`raw_of(method)`: a run of two epochs with dropout."""

    def make(method: str) -> dict:
        raw = tiny_config_of(tiny_store) if method == "umdf" else distilled_config_of(method, tiny_store)
        raw["model"]["dropout"] = 0.2
        raw["train"] |= {"select": "mae", "epochs": 2}
        raw["deepspeed"]["optimizer"]["params"]["eps"] = 2**-10  # else Adam blows up gradients that are mere rounding
        return raw

    return make


@pytest.fixture(scope="module")
def run_of(train_tiny: Train, raw_of: Callable[[str], dict], tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """`run_of(method)`: that run; shared, so do not change it."""
    made: dict[str, Path] = {}

    def make(method: str) -> Path:
        if method not in made:
            made[method] = train_tiny(raw_of(method), tmp_path_factory.mktemp("dropout") / method)
        return made[method]

    return make


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_run_continues_exactly(
    method: str, train_tiny: Train, raw_of: Callable[[str], dict], run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(Interrupted):
        train_tiny(raw_of(method), tmp_path / "run", stop_after=7)
    resumed = train_tiny(raw_of(method), tmp_path / "run", resume=True)
    for phase in ("",) if method == "umdf" else ("teacher", ""):
        assert_same(parameters(resumed, 1, phase), parameters(run_of(method), 1, phase))
        assert without_timings(records(resumed, 1, phase)) == without_timings(records(run_of(method), 1, phase))


@pytest.mark.parametrize("method", METHODS)
def test_dropout_changes_every_phase(
    method: str, train_tiny: Train, raw_of: Callable[[str], dict], run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    raw = raw_of(method)
    raw["model"]["dropout"] = 0.0
    plain = train_tiny(raw, tmp_path / "plain")
    for phase in ("",) if method == "umdf" else ("teacher", ""):
        assert not torch.equal(
            parameters(plain, 1, phase)["head.weight"], parameters(run_of(method), 1, phase)["head.weight"]
        )


@pytest.mark.parametrize("method", METHODS)
def test_seeds_at_once_are_those_of_separate_runs(
    method: str, train_tiny: Train, raw_of: Callable[[str], dict], run_of: Callable[[str], Path], tmp_path: Path
) -> None:
    raw = raw_of(method)
    raw["train"] |= {"seeds": [2, 1], "together": True}
    together = train_tiny(raw, tmp_path / "together")
    for phase in ("",) if method == "umdf" else ("teacher", ""):
        for a, b in zip(records(together, 1, phase), records(run_of(method), 1, phase), strict=True):
            assert a["train"] == pytest.approx(b["train"], rel=1e-5, abs=1e-7)
        ours, theirs = parameters(together, 1, phase), parameters(run_of(method), 1, phase)
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["fwdbwd", "step"])
def test_a_replayed_run_is_the_eager_one(
    mode: str, train_tiny: Train, raw_of: Callable[[str], dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every replay draws anew: rows and epoch are tensors of the graph."""
    raw = raw_of("umdf")
    raw["deepspeed"]["zero_optimization"] = {"stage": 0}
    raw["deepspeed"]["optimizer"]["params"] |= {"fused": True, "lr": 2**-8}
    expected = train_tiny(raw, tmp_path / "eager")
    made: list[FakeCapture] = []
    monkeypatch.setattr(step._Replayed, "capture", lambda *_: made.append(FakeCapture()) or made[-1])
    monkeypatch.setattr(trainer, "graph_mode", lambda *_: (mode, None))
    replayed = train_tiny(copy.deepcopy(raw), tmp_path / "replayed")
    assert [capture.replayed for capture in made] == [10 * made[0].captured]
    torch.testing.assert_close(parameters(replayed), parameters(expected))


def test_what_is_trained_has_keys_and_what_is_frozen_or_evaluated_has_none(
    train_tiny: Train, raw_of: Callable[[str], dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    embed, seen = TemporalEmbedding.forward, Counter()

    def recording(self, features, layouts, draw=None):
        frozen = not next(self.parameters()).requires_grad
        seen["frozen" if frozen else "training" if self.training else "evaluation", draw is not None] += 1
        return embed(self, features, layouts, draw)

    monkeypatch.setattr(TemporalEmbedding, "forward", recording)
    train_tiny(raw_of("corrkd"), tmp_path / "run")
    assert set(seen) == {("training", True), ("frozen", False), ("evaluation", False)}
    assert seen["training", True] == 2 * 10, "teacher and student"
    assert seen["frozen", False] == 1, "it is asked once"


@pytest.mark.parametrize("method", METHODS)
def test_a_profiled_step_has_it(method: str, raw_of: Callable[[str], dict], tmp_path: Path) -> None:
    calls = []
    for rate in (0.0, 0.2):
        raw = raw_of(method)
        raw["model"]["dropout"] = rate
        (tmp_path / str(rate)).mkdir()
        with contained_process():
            calls.append(profile_steps(parse_config(raw), 1, tmp_path / str(rate)).calls)
    assert calls[1] > calls[0]


def test_a_teacher_serves_students_of_any_dropout(raw_of: Callable[[str], dict]) -> None:
    raw = raw_of("hrlf")
    dataset, config = store.read(Path(raw["data"]["path"])), parse_config(raw)
    raw["model"]["dropout"] = 0.0
    assert identity(parse_config(raw), dataset) == identity(config, dataset)
    raw["model"]["encoder_layers"] = 2
    assert identity(parse_config(raw), dataset) != identity(config, dataset)
