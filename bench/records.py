"""Records of what was measured, one JSON file each: appended, never replaced.

`bench/results/speed/<device>/<date>_<kind>_<n>.json` holds `schema`, `kind`, `date`, `commit`, `versions`, `device`
(its name, and threads and instruction set, or capability, driver and clocks) and what the kind of measurement adds.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import torch

from bench import power
from fastmmkd.errors import UserError
from fastmmkd.files import make_directory, read_json, write_json
from fastmmkd.ops import extension
from fastmmkd.provenance import commit, cpu_brand, package_version, python_version

SCHEMA = 1
FOLDER = Path(__file__).parent / "results" / "speed"
NAME = re.compile(r"(?P<date>\d{4}-\d\d-\d\d)_(?P<kind>\w+)_(?P<n>\d+)\.json")

Record = dict[str, Any]


class Growing:
    """A record that is written again whenever more was found; its file is whole at any time.

    Args:
        kind: of measurement, a word: "kernels", "train_step_umdf_mosei_full".
        device: what it is measured on.
        folder: of all records.
        day: `YYYY-MM-DD`; today.
    """

    def __init__(self, kind: str, device: torch.device, folder: Path | None = None, day: str | None = None) -> None:
        self.about = about(kind, device) | ({"date": day} if day else {})
        self.path = free_path(self.about, folder)

    def write(self, body: Record) -> Path:
        """Put all that was found into the file.

        Raises:
            UserError: it cannot be written.
        """
        write_json(self.path, self.about | body)
        return self.path


def append(kind: str, body: Record, device: torch.device, folder: Path | None = None, day: str | None = None) -> Path:
    """Write a new record of all that was found: `body`; see `Growing`."""
    return Growing(kind, device, folder, day).write(body)


def put(record: Record, folder: Path | None = None) -> Path:
    """Write a record that says about itself what `about` does, perhaps from another machine.

    Raises:
        UserError: it cannot be written.
    """
    path = free_path(record, folder)
    write_json(path, record)
    return path


def free_path(record: Record, folder: Path | None = None) -> Path:
    """Where a new record goes."""
    directory, key = make_directory((folder or FOLDER) / slug(record["device"])), (record["date"], record["kind"])
    n = 1 + max((int(m["n"]) for m in _named(directory) if (m["date"], m["kind"]) == key), default=0)
    return directory / f"{record['date']}_{record['kind']}_{n}.json"


def newest(folder: Path | None = None) -> dict[tuple[str, str], Record]:
    """The newest record of every (kind, device), the device by its slug.

    One from before workloads had lengths, whose samples were all as long as the longest, gives way to one whose kind
    says so.

    Raises:
        UserError: a file is not a record of this schema.
    """
    latest: dict[tuple[str, str], tuple[tuple[str, int], Path]] = {}
    for directory in sorted(path for path in (folder or FOLDER).glob("*") if path.is_dir()):
        for match in _named(directory):
            key, age = (match["kind"], directory.name), (match["date"], int(match["n"]))
            if key not in latest or age > latest[key][0]:
                latest[key] = age, directory / match.string
    superseded = [(kind, device) for kind, device in latest if (f"{kind}_full", device) in latest]
    return {key: read(path) for key, (_, path) in latest.items() if key not in superseded}


def read(path: Path) -> Record:
    """One record.

    Raises:
        UserError: it is not one of this schema.
    """
    record = read_json(path, "a record of bench.records")
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise UserError(f"{path}: not a record of schema {SCHEMA}; expected one that bench.records wrote")
    return record


def about(kind: str, device: torch.device) -> Record:
    """What every record says about itself."""
    return {
        "schema": SCHEMA,
        "kind": kind,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": commit(),
        "versions": {
            "python": python_version(),
            "torch": torch.__version__,
            **{name: package_version(name) for name in ("triton", "deepspeed", "numpy")},
        },
        "device": gpu(device) if device.type == "cuda" else cpu(),
    }


def cpu() -> Record:
    """The processor, the threads in use, and the instruction set of the C++ kernels."""
    return {
        "name": cpu_brand(),
        "threads": torch.get_num_threads(),
        "instruction set": extension.build_info().get("instruction set", "none"),
    }


def gpu(device: torch.device) -> Record:
    """The GPU, its compute capability, driver and clocks."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        **power.driver_and_clocks(),
    }


def slug(device: Record) -> str:
    """The folder of a device's records: "amd_epyc_2_threads_avx512", "nvidia_h100"."""
    words = [device["name"]]
    if "threads" in device:
        words += [f"{device['threads']} threads", device["instruction set"]]
    return re.sub(r"\W+", "_", " ".join(words)).strip("_").lower()


def described(record: Record) -> str:
    """One line on what a record was taken on and when."""
    return f"{device_of(record)}, torch {record['versions']['torch']}, {record['date']}"


def device_of(record: Record) -> str:
    """What a record was taken on: "AMD EPYC, 2 threads, avx512", "NVIDIA H100"."""
    device = record["device"]
    words = [device["name"]]
    if "threads" in device:
        words += [f"{device['threads']} thread{'s' if device['threads'] > 1 else ''}", device["instruction set"]]
    return ", ".join(words)


def _named(directory: Path) -> list[re.Match[str]]:
    matches = (NAME.fullmatch(path.name) for path in sorted(directory.iterdir()))
    return [match for match in matches if match]
