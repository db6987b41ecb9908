"""Pooling the splits of a data set and drawing them anew."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np

from fastmmkd.data.store import SPLITS, Dataset, Split

_SEGMENT = re.compile(r"\$_\$.*$|\[\d+\]$")
"""What follows the video in an id: MMSA's `video$_$clip`, the SDK's `video[k]`."""


def resplit(dataset: Dataset, seed: int) -> Dataset:
    """Pool all splits and divide them again: same sizes, strata as even as the sizes allow, a function of `seed`.

    A stratum is a label sign (negative, zero, positive; for emotions the first that holds) together with the set of
    modalities that a sample has. Within a stratum, every split's share differs from its share of the whole by less
    than two samples. Samples keep their ids.

    Splits that were made by video or speaker are not any more; the report counts the videos (as far as ids name
    them) that now have segments in several splits.
    """
    pool = _pooled(list(dataset.splits.values()))
    sizes = np.array([len(dataset.splits[name]) for name in SPLITS])
    target = _allocate(_strata(pool, dataset.label_kind), sizes, np.random.default_rng(seed))
    splits = {name: pool.take(np.flatnonzero(target == s)) for s, name in enumerate(SPLITS)}
    record = {"seed": seed, "sizes": sizes.tolist(), "videos_in_several_splits": _shared_videos(splits)}
    return replace(
        dataset,
        splits=splits,
        source=f"{dataset.source}, re-split with seed {seed}",
        report={**dataset.report, "resplit": record},
    )


def _strata(pool: Split, label_kind: str) -> np.ndarray:
    """`[N]` int64 stratum of each sample."""
    kind = pool.labels.argmax(1) if label_kind == "emotions" else np.sign(pool.labels).astype(np.int64) + 1
    modalities = pool.present @ np.array([1, 2, 4])
    return kind * 8 + modalities


def _allocate(strata: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`[N]` split of each sample.

    Walks through the strata, each in random order, and always serves the split that is furthest behind its share: any
    stretch of the walk is then divided nearly in proportion, and the sizes are met.
    """
    order = rng.permutation(len(strata))
    order = order[np.argsort(strata[order], kind="stable")]
    share, served = sizes / sizes.sum(), np.zeros(len(sizes))
    target = np.empty(len(strata), np.int64)
    for i, sample in enumerate(order, start=1):
        behind = np.where(served < sizes, share * i - served, -np.inf)
        target[sample] = split = int(np.argmax(behind))
        served[split] += 1
    return target


def _pooled(splits: list[Split]) -> Split:
    first = splits[0]
    return Split(
        features={m: np.concatenate([s.features[m] for s in splits]) for m in first.features},
        lengths=np.concatenate([s.lengths for s in splits]),
        present=np.concatenate([s.present for s in splits]),
        labels=np.concatenate([s.labels for s in splits]),
        ids=[sample for s in splits for sample in s.ids],
        ideal={condition: np.concatenate([s.ideal[condition] for s in splits]) for condition in first.ideal},
    )


def _shared_videos(splits: dict[str, Split]) -> int:
    videos = [
        {_SEGMENT.sub("", sample) for sample in split.ids if _SEGMENT.search(sample)} for split in splits.values()
    ]
    return sum(sum(video in group for group in videos) > 1 for video in set().union(*videos))
