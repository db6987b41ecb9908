"""What is tried on two hosts (`namespaces.py`): `test_two_hosts.py` does each; this writes down what came out.

    make test-hosts            # or python -m tests.hosts.trials [--only NAME ...] [--record]

A record is `bench/results/hosts/<date>_<n>.json`: each trial, what it showed, and the versions.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from fastmmkd.data import store
from fastmmkd.files import make_directory, write_json
from fastmmkd.provenance import code_hash, package_version, python_version
from tests.conftest import make_config, make_dataset
from tests.engine.run_records import assert_same_phase, assert_same_run, progress
from tests.hosts.namespaces import BIN, Host, interrupt, reason_against, two_hosts

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "bench" / "results" / "hosts"
TRAIN = ROOT / "train.py"
PATIENCE_S = 240
VARIABLES = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
ALPHA, BETA = 0, 1
LAUNCHERS = ("pdsh", "no_ssh", "torchrun")
PLAIN = "slurm"
"""`python` with srun's variables, which is fastest."""
LONG = 60
"""Epochs of a run that something happens to."""

Ended = tuple[int, str]
"""The exit code and all output of a process."""


class Lab:
    """Two hosts, a data file, and ways to train on them."""

    def __init__(self, hosts: tuple[Host, Host], folder: Path) -> None:
        self.hosts, self.folder = hosts, folder
        self.data = folder / "data.h5"
        store.write(make_dataset(), self.data)
        (folder / "hostfile").write_text("".join(f"{host.name} slots=1\n" for host in hosts))
        (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in VARIABLES.items()))
        self.runs = 0
        self.whole: dict[str, Path] = {}

    def config(self, method: str = "umdf", stage: int = 0, epochs: int = 2, **train: Any) -> Path:
        """A config file of a small run."""
        raw = make_config(self.data)
        if method != "umdf":
            raw |= {"method": method, "teacher": {"epochs": 2, "accept_floor": True}, "loss": {"statistics_width": 8}}
            raw["model"] = {"width": 8, "heads": 2, "encoder_layers": 1}
        raw["train"] |= {"epochs": epochs, "select": "mae"} | train
        raw["deepspeed"]["zero_optimization"] = {"stage": stage}
        self.runs += 1
        path = self.folder / f"{method}_{stage}_{self.runs}.json"
        path.write_text(json.dumps(raw))
        return path

    def out(self) -> Path:
        """A folder for a run, not there yet."""
        self.runs += 1
        return self.folder / "runs" / str(self.runs)

    def start(
        self, launcher: str, config: Path, out: Path, *arguments: str, of: Sequence[Mapping[str, str]] = ({}, {})
    ) -> list[subprocess.Popen[str]]:
        """Train with a process on each host; `of`: variables of each, in addition."""
        train = [TRAIN, "--config", config, "--out", out, *arguments]
        port, first = str(free_port()), self.hosts[ALPHA].address
        at = ["--master_addr", first, "--master_port", port]
        if launcher == "pdsh":
            words = [BIN / "deepspeed", "--hostfile", self.folder / "hostfile", "--master_port", port, *train]
            return [self.hosts[ALPHA].start(words)]
        if launcher == "no_ssh":
            commands = [
                [BIN / "deepspeed", "--hostfile", self.folder / "hostfile", "--no_ssh", "--node_rank", str(i), *at]
                for i in range(2)
            ]
        elif launcher == "torchrun":
            commands = [
                [BIN / "torchrun", "--nnodes", "2", "--nproc_per_node", "1", "--node_rank", str(i), *at]
                for i in range(2)
            ]
        else:  # as srun sets it
            commands = [[BIN / "python"] for _ in range(2)]
            nodes = ",".join(host.name for host in self.hosts)
            step = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "1(x2)", "SLURM_STEP_NODELIST": nodes}
            step |= {"SLURM_JOB_ID": port, "SLURM_LOCALID": "0"}
            of = [dict(mine) | step | {"SLURM_PROCID": str(i)} for i, mine in enumerate(of)]
        return [
            host.start([*command, *train], VARIABLES | dict(mine))
            for host, command, mine in zip(self.hosts, commands, of, strict=True)
        ]

    def train(self, launcher: str, config: Path, out: Path, *arguments: str, **how: Any) -> list[Ended]:
        return [ended(process) for process in self.start(launcher, config, out, *arguments, **how)]

    def train_here(self, processes: int, config: Path, out: Path, *arguments: str) -> list[Ended]:
        """Train on the first host alone, as mpirun starts processes."""
        world = {"OMPI_COMM_WORLD_SIZE": str(processes), "OMPI_COMM_WORLD_LOCAL_SIZE": str(processes)}
        world |= {"PMIX_NAMESPACE": str(free_port())}
        ranks = [
            {"OMPI_COMM_WORLD_RANK": str(i), "OMPI_COMM_WORLD_LOCAL_RANK": str(i)} | world | VARIABLES
            for i in range(processes)
        ]
        words = [BIN / "python", TRAIN, "--config", config, "--out", out, *arguments]
        return [ended(process) for process in [self.hosts[ALPHA].start(words, of_rank) for of_rank in ranks]]

    def left_alone(self, config: Path) -> Path:
        """A run of this config, but for its timeout, that nothing happens to; trained once."""
        raw = json.loads(config.read_text())
        raw["train"].pop("timeout_seconds", None)
        key = json.dumps(raw, sort_keys=True)
        if key not in self.whole:
            self.whole[key] = self.out()
            succeeded(self.train(PLAIN, config, self.whole[key]))
        return self.whole[key]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ended(process: subprocess.Popen[str], patience: float = PATIENCE_S) -> Ended:
    try:
        out, err = process.communicate(timeout=patience)
    except subprocess.TimeoutExpired:
        interrupt(process, signal.SIGKILL)
        out, err = process.communicate()
        raise AssertionError(f"it goes on after {patience:g} s: {out}{err}") from None
    return process.returncode, out + err


