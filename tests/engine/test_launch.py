"""Real launches: the deepspeed launcher and plain python, signals, and what a user sees of them."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from run_records import (
    assert_same,
    assert_same_phase,
    assert_same_run,
    parameters,
    progress,
    records,
    without_timings,
)

from fastmmkd.cli import train_main
from fastmmkd.engine import session
from fastmmkd.errors import UserError
from fastmmkd.methods import METHODS
from tests.handmade import small_config_of

ROOT = Path(__file__).parents[2]
PATIENCE_S = 180
SAVED = "interrupted; everything is saved, continue with --resume"
# SGD keeps rounding errors small where Adam would blow up those of gradients near zero.
PLAIN_STEPS = {
    "optimizer": {"type": "SGD", "params": {"lr": 0.02}},
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
}


class Launch:
    """`train.py` in processes of its own; `processes` = 0 is plain python, else the deepspeed launcher."""

    def __init__(self, processes: int, *arguments: str | Path) -> None:
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
        environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
        bin_directory = Path(sys.executable).parent
        environment["PATH"] = f"{bin_directory}{os.pathsep}{environment['PATH']}"
        launcher: list[str | Path] = [sys.executable]
        if processes:
            launcher = [bin_directory / "deepspeed", "-q", "--master_port", str(free_port())]
            launcher += ["--num_gpus", str(processes)]
        self.process = subprocess.Popen(
            [*launcher, ROOT / "train.py", *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a process group that Ctrl-C can be sent to
        )
        self.stdout = self.stderr = ""

    def wait(self) -> int:
        try:
            self.stdout, self.stderr = self.process.communicate(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            raise
        return self.process.returncode

    def finish(self) -> Launch:
        """Wait for a run that must succeed."""
        assert self.wait() == 0, self.stderr
        return self

    def interrupt(self, number: int, run: Path, phase: str = "") -> int:
        """Send a signal to all of its processes, as a terminal does, once a phase's first epoch is over."""
        metrics, deadline = run / "seed_1" / phase / "metrics.jsonl", time.monotonic() + PATIENCE_S
        while not (metrics.exists() and metrics.stat().st_size):
            assert self.process.poll() is None, "it ended before it could be interrupted"
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(self.process.pid, number)
        return self.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def written(folder: Path, raw: dict[str, Any], **train: Any) -> Path:
    raw = raw | {"train": raw["train"] | train}
    path = folder / "tiny.json"
    path.write_text(json.dumps(raw))
    return path


@pytest.fixture
def long_config(tiny_config: dict, tmp_path: Path) -> Path:
    """Long enough to be interrupted after the first epoch."""
    return written(tmp_path, tiny_config, epochs=40)


def assert_quiet(launch: Launch, run: Path) -> None:
    """Nothing but our own lines reaches the user; DeepSpeed's are in its log."""
    assert launch.stderr == ""
    names = "|".join(METHODS)
    ours = re.compile(
        r"\w+ on tiny test data \(regression\), (fp32|bf16) on cpu, \d process(es)?, seeds 1 -> .*"
        rf"|({names}) seed 1( [a-z]+)? epoch \d+/\d+(  [a-z_]+ -?[\d.]+)+  valid (f1_non0|mae|loss) [\d.]+( \*)?"
        r"  [\d,]+ samples/s"
        rf"|({names}) seed 1 [a-z]+: what it learns from was asked once \(40 samples, [\d.]+ MB\)"
        r"|AT THE FLOOR: \w+ seed 1( [a-z]+)? has learnt nothing: .*"
        r"|seed 1: (evaluating the epoch \d+ model|finished before|its teacher is finished|takes the teacher of .*)"
        r"| *F1 non0 \(%\) on tiny test data, regression *"
        rf"| *(run|{names}|floor|─+)[ \d{{}}.,lavAvg]*"
        rf"|  {re.escape(str(run))}/\w+\.\w+"
        r"| *"
    )
    assert [line for line in launch.stdout.splitlines() if not ours.fullmatch(line)] == []
    log = (run / "deepspeed.log").read_text()
    assert "Initializing TorchBackend in DeepSpeed with backend gloo" in log
    assert "Saving model checkpoint" in log


