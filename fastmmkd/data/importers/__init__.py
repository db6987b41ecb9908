"""Importers: one module per layout that the field's data come in, each with `load(source) -> Dataset`."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Literal

from fastmmkd.data.dataset import Dataset
from fastmmkd.errors import UserError

FORMATS = ("mmsa", "mult", "csd", "mfn", "samples")
"""Modules of this package; the one that is asked for is imported. "samples" are only to be predicted: labels and splits
are as they are."""


def import_dataset(
    format: str,
    source: Path | str,
    resplit: int | None = None,
    by: Literal["sample", "video"] = "sample",
    labels: Literal["score", "sims"] | None = None,
    clip_labels: bool = False,
) -> Dataset:
    """Read a data set in one of the field's layouts; `fastmmkd.data.store.write` stores the result.

    Args:
        format: `"mmsa"` or `"mult"` (a pickle), `"csd"` (a folder of CMU-MultimodalSDK files), `"mfn"` (a folder),
            `"samples"` (what `importers.samples` reads, to be predicted).
        source: the file or folder.
        resplit: a seed to pool all splits and divide them again (see `resplit.resplit`); None keeps the source's.
        by: what is divided: samples, or videos with all their samples.
        labels: what its scores are: sentiment in [-3, 3], or in [-1, 1] as those of CH-SIMS, with its metrics. None:
            the first, but scores that look like the second are refused.
        clip_labels: scores beyond are set to the limits and counted, not refused.

    Raises:
        UserError: an unknown format, the source is not what the format's `load` expects, or it cannot be divided so.
    """
    if format not in FORMATS:
        raise UserError(f"format {format!r} is not one of {', '.join(FORMATS)}")
    if format == "samples" and resplit is not None:
        raise UserError(f"{source}: samples are only to be predicted, expected no --resplit")
    loaded: Dataset = import_module(f"{__name__}.{format}").load(Path(source))
    from fastmmkd.data.importers.settle import with_settled_labels

    # The source's name may be no UTF-8, and its own words anything.
    loaded.source = loaded.source.replace("\0", "").encode("utf-8", "backslashreplace").decode()
    dataset = with_settled_labels(loaded, source, labels, clip_labels)
    if resplit is None:
        from fastmmkd.data.importers.videos import shared_videos

        if shared := shared_videos({name: split.ids for name, split in dataset.splits.items()}):
            dataset.report["notes"].append(f"{shared} videos have segments in several of the source's splits")
        return dataset
    from fastmmkd.data.importers.resplit import resplit as divided_again

    try:
        return divided_again(dataset, resplit, by)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