def succeeded(ends: Sequence[Ended]) -> None:
    for code, said in ends:
        assert code == 0, said


def errors(ends: Sequence[Ended]) -> list[str]:
    """The lines that ours say of errors, on all hosts; a launcher's prefix is left out."""
    lines = [line for _, said in ends for line in said.splitlines()]
    assert not any("Traceback" in line and "launcher" not in line for line in lines), "\n".join(lines)
    return [line[line.index("error: ") :] for line in lines if "error: " in line and "subprocess" not in line]


def when_trained(run: Path, process: subprocess.Popen[str], epochs: int = 1) -> None:
    """Wait until a run has some epochs behind it."""
    journal, deadline = run / "seed_1" / "metrics.jsonl", time.monotonic() + PATIENCE_S
    while not journal.exists() or journal.read_text().count("\n") < epochs:
        assert process.poll() is None, ended(process)[1]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def assert_same_training(a: Path, b: Path, method: str = "umdf", seed: int = 1) -> None:
    assert_same_run(a, b, seed)
    if method != "umdf":
        assert_same_phase(a, b, seed, "teacher")


def equal(method: str, stage: int, launcher: str) -> Callable[[Lab], str]:
    def trial(lab: Lab) -> str:
        config, two, one = lab.config(method, stage), lab.out(), lab.out()
        succeeded(lab.train(launcher, config, two))
        about = json.loads((two / "run.json").read_text())
        assert about["hosts"] == ["alpha", "beta"]
        succeeded(lab.train_here(2, config, one))
        assert_same_training(two, one, method)
        return "weights, optimiser, records and evaluation are those of two processes on one host, bit for bit"

    trial.__doc__ = f"{method}, ZeRO {stage}, {launcher}: a process on each of two hosts"
    return trial


def together(lab: Lab) -> str:
    """--together: two seeds at once, a process on each of two hosts"""
    config, two, one = lab.config(seeds=[1, 2]), lab.out(), lab.out()
    succeeded(lab.train(PLAIN, config, two, "--together"))
    succeeded(lab.train_here(2, config, one, "--together"))
    for seed in (1, 2):
        a, b = (run / f"seed_{seed}" / "model.safetensors" for run in (two, one))
        assert a.read_bytes() == b.read_bytes()
    return "both models are those of two processes on one host, bit for bit"