@pytest.fixture(scope="module")
def raw_of_two(tiny_store: Path, tiny_config_of: Callable[[Path], dict]) -> dict:
    raw = tiny_config_of(tiny_store)
    raw["train"] |= {"epochs": 12, "select": "mae"}
    raw["loss"] = {"lambda_fea": 3.0}
    raw["deepspeed"] |= PLAIN_STEPS
    return raw


@pytest.fixture(scope="module")
def run_of_two(raw_of_two: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of two processes, in fp32 under ZeRO 2."""
    folder = tmp_path_factory.mktemp("two")
    launch = Launch(2, "--config", written(folder, raw_of_two), "--out", folder / "whole").finish()
    assert_quiet(launch, folder / "whole")
    assert (folder / "whole" / "results.json").exists()
    return folder / "whole"


def test_two_processes_take_the_steps_that_one_takes(
    raw_of_two: dict, run_of_two: Path, train_tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Half a batch each: the same losses and gradients, those of the MMD over the whole batch among them."""
    assert_close(run_of_two, train_tiny(raw_of_two, tmp_path / "one"))


def assert_close(two: Path, one: Path, phase: str = "", seed: int = 1) -> None:
    """A run of two processes took the steps of one process, up to rounding in fp32."""
    assert json.loads((two / "run.json").read_text())["world_size"] == 2
    for a, b in zip(records(one, seed, phase), records(two, seed, phase), strict=True):
        assert b["train"] == pytest.approx(a["train"], rel=1e-5)
        assert b["valid"] == pytest.approx(a["valid"], rel=1e-4)
    weights = parameters(two, seed, phase)
    for name, expected in parameters(one, seed, phase).items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("method", ["corrkd", pytest.param("hrlf", marks=pytest.mark.slow)])
def test_two_processes_train_the_teacher_and_the_student_that_one_trains(
    distilled_config_of: Callable[[str, Path], dict],
    tiny_store: Path,
    train_tiny: Callable[..., Path],
    tmp_path: Path,
    method: str,
) -> None:
    raw = distilled_config_of(method, tiny_store)
    raw["deepspeed"] |= PLAIN_STEPS
    two = tmp_path / "two"
    assert_quiet(Launch(2, "--config", written(tmp_path, raw), "--out", two).finish(), two)
    one = train_tiny(raw, tmp_path / "one")
    assert_close(two, one, "teacher")
    assert_close(two, one)


@pytest.mark.parametrize("stage", [0, 2])
def test_one_process_goes_on_where_two_ended(
    tiny_config: dict, train_tiny: Callable[..., Path], tmp_path: Path, stage: int
) -> None:
    """Where each of them holds the whole state; else it says how to go on."""
    tiny_config["train"] |= {"epochs": 2, "select": "mae"}
    tiny_config["deepspeed"] |= PLAIN_STEPS | {"zero_optimization": {"stage": stage}}
    run = tmp_path / "run"
    Launch(2, "--config", written(tmp_path, tiny_config), "--output", run).finish()
    tiny_config["train"]["epochs"] = 4
    if stage:
        with pytest.raises(UserError) as caught:
            train_tiny(tiny_config, run, resume=True)
        assert str(caught.value) == (
            f"{run / 'seed_1' / 'checkpoints'}: ZeRO 1 and 2 divide the optimiser among processes: 2 wrote this, not "
            "1; resume with deepspeed --num_gpus 2 train.py --config ... --resume"
        )
    else:
        assert_close(train_tiny(tiny_config, run, resume=True), train_tiny(tiny_config, tmp_path / "one"))
        assert progress(run)["world_size"] == 1


def test_two_processes_train_several_seeds_at_once(
    distilled_config_of: Callable[[str, Path], dict],
    tiny_store: Path,
    train_tiny: Callable[..., Path],
    tmp_path: Path,
) -> None:
    raw = distilled_config_of("corrkd", tiny_store)
    raw["train"]["seeds"] = [1, 2]
    raw["deepspeed"] |= PLAIN_STEPS
    two = tmp_path / "two"
    Launch(2, "--config", written(tmp_path, raw), "--out", two, "--together").finish()
    one = train_tiny(raw, tmp_path / "one")
    for seed in (1, 2):
        assert_close(two, one, "teacher", seed)
        assert_close(two, one, seed=seed)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["corrkd", "hrlf"])
