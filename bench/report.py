"""Render the documents' tables and plots from `bench/results` and the configs: `python -m bench.report`.

python -m bench.report                          rewrite tables and plots
python -m bench.report --check                  exit 1 if the tables are not what the records say
python -m bench.report --study runs/study       first take over the results of `make study`
python -m bench.report --real runs/real         first take over the results of `make real`
python -m bench.report --compare runs/compare   first take over the results of `make compare` on synthetic MOSI
python -m bench.report --full runs/full         first take over the results of `make full`
python -m bench.report --warm-up runs/warm_up   first take over the results of `make warm-up`

Results are taken of the methods that are there; the records of others stay.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from bench import entry, features, full, literal, quality, quality_plots, speed, speed_plots, volume
from bench.quality import ABLATIONS
from bench.status import status_table
from fastmmkd.files import write_text

ROOT = Path(__file__).parents[1]
DOCUMENTS = {
    ROOT / "README.md": ("cmu_mosi", quality.COMPARED, "speed"),
    ROOT / "docs" / "speed.md": ("whole_steps", "train_steps", "kernels", "epochs", "scaling", "data_path"),
    ROOT / "docs" / "parity.md": ("parity",),
    ROOT / "docs" / "full_runs.md": (full.FULL, full.WARM_UP),
    ROOT / "docs" / "gpu.md": ("status",),
    ROOT / "docs" / "methods.md": (
        "features",
        "cmu_mosi_differences",
        "cmu_mosi_mae",
        "cmu_mosi_folds",
        "compare_differences",
        "compare_mae",
        "ict_mmmo",
        "ict_mmmo_differences",
        "ict_mmmo_mae",
    ),
    ROOT / "docs" / "hosts.md": ("volume",),
    ROOT / "docs" / "fidelity.md": literal.names(),
    ROOT / "docs" / "ablations.md": (
        "losses",
        "methods",
        "fresh",
        *(
            f"{draw}_{method}"
            for draw in quality.DRAWS
            for method in ABLATIONS
            if (ROOT / "configs" / f"study_{method}.json").exists()
        ),
    ),
}
"""File -> its generated parts, in `<!-- begin: NAME ... -->` marks; of the methods that have such configs."""


def main(argv: list[str] | None = None) -> int:
    """Rewrite or check the documents; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Render the documents' tables.")
    parser.add_argument("--check", action="store_true", help="only say whether the documents are up to date")
    parser.add_argument("--study", type=Path, metavar="DIR", help="folder of `make study` to take results from")
    parser.add_argument("--real", type=Path, metavar="DIR", help="folder of `make real` to take results from")
    parser.add_argument("--compare", type=Path, metavar="DIR", help="folder of `make compare`, of synthetic MOSI")
    parser.add_argument("--full", type=Path, metavar="DIR", help="folder of `make full` to take results from")
    parser.add_argument("--warm-up", type=Path, metavar="DIR", help="folder of `make warm-up` to take results from")
    args = parser.parse_args(argv)
    if args.compare:
        quality.take_compare(args.compare)
    if args.full:
        full.take_full(args.full)
    if args.warm_up:
        full.take_full(args.warm_up, full.WARM_UP)
    if args.study:
        quality.take_study(args.study)
    if args.real:
        quality.take_real(args.real)
    if not args.check:
        speed_plots.draw_all()
        quality_plots.draw_all()
    bodies = parts()
    stale = False
    for path, names in DOCUMENTS.items():
        old = path.read_text(encoding="utf-8")
        new = render(old, {name: bodies[name] for name in names}, path.name)
        stale |= new != old
        if args.check:
            print(f"{path.name} is up to date" if new == old else f"{path.name} is stale: run `make readme`")
        else:
            write_text(path, new)
    return int(args.check and stale)


def parts() -> dict[str, str]:
    """Every generated part, by name: what the records and the configs say."""
    return (
        quality.parts()
        | full.parts()
        | features.parts()
        | speed.parts()
        | literal.parts()
        | volume.parts()
        | {"status": status_table()}
    )


def render(text: str, bodies: dict[str, str], document: str) -> str:
    """A document with its generated parts replaced.

    Raises:
        ValueError: a part is not there exactly once.
    """
    for name, body in bodies.items():
        pattern = re.compile(rf"(<!-- begin: {name} [^\n]*-->\n).*?(<!-- end: {name} -->)", re.DOTALL)
        places = list(pattern.finditer(text))
        if len(places) != 1:
            raise ValueError(f"{document} has {len(places)} parts named {name}; expected one")
        text = text[: places[0].end(1)] + body + text[places[0].start(2) :]
    return text


if __name__ == "__main__":
    entry.run(main)
