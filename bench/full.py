"""What the papers' configs took and reached, trained to their end at full size: `make full`, then
`python -m bench.report --full runs/full`; and what those of IEMOCAP reach with a short warm-up: `make warm-up`.

Of every run its results, its `run.json` and `phases.json`, which is read off the run's journals, go into the records.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.quality import NOT_YET, RECORDS, take
from fastmmkd.errors import UserError
from fastmmkd.evaluation import metrics, results, tables
from fastmmkd.files import read_json, write_text
from fastmmkd.model_file import read_facts
from fastmmkd.run_folder import JOURNAL_FILE, MODEL_FILE, RESULTS_FILE, RUN_FILE, seed_directory
from fastmmkd.tasks import Task

FULL, WARM_UP = "full", "warm_up"
"""Folders of the records, and the generated parts: the configs as they are shipped, and with a short warm-up."""
PHASES_FILE = "phases.json"
LAST = "last"
"""What the phase is called that a run ends with: `student`, or `network` where it has no teacher."""


def take_full(folder: Path, which: str = FULL) -> None:
    """Take over the finished runs that `make full` (or `make warm-up`) has left in a folder.

    Raises:
        UserError: there is none.
    """
    runs = sorted(file.parent for file in folder.glob(f"*/{RESULTS_FILE}"))
    if not runs:
        raise UserError(f"{folder}: holds no finished run, expected what `make full` leaves")
    for run in runs:
        record = RECORDS / which / run.name
        take(run, record)
        write_text(record / PHASES_FILE, json.dumps(phases(run), indent=1) + "\n")


def phases(run: Path) -> list[dict[str, Any]]:
    """The phases of a run's first seed, in their order."""
    seed = seed_directory(run, read_json(run / RUN_FILE, "a run.json")["config"]["train"]["seeds"][0])
    earlier = sorted(path.parent for path in seed.glob(f"*/{MODEL_FILE}"))
    return [phase(folder, folder.name) for folder in earlier] + [phase(seed, LAST)]


def phase(folder: Path, name: str) -> dict[str, Any]:
    """What a phase took, and its best validation score beside that of the best constant prediction."""
    records = [json.loads(line) for line in (folder / JOURNAL_FILE).read_text(encoding="utf-8").splitlines()]
    engine, facts = [record["engine"] for record in records], read_facts(folder)
    samples = sum(of["samples_per_second"] * of["seconds"] for of in engine)
    training, validation = (sum(of.get(key, 0.0) for of in engine) for key in ("seconds", "validation_seconds"))
    joules = [of.get("joules") for of in engine]
    return {
        "phase": name,
        "epochs": len(records),
        "best epoch": int(facts["epoch"]),
        "metric": facts["select"],
        "score": float(facts["score"]),
        "floor": float(facts["floor"]),
        "training seconds": training,
        "validation seconds": validation,
        "samples per second": samples / training,
        "peak memory MB": max(of.get("peak_memory_mb", 0.0) for of in engine),
        "joules": None if None in joules else sum(joules),
    }


def parts() -> dict[str, str]:
    """The generated parts: a row for every phase of every run that is recorded."""
    return {which: _table(RECORDS / which) for which in (FULL, WARM_UP)}


def _table(folder: Path) -> str:
    rows = [row for record in sorted(folder.glob(f"*/{PHASES_FILE}")) for row in _rows(record.parent)]
    header = ["config", "phase", "epochs (best)", "best on validation", "constant", "training", "validation"]
    header += ["samples/s", "peak MB", "kJ", "test, Avg.", "{l,a,v}"]
    return tables.markdown_table(header, rows) if rows else NOT_YET


def _rows(record: Path) -> list[list[str]]:
    content = results.read(record)
    key = metrics.primary(Task(content.task))
    made: Sequence[dict[str, Any]] = read_json(record / PHASES_FILE, "phases of a run")
    rows = []
    for of in made:
        reached = [content.average.metrics[key].mean, content.conditions["lav"].metrics[key].mean]
        joules = of["joules"]
        rows.append(
            [
                f"`{record.name}`" if of is made[0] else "",
                of["phase"],
                f"{of['epochs']} ({of['best epoch']})",
                f"{metrics.title(of['metric']) if of['metric'] != 'loss' else 'loss'} {of['score']:.3f}",
                f"{of['floor']:.3f}",
                _minutes(of["training seconds"]),
                _minutes(of["validation seconds"]),
                f"{of['samples per second']:,.0f}",
                f"{of['peak memory MB']:,.0f}",
                tables.NONE if joules is None else f"{joules / 1e3:.1f}",
                *([tables.format_number(key, value) for value in reached] if of["phase"] == LAST else ["", ""]),
            ]
        )
    return rows


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"