def uneven(lab: Lab) -> str:
    """slots that differ: two processes on one host, one on the other"""
    hostfile = lab.folder / "hostfile"
    before = hostfile.read_text()
    config, three, one = lab.config(stage=2, batch_size=6), lab.out(), lab.out()
    hostfile.write_text("alpha slots=2\nbeta slots=1\n")
    try:
        succeeded(lab.train("no_ssh", config, three))
    finally:
        hostfile.write_text(before)
    assert json.loads((three / "run.json").read_text())["hosts"] == ["alpha", "alpha", "beta"]
    succeeded(lab.train_here(3, config, one))
    assert_same_training(three, one)
    return "weights, optimiser, records and evaluation are those of three processes on one host, bit for bit"


def fewer_hosts(lab: Lab) -> str:
    """a run of two hosts, resumed on one"""
    short, long, run = lab.config(epochs=1), lab.config(epochs=2), lab.out()
    succeeded(lab.train(PLAIN, short, run))
    succeeded(lab.train_here(2, long, run, "--resume"))
    assert_same_phase(run, lab.left_alone(long))
    divided, out = lab.config(stage=2, epochs=1), lab.out()
    succeeded(lab.train(PLAIN, divided, out))
    (line,) = errors(lab.train_here(1, lab.config(stage=2, epochs=2), out, "--resume"))
    assert "ZeRO 1 and 2 divide the optimiser among processes: 2 wrote this, not 1" in line
    return "as many processes on one host go on bit for bit; fewer under ZeRO 2 are refused in a line that says how"


def other_data(lab: Lab) -> str:
    """another data file of the same name on the second host"""
    other, out = lab.folder / "other.h5", lab.out()
    store.write(make_dataset(dims=(5, 4, 2)), other)
    with_other = bound(lab.hosts[BETA], other, lab.data)
    try:
        ends = lab.train(PLAIN, lab.config(), out)
    finally:
        with_other()
    (line,) = errors(ends)
    assert f"beta, rank 1: the content of {lab.data} is " in line
    assert not (out / "run.json").exists()
    return "refused in one line, nothing written: beta, rank 1: the content of FILE is ..., on alpha, rank 0, it is ..."


def no_data(lab: Lab) -> str:
    """a data file that the second host has not"""
    hidden = make_directory(lab.folder / "nothing")
    folder = make_directory(lab.folder / "data")
    shutil.copy(lab.data, folder / "there.h5")
    with_nothing, started = bound(lab.hosts[BETA], hidden, folder), time.monotonic()
    try:
        ends = lab.train(PLAIN, lab.config(), lab.out(), "--data", str(folder / "there.h5"))
    finally:
        with_nothing()
    (line,) = errors(ends)
    assert "error: beta, rank 1: " in line
    assert "there.h5: no such data file" in line
    assert [code for code, _ in ends] == [2, 2]
    assert time.monotonic() - started < 60
    return "both end at once with exit code 2; one line: beta, rank 1: FILE: no such data file; ..."


def folder_not_shared(lab: Lab) -> str:
    """a folder of runs that each host has for itself"""
    runs, own = make_directory(lab.folder / "runs"), make_directory(lab.folder / "own")
    with_own = bound(lab.hosts[BETA], own, runs)
    try:
        ends = lab.train(PLAIN, lab.config(), lab.out())
    finally:
        with_own()
    (line,) = errors(ends)
    assert "beta, rank 1: " in line
    assert "expected one folder that all hosts share" in line
    assert not list(own.iterdir())
    return "refused in one line, nothing written: beta, rank 1: FOLDER: rank 0 on alpha has made a file there ..."


def other_variables(lab: Lab) -> str:
    """FASTMMKD_PROVIDER set on one host alone"""
    ends = lab.train(PLAIN, lab.config(), lab.out(), of=({"FASTMMKD_PROVIDER": "reference"}, {}))
    (line,) = errors(ends)
    assert "beta, rank 1: FASTMMKD_PROVIDER is not set, on alpha, rank 0, it is reference" in line
    return "refused in one line: beta, rank 1: FASTMMKD_PROVIDER is not set, on alpha, rank 0, it is reference"


def other_threads(lab: Lab) -> str:
    """OMP_NUM_THREADS that differs"""
    ends = lab.train(PLAIN, lab.config(epochs=1), lab.out(), of=({}, {"OMP_NUM_THREADS": "2"}))
    succeeded(ends)
    assert "OMP_NUM_THREADS differs: 1 on alpha, 2 on beta" in ends[ALPHA][1]
    return "trains, and says so: OMP_NUM_THREADS differs: 1 on alpha, 2 on beta"