@pytest.mark.parametrize("phase", ["teacher", ""], ids=["teacher", "student"])
def test_ctrl_c_in_either_phase_and_reused_teachers_lead_to_the_same_run(
    distilled_config_of: Callable[[str, Path], dict], tiny_store: Path, tmp_path: Path, method: str, phase: str
) -> None:
    raw = distilled_config_of(method, tiny_store)
    raw["teacher"]["epochs"] = 12
    config, whole, parts, reused = written(tmp_path, raw, epochs=12), *(tmp_path / name for name in "wpr")
    Launch(2, "--config", config, "--out", whole).finish()
    interrupted = Launch(2, "--config", config, "--out", parts)
    interrupted.interrupt(signal.SIGINT, parts, phase)
    assert interrupted.stderr.splitlines().count(SAVED) == 1
    assert not progress(parts, phase=phase)["finished"]
    Launch(2, "--config", config, "--out", parts, "--resume").finish()
    assert_same_phase(parts, whole, phase="teacher")
    assert_same_run(parts, whole)
    assert_quiet(Launch(2, "--config", config, "--out", reused, "--teacher", whole).finish(), reused)
    assert_same_run(reused, whole)


def test_ctrl_c_at_the_launcher_saves_and_resume_continues_exactly(
    raw_of_two: dict, run_of_two: Path, tmp_path: Path
) -> None:
    config, parts = written(tmp_path, raw_of_two), tmp_path / "parts"
    interrupted = Launch(2, "--config", config, "--out", parts)
    interrupted.interrupt(signal.SIGINT, parts)
    assert interrupted.stderr.splitlines().count(SAVED) == 1
    assert "train.py" not in interrupted.stderr, "no traceback of ours; the launcher's own is what it is"
    assert not progress(parts)["finished"]
    Launch(2, "--config", config, "--out", parts, "--resume").finish()
    assert_same_run(parts, run_of_two)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_to_a_plain_run_saves_and_resume_continues_exactly(
    long_config: Path, train_tiny: Callable[..., Path], tmp_path: Path, number: int
) -> None:
    parts = tmp_path / "parts"
    launch = Launch(0, "--config", long_config, "--out", parts)
    assert launch.interrupt(number, parts) == 130
    assert launch.stderr == f"{SAVED}\n"
    assert not progress(parts)["finished"]
    raw = json.loads(long_config.read_text())
    train_tiny(raw, parts, resume=True)
    assert_same_run(parts, train_tiny(raw, tmp_path / "whole"))


def test_a_mistake_under_the_launcher_is_one_line(tiny_config: dict, tmp_path: Path) -> None:
    config = written(tmp_path, tiny_config)
    launch = Launch(2, "--config", config, "--out", tmp_path / "run", "--set", "modle.width=8")
    assert launch.wait() == 2
    lines = (launch.stdout + launch.stderr).splitlines()
    ours = [line for line in lines if "exits with return code" not in line]  # the launcher's
    assert len(ours) == 1
    assert ours[0].startswith(f"error: {config}: modle: unknown key; ")


