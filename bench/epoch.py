"""A whole epoch as training takes it, validation included: `python -m bench.epoch --config configs/umdf_mosei.json`.

The last phase of a config under DeepSpeed, from new weights, a teacher's too, on synthetic data of the size that the
config's data set has, or on those that are given. With `--record` appends a record.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from bench import entry, records
from bench.workload import FULL, shape_of
from fastmmkd.blocks import Config
from fastmmkd.config import load_config
from fastmmkd.data import store
from fastmmkd.data.dataset import Dataset
from fastmmkd.data.single_label import single_labelled
from fastmmkd.data.synthetic import synthesize
from fastmmkd.data.training_file import read_data
from fastmmkd.engine.agenda import Agenda
from fastmmkd.engine.device import place, prepare_process, start_deepspeed, warnings_to
from fastmmkd.engine.groups import alone
from fastmmkd.engine.interruption import InterruptionWatch
from fastmmkd.engine.phases import Phase, phases_of, untrained
from fastmmkd.engine.session import Session
from fastmmkd.engine.trainer import Trainer
from fastmmkd.errors import UserError
from fastmmkd.evaluation import tables
from fastmmkd.files import make_directory
from fastmmkd.run_folder import LOG_FILE

KIND = "epoch_"
Result = TypeVar("Result")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, record; returns the exit code."""
    parser = entry.Parser(prog="python -m bench.epoch", description="Time whole epochs, validation included.")
    parser.add_argument("--config", required=True, type=Path, help="a config file")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override, train.batch_size=32")
    parser.add_argument("--data", type=Path, metavar="FILE", help="in place of synthetic data")
    parser.add_argument("--fraction", type=float, default=1.0, metavar="F", help="of the real set's size (default 1)")
    parser.add_argument("--epochs", type=int, default=1, metavar="N", help="how many (default 1)")
    parser.add_argument("--record", action="store_true", help="append a record under bench/results/speed")
    args = parser.parse_args(argv)
    if args.epochs < 1:
        raise UserError(f"--epochs {args.epochs}: expected 1 or more")
    config = load_config(args.config, [*args.set, f"train.epochs={args.epochs}"])
    prepare_process(config)
    with tempfile.TemporaryDirectory() as folder:
        path = args.data or synthetic(config, args.fraction, Path(folder) / "data.h5")
        dataset = single_labelled(read_data(path), config.task, config.data.ambiguous)
        body = {"config": args.config.stem, **measure(config, dataset, Path(folder))}
    print(render(body))
    if args.record:
        print(records.append(KIND + args.config.stem, body, place(config).device))
    return 0


def synthetic(config: Config, fraction: float, path: Path) -> Path:
    """Data like those that the config is for.

    Raises:
        UserError: there are none like them.
    """
    like = shape_of(config).lengths
    if like == FULL:
        raise UserError(f"{config.data.path}: no synthetic data are like it; expected --data")
    store.write(synthesize(like, fraction, seed=1), path)
    return path


class TimedTrainer(Trainer):
    """Notes how long the parts of every epoch take."""

    def __init__(self, session: Session, phase: Phase) -> None:
        self.seconds: dict[str, list[float]] = {}
        super().__init__(session, phase)

    def _timed(self, name: str, run: Callable[..., Result], *args: Any) -> Result:
        started = time.perf_counter()
        result = run(*args)
        if self.session.placement.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.setdefault(name, []).append(time.perf_counter() - started)
        return result

    def _epoch(self, *args: Any) -> None:
        self._timed("epoch", super()._epoch, *args)

    def _train_epoch(self, *args: Any) -> Any:
        return self._timed("training", super()._train_epoch, *args)

    def _validate(self, *args: Any) -> Any:
        return self._timed("validation", super()._validate, *args)


def measure(config: Config, dataset: Dataset, folder: Path) -> dict[str, Any]:
    """The epochs of the config, in a process that is prepared; `folder` takes what training writes."""
    placement, log_file = place(config), folder / LOG_FILE
    with InterruptionWatch() as watch, warnings_to(log_file):
        deepspeed = start_deepspeed(placement, log_file)
        session = Session(config, placement, deepspeed, dataset, Console(quiet=True), watch, log_file)
        spec, module = untrained(config, dataset, config.train.seeds[:1], placement.device, torch.float32)
        for network in module.frozen:
            network.to(placement.dtype)
        rows = torch.from_numpy(spec.rows(config, dataset.splits["train"]))
        group = alone(config.train.seeds[0], make_directory(folder / "seed"))
        session.agenda = Agenda(config, dataset, [group])
        phase = Phase(spec, module, group, rows, config, is_only=len(phases_of(config)) == 1)
        started = time.perf_counter()
        trainer = TimedTrainer(session, phase)
        set_up = time.perf_counter() - started
        try:
            trainer.fit()
        finally:
            trainer.close()
    return {
        "data": dataset.source,
        "samples": trainer.steps_per_epoch * config.train.batch_size,
        "validation samples": session.valid.resident.size,
        "batch": config.train.batch_size,
        "precision": placement.precision,
        "set-up seconds": set_up,
        "seconds": trainer.seconds,
    }


def render(body: dict[str, Any]) -> str:
    """Markdown: a line on what was trained, and a row per epoch."""
    rows = [
        [
            str(i),
            f"{epoch:.1f}",
            f"{training:.1f}",
            f"{validation:.1f}",
            f"{100 * validation / epoch:.1f}",
            f"{body['samples'] / training:,.0f}",
            f"{body['samples'] / epoch:,.0f}",
        ]
        for i, (epoch, training, validation) in enumerate(
            zip(*(body["seconds"][part] for part in ("epoch", "training", "validation")), strict=True), start=1
        )
    ]
    header = ["epoch", "seconds", "training s", "validation s", "validation %", "samples/s of training", "samples/s"]
    text = (
        f"{body['config']}, batch {body['batch']}, {body['precision']}, {body['samples']:,} samples and "
        f"{body['validation samples']:,} to validate ({body['data']}); set up in {body['set-up seconds']:.1f} s"
    )
    return f"{text}:\n\n{tables.markdown_table(header, rows)}"


if __name__ == "__main__":
    entry.run(main)