def nobody_there(lab: Lab) -> str:
    """the second host never starts"""
    config, out = lab.config(timeout_seconds=8), lab.out()
    first, second = lab.start(PLAIN, config, out)
    interrupt(second, signal.SIGKILL)
    second.communicate()
    (line,) = errors([ended(first)])
    assert "1 of 2 processes met at " in line
    assert "within 8 s (train.timeout_seconds); not there: rank 1" in line
    return "after train.timeout_seconds one line: 1 of 2 processes met at ADDRESS within 8 s ...; not there: rank 1"


def killed(lab: Lab) -> str:
    """a process that is killed in the middle of a training"""
    config, parts = lab.config(epochs=LONG), lab.out()
    processes = lab.start(PLAIN, config, parts)
    when_trained(parts, processes[ALPHA], epochs=3)
    lab.hosts[BETA].run("pkill", "-KILL", "-f", "train.py")
    noticed = time.monotonic()
    ends = [ended(process) for process in processes]
    seconds = time.monotonic() - noticed
    (line,) = errors(ends[:1])
    assert line.startswith("error: alpha, rank 0: another process has ended"), line
    assert line.endswith(f"start all processes again: train.py --config {config} --out {parts} --resume"), line
    assert seconds < 40
    succeeded(lab.train(PLAIN, config, parts, "--resume"))
    assert_same_training(parts, lab.left_alone(config))
    return "the other ends within seconds, one line with the command that resumes; resumed, it is the run left alone"


def link_down(lab: Lab) -> str:
    """a cable that is unplugged in the middle of a training"""
    config, parts = lab.config(epochs=LONG, timeout_seconds=20), lab.out()
    processes = lab.start(PLAIN, config, parts)
    when_trained(parts, processes[ALPHA], epochs=3)
    lab.hosts[BETA].cable("down")
    down = time.monotonic()
    try:
        ends = [ended(process) for process in processes]
    finally:
        lab.hosts[BETA].cable("up")
    seconds = time.monotonic() - down
    assert seconds < 90
    for part in (" s so far", "a link down"):
        assert part in ends[ALPHA][1], ends[ALPHA][1]
    for line in errors(ends):
        assert "another process has not answered within 20 s (train.timeout_seconds)" in line, line
    assert {line.split(":")[1] for line in errors(ends)} == {" alpha, rank 0", " beta, rank 1"}
    succeeded(lab.train(PLAIN, config, parts, "--resume"))
    assert_same_training(parts, lab.left_alone(config))
    return "a line after 10 s; both end after train.timeout_seconds with a line each; resumed, it is the run left alone"


def link_back(lab: Lab) -> str:
    """a cable that is plugged in again"""
    config, parts = lab.config(epochs=LONG), lab.out()
    processes = lab.start(PLAIN, config, parts)
    when_trained(parts, processes[ALPHA], epochs=3)
    lab.hosts[BETA].cable("down")
    time.sleep(15)
    lab.hosts[BETA].cable("up")
    ends = [ended(process) for process in processes]
    succeeded(ends)
    for part in (" s so far", " was done after "):
        assert part in ends[ALPHA][1], ends[ALPHA][1]
    assert_same_training(parts, lab.left_alone(config))
    return "it goes on by itself, says how long the step took, and is the run left alone"


def ctrl_c(lab: Lab) -> str:
    """Ctrl-C at deepspeed's pdsh"""
    config, parts = lab.config(epochs=LONG), lab.out()
    (launcher,) = lab.start("pdsh", config, parts)
    when_trained(parts, launcher)
    interrupt(launcher)
    _code, said = ended(launcher)
    deadline, log = time.monotonic() + 60, parts / "deepspeed.log"
    while "interrupted; everything is saved" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()[-2000:]
        time.sleep(0.1)
    lab.hosts[BETA].run("sh", "-c", "while pgrep -f [t]rain.py; do sleep 0.1; done")
    lab.hosts[ALPHA].run("sh", "-c", "while pgrep -f [t]rain.py; do sleep 0.1; done")
    assert not progress(parts)["finished"]
    succeeded(lab.train("pdsh", config, parts, "--resume"))
    assert_same_training(parts, lab.left_alone(config))
    heard = "at the terminal and " if "everything is saved" in said else ""
    return f"saved, which it says {heard}in deepspeed.log; resumed, it is the run left alone"