@pytest.mark.usefixtures("process_state")
class TestUserErrors:
    @pytest.fixture
    def complain(self, tiny_config: dict, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
        def run(*arguments: str, said: str = "") -> str:
            config = written(tmp_path, tiny_config)
            assert train_main(["--config", str(config), "--out", str(tmp_path / "run"), *arguments]) == 2
            out, err = capfd.readouterr()
            assert out.startswith(said)
            assert out.count("\n") == bool(said)
            assert err.count("\n") == 1
            return err.rstrip("\n")

        return run

    def test_a_typo_in_the_config(self, complain: Callable[..., str]) -> None:
        assert complain("--set", "modle.width=8").endswith("did you mean model?")

    def test_a_missing_data_file(self, complain: Callable[..., str]) -> None:
        message = complain("--data", 'data/it\'s "mosi".h5')
        assert message.startswith('error: data/it\'s "mosi".h5: no such data file; import the real features with ')
        assert "fastmmkd data synth --like mosi" in message

    def test_a_batch_larger_than_the_data(self, complain: Callable[..., str]) -> None:
        message = complain("--set", "train.batch_size=64")
        assert re.fullmatch(
            r"error: train\.batch_size: 64, but .*tiny\.h5 has 40 training samples; expected at most that, "
            r"--set train\.batch_size=40",
            message,
        )

    def test_a_batch_that_processes_cannot_share(
        self, complain: Callable[..., str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(session, "world_size", lambda: 3)
        assert complain() == "error: train.batch_size: 8 does not divide by 3 processes"

    def test_seeds_that_are_no_numbers(self, complain: Callable[..., str]) -> None:
        assert complain("--seeds", "1,x").endswith('train.seeds: expected a list, got "[1,x]"')

    def test_cuda_where_there_is_none(self, complain: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert complain("--set", "train.device=cuda") == (
            "error: train.device: cuda, but torch sees no CUDA device; expected auto or cpu on this machine"
        )

    def test_what_deepspeed_refuses(self, complain: Callable[..., str], tmp_path: Path) -> None:
        message = complain("--set", "deepspeed.optimizer.type=SGD", said="umdf on tiny test data")
        log = tmp_path / "run" / "deepspeed.log"
        assert message.startswith("error: deepspeed: SGD.__init__() got an unexpected keyword argument 'torch_adam'")
        assert message.endswith(f"(DeepSpeed refuses this block, see {log})")
        assert "Traceback" in log.read_text()

    def test_only_the_first_process_speaks(
        self, tiny_config: dict, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RANK", "1")
        assert train_main(["--config", str(tmp_path / "none.json")]) == 2
        assert capfd.readouterr() == ("", "")


OWN = ("umdf", "corrkd", "hrlf")
COMBINATIONS = [
    *product(OWN, (1, 2), (0, 1, 2), ("fp32", "bf16")),
    *((method, 2, 1, "fp32") for method in METHODS if method not in OWN),
]
"""Method, processes, ZeRO stage and precision."""


@pytest.mark.slow
@pytest.mark.parametrize(("method", "processes", "stage", "precision"), COMBINATIONS)
def test_every_combination_trains_and_repeats_itself(
    tiny_config: dict,
    distilled_config_of: Callable[[str, Path], dict],
    tiny_store: Path,
    tmp_path: Path,
    method: str,
    processes: int,
    stage: int,
    precision: str,
) -> None:
    if method == "umdf":
        raw = tiny_config
    elif method in OWN:
        raw = distilled_config_of(method, tiny_store)
    else:
        raw = small_config_of(method, tiny_store, batch=8)
        raw["deepspeed"].pop("fp16", None)
        raw["train"]["seeds"], raw["eval"]["sweep"] = [1], []
        if "teacher" in raw:
            raw["teacher"] |= {"epochs": 2, "accept_floor": True}
    raw["deepspeed"]["zero_optimization"] = {"stage": stage}
    if precision == "bf16":
        raw["deepspeed"]["bf16"] = {"enabled": True}
    config, first, second = written(tmp_path, raw, epochs=10), tmp_path / "first", tmp_path / "second"
    for run in (first, second):
        assert_quiet(Launch(processes, "--config", config, "--out", run).finish(), run)
    earlier = sorted(path.parent.name for path in (first / "seed_1").glob("*/model.safetensors"))
    for phase in (*earlier, ""):
        assert_same(parameters(first, phase=phase), parameters(second, phase=phase))
        lines = records(first, phase=phase)
        assert without_timings(lines) == without_timings(records(second, phase=phase))
        assert lines[-1]["train"]["task"] < lines[0]["train"]["task"]  # the loss may gain parts on the way
    assert json.loads((first / "run.json").read_text())["precision"] == precision
