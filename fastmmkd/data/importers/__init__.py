"""Importers: one module per layout that the field's data come in, each with `load(source) -> Dataset`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fastmmkd.data.importers import csd, mfn, mmsa, mult
from fastmmkd.data.importers.resplit import resplit as resplit_dataset
from fastmmkd.data.store import Dataset
from fastmmkd.errors import UserError

FORMATS: dict[str, Callable[[Path], Dataset]] = {
    "mmsa": mmsa.load,
    "mult": mult.load,
    "csd": csd.load,
    "mfn": mfn.load,
}


def import_dataset(format: str, source: Path | str, resplit: int | None = None) -> Dataset:
    """Read a data set in one of the field's layouts; `fastmmkd.data.store.write` stores the result.

    Args:
        format: `"mmsa"` or `"mult"` (a pickle), `"csd"` (a folder of CMU-MultimodalSDK files), `"mfn"` (a folder).
        source: the file or folder.
        resplit: a seed to pool all splits and divide them again (see `resplit.resplit`); None keeps the source's.

    Raises:
        UserError: an unknown format, or the source is not what the format's `load` expects.
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    dataset = FORMATS[format](Path(source))
    return dataset if resplit is None else resplit_dataset(dataset, resplit)