def bound(host: Host, source: Path, target: Path) -> Callable[[], None]:
    host.bind(source, target)
    return lambda: host.unbind(target)


def closed_port(lab: Lab) -> str:
    """a port that something else listens at"""
    config, out = lab.config(timeout_seconds=8), lab.out()
    taken = "import socket, time; s = socket.create_server(('', 29555)); print('listening', flush=True); time.sleep(60)"
    listener = lab.hosts[ALPHA].start([BIN / "python", "-c", taken])
    assert listener.stdout
    assert listener.stdout.readline()
    world = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29555"}
    words = [BIN / "python", TRAIN, "--config", config, "--out", out]
    try:
        code, said = ended(lab.hosts[ALPHA].start(words, VARIABLES | world))
    finally:
        interrupt(listener, signal.SIGKILL)
        listener.communicate()
    (line,) = errors([(code, said)])
    assert line.startswith("error: port 29555 is in use; expected a free one"), line
    return "one line: port 29555 is in use; expected a free one, MASTER_PORT (...)"


METHODS = ("umdf", "corrkd", "hrlf")
TRIALS: dict[str, Callable[[Lab], str]] = {
    f"{method} zero {stage} {LAUNCHERS[(i + stage) % 3]}": equal(method, stage, LAUNCHERS[(i + stage) % 3])
    for stage in (0, 1, 2)
    for i, method in enumerate(METHODS)
} | {
    "umdf zero 0 slurm": equal("umdf", 0, "slurm"),
    "together": together,
    "uneven slots": uneven,
    "fewer hosts": fewer_hosts,
    "other data": other_data,
    "no data": no_data,
    "folder not shared": folder_not_shared,
    "other variables": other_variables,
    "other threads": other_threads,
    "nobody there": nobody_there,
    "port in use": closed_port,
    "killed": killed,
    "link down": link_down,
    "link back": link_back,
    "ctrl c": ctrl_c,
}
"""Every method under every ZeRO stage, each launcher with every method and every stage; then what may go wrong."""


def needs_ssh(name: str) -> bool:
    return "pdsh" in name or name == "ctrl c"


def main() -> int:
    parser = argparse.ArgumentParser(description="Train on two hosts made of namespaces, and let things go wrong.")
    parser.add_argument("--only", action="append", metavar="NAME", help=f"one of {', '.join(TRIALS)} (may be repeated)")
    parser.add_argument(
        "--record", action="store_true", help=f"write down what came out, in {RECORDS.relative_to(ROOT)}"
    )
    args = parser.parse_args()
    wanted = args.only or list(TRIALS)
    outcomes: dict[str, dict[str, Any]] = {}
    day = time.strftime("%Y-%m-%d", time.gmtime())
    path = RECORDS / f"{day}_{1 + len(list(RECORDS.glob(f'{day}_*.json')))}.json" if args.record else None
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "lab"
        if reason := reason_against():
            print(reason)
            return 1
        with two_hosts(folder) as hosts:
            lab = Lab(hosts, folder)
            for trial in wanted:
                what = (TRIALS[trial].__doc__ or "").strip()
                reason = reason_against(ssh=True) if needs_ssh(trial) else None
                try:
                    came = {"skipped": reason} if reason else {"holds": TRIALS[trial](lab)}
                except (AssertionError, subprocess.SubprocessError) as error:
                    came = {"FAILED": str(error)}
                outcomes[trial] = {"tried": what} | came
                print(f"{trial}: {'; '.join(came.values())}", flush=True)
                if path:
                    record(outcomes, path)
    if path:
        print(path)
    return int(any("FAILED" in outcome for outcome in outcomes.values()))


def record(outcomes: dict[str, dict[str, Any]], path: Path) -> None:
    """Write down what came out so far; nothing of where this machine keeps its files."""
    versions = {"python": python_version(), **{name: package_version(name) for name in ("torch", "deepspeed", "numpy")}}
    hosts = "two sets of Linux namespaces (network, mounts, processes, name) on one machine, a veth pair between them"
    make_directory(path.parent)
    write_json(path, {"schema": 1, "code": code_hash(), "versions": versions, "hosts": hosts, "trials": outcomes})


if __name__ == "__main__":
    sys.exit(main())
