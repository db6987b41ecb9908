"""Pooling the splits of a data set and drawing them anew."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np

from fastmmkd.data.importers.videos import EXAMPLES, shared_videos, videos_of
from fastmmkd.data.store import SPLITS, Dataset, Split
from fastmmkd.errors import UserError

By = Literal["sample", "video"]


def resplit(dataset: Dataset, seed: int, by: By = "sample") -> Dataset:
    """Pool all splits and divide them again: strata as even as the sizes allow, a function of `seed`.

    A stratum is a label sign (negative, zero, positive; for emotions which of them hold) together with the set of
    modalities that a sample has. Samples keep their ids.

    By sample, sizes stay the same, and within a stratum every split's share differs from its share of the whole by
    less than two samples. Splits that were made by video or speaker are not any more; the report counts the videos (as
    far as ids name them) that now have segments in several splits.

    By video, all samples of a video go into one split, and sizes are met as nearly as whole videos allow.

    Args:
        seed: 0 or more.

    Raises:
        UserError: by video, where ids do not name their videos or there are fewer than three.
    """
    if seed < 0:
        raise UserError(f"--resplit {seed}: expected a seed from 0")
    sources = [dataset.splits[name] for name in SPLITS]
    sizes = np.array([len(source) for source in sources])
    labels, present = (np.concatenate(x) for x in zip(*((s.labels, s.present) for s in sources), strict=True))
    strata, rng = _strata(labels, present, dataset.label_kind), np.random.default_rng(seed)
    by_video = by == "video"
    if by_video:
        target = _allocate_groups(_videos([x for s in sources for x in s.ids]), strata, sizes, rng)
    else:
        target = _allocate(strata, sizes, rng)
    targets = np.split(target, np.cumsum(sizes)[:-1])
    splits = {
        name: _joined([source.take(of_source == s) for source, of_source in zip(sources, targets, strict=True)])
        for s, name in enumerate(SPLITS)
    }
    record: dict[str, Any] = {"seed": seed, "by": by, "sizes": [len(split) for split in splits.values()]}
    record["videos_in_several_splits"] = shared_videos({name: split.ids for name, split in splits.items()})
    return replace(
        dataset,
        splits=splits,
        source=f"{dataset.source}, re-split with seed {seed}" + " by video" * by_video,
        report={**dataset.report, "resplit": record},
    )


def _videos(ids: list[str]) -> np.ndarray:
    """`[N]` int64, a number for each sample's video."""
    videos = videos_of(ids)
    if videos is None:
        raise UserError(
            f"--by video: ids such as {ids[0]!a} do not say which video a sample is of; expected {EXAMPLES}"
        )
    names, numbers = np.unique(videos, return_inverse=True)
    if len(names) < len(SPLITS):
        raise UserError(
            f"--by video: all samples are of {len(names)} videos, expected one for each of {', '.join(SPLITS)}"
        )
    return numbers


def _strata(labels: np.ndarray, present: np.ndarray, label_kind: str) -> np.ndarray:
    """`[N]` int64 stratum of each sample."""
    if label_kind == "emotions":
        kind = (labels > 0.5) @ (1 << np.arange(labels.shape[1]))
    else:
        kind = np.sign(labels).astype(np.int64) + 1
    return kind * 8 + present @ np.array([1, 2, 4])


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


def _allocate_groups(groups: np.ndarray, strata: np.ndarray, sizes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """`[N]` split of each sample, the same for all of a group.

    The largest group first (in random order where they are equal), each goes where it brings sizes and strata nearest
    to their shares. A split that is left empty gets the smallest group of the one that has most groups.

    Args:
        groups: `[N]` int64, 0 to G - 1, with G no less than the number of splits.
    """
    kinds, of_kind = np.unique(strata, return_inverse=True)
    counts = np.zeros((groups.max() + 1, len(kinds) + 1))
    np.add.at(counts, (groups, of_kind), 1)
    counts[:, -1] = counts[:, :-1].sum(axis=1)
    share = sizes / sizes.sum()
    missing = share[:, None] * counts.sum(axis=0)
    shuffled = rng.permutation(len(counts))
    chosen = np.empty(len(counts), np.int64)
    for group in shuffled[np.argsort(-counts[shuffled, -1], kind="stable")]:
        # By how much the squared distances from the shares grow, each relative to the split's size.
        growth = (counts[group] * (counts[group] - 2 * missing)).sum(axis=1) / share
        chosen[group] = split = int(np.argmin(growth))
        missing[split] -= counts[group]
    for split in range(len(sizes)):
        if split not in chosen:
            rich = np.flatnonzero(chosen == np.bincount(chosen).argmax())
            chosen[rich[np.argmin(counts[rich, -1])]] = split
    return chosen[groups]


def _joined(splits: list[Split]) -> Split:
    """Their samples in one split; a modality of theirs is gone when it is joined, for the sake of memory."""
    first = splits[0]
    return Split(
        features={m: np.concatenate([s.features.pop(m) for s in splits]) for m in list(first.features)},
        lengths=np.concatenate([s.lengths for s in splits]),
        present=np.concatenate([s.present for s in splits]),
        labels=np.concatenate([s.labels for s in splits]),
        ids=[sample for s in splits for sample in s.ids],
        ideal={condition: np.concatenate([s.ideal[condition] for s in splits]) for condition in first.ideal},
    )
