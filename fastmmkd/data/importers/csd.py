"""CMU-MultimodalSDK computational sequences (`.csd`), aligned to words as the papers' 300/74/35 sets were.

Shape legend: W words of a segment, R rows of a stream, T frames kept, d features. Times are in seconds.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastmmkd.data.checked_hdf5 import in_one_line
from fastmmkd.data.importers.assemble import RawSplit, assemble, finite_float32
from fastmmkd.data.importers.csd_files import Rows, Stream, open_streams, read_folds
from fastmmkd.data.store import SPLITS, Dataset
from fastmmkd.errors import UserError
from fastmmkd.modalities import MODALITIES

SAMPLES = "samples"
"""The one split of what is only to be predicted."""
EPSILON = 1e-5
"""Overlaps shorter than this come from rounding, not from speech, and a word that is shorter has no duration."""
PAUSE = "sp"


@dataclass
class _Segment:
    """One labelled stretch of a video."""

    name: str
    label: float
    words: int
    """How many of its words are kept."""
    features: dict[str, np.ndarray]
    """Modality -> `[words, d]` float32, zero where no row overlaps a word; no key where the video has no rows."""


def load(source: Path, steps: int = 50) -> Dataset:
    """Import a folder of `.csd` files: GloVe, COVAREP, Facet, opinion labels, and optionally the words.

    Every label interval is a segment (sample `video[k]`, first label column). Its frames are the words whose midpoint
    lies in it, without the pauses (`sp`) where a words file tells them; each modality's frame is the mean of its rows
    that overlap the word's interval, NaN and infinities first set to 0. The last `steps` words are kept and
    padded on the left. A word without rows is a missing frame; a segment without words is dropped and counted.
    A word without duration has the rows of its own interval (GloVe's), or else those that its instant lies in; it is
    counted, and so is every modality that has neither.
    Streams that are already cut into `video[k]` are taken as they are; with as many rows as words, row i is word i.

    The folds come from `splits.json` (`{"train": [video, ...], "valid": [...], "test": [...]}`) or the SDK's
    `*_std_folds.py` in the same folder; videos in no fold are left out and counted.

    Args:
        source: the folder.
        steps: T.

    Raises:
        UserError: a stream or the folds are missing or ambiguous, or a file is not a readable computational sequence.
    """
    if not source.is_dir():
        raise UserError(
            f"{source}: {'is a file' if source.exists() else 'no such folder'}, expected a folder of .csd files"
        )
    folds = read_folds(source)
    with in_one_line(source), open_streams(source) as streams:
        importer = _Importer(streams, steps)
        segments: dict[str, list[_Segment]] = {name: [] for name in SPLITS}
        for video in streams["labels"].videos:
            if video in folds:
                segments[folds[video]] += importer.segments(video, folds[video])
            else:
                importer.dropped["videos in no fold"] += 1
        widths = {modality: streams[modality].width for modality in MODALITIES}
        title = streams["labels"].dataset_name or source.resolve().name
    for name in SPLITS:
        if not segments[name]:
            raise UserError(f"{source}: no segment with words for {name}; do the folds name videos of these files?")
    raw = {name: _raw_split(segments[name], widths, steps) for name in SPLITS}
    dataset = assemble(raw, source=f"CMU-MultimodalSDK {title}", importer="csd")
    dataset.report["nonfinite"] = {
        name: {m: dict(importer.nonfinite[name, m]) for m in MODALITIES if importer.nonfinite[name, m]}
        for name in SPLITS
    }
    dataset.report["notes"] += [f"{count} {what} left out" for what, count in importer.dropped.items()]
    dataset.report["notes"] += importer.instants_in_words()
    dataset.report["notes"] += [
        f"{sum(stream.untimed.values())} rows of {stream.path.name} begin or end at no finite time: left out"
        for stream in streams.values()
        if stream.untimed
    ]
    return dataset


def load_samples(source: Path, steps: int = 50) -> Dataset:
    """The samples of a folder for prediction, as one split "samples": labelled segments, whatever fold they are in.

    Without labels every video is a sample, or every `video[k]` where the language is cut so; the labels are 0 then, and
    the data set's `label_kind` is "".

    Raises:
        UserError: as `load`, but that there need be neither folds nor labels.
    """
    with in_one_line(source), open_streams(source, labelled=False) as streams:
        importer = _Importer(streams, steps)
        whose = streams.get("labels") or streams["language"]
        segments = [x for video in whose.videos for x in importer.segments(video, SAMPLES)]
        widths = {modality: streams[modality].width for modality in MODALITIES}
    if not segments:
        raise UserError(f"{source}: no segment with words")
    kind = "score" if "labels" in streams else ""
    raw = {SAMPLES: _raw_split(segments, widths, steps)}
    return assemble(raw, source=str(source), importer="csd", label_kind=kind)


class _Importer:
    """Cuts videos into segments and counts what it met on the way."""

    def __init__(self, streams: dict[str, Stream], steps: int) -> None:
        self.streams = streams
        self.cut = (streams.get("labels") or streams["language"]).cut
        """Whether the samples' streams are cut into `video[k]`."""
        self.steps = steps
        self.nonfinite: defaultdict[tuple[str, str], Counter[str]] = defaultdict(Counter)
        """(split, modality) -> numbers of NaN and infinite values in the rows that were used."""
        self.dropped: Counter[str] = Counter()
        self.instants: Counter[str] = Counter()
        """`"words"` -> words without duration among those that are kept; modality -> those of them that it lacks."""

    def instants_in_words(self) -> list[str]:
        """A line on words without duration, where there are any."""
        if not self.instants["words"]:
            return []
        lacking = [f"{self.instants[m]} have no {m}" for m in MODALITIES if self.instants[m]]
        line = f"{self.instants['words']} words without duration have the rows at their instant"
        return [", ".join([line, *lacking])]

    def segments(self, video: str, split: str) -> list[_Segment]:
        """The labelled segments of a video that hold at least one word, in the order of their k."""
        labels = self.streams.get("labels")
        if labels is None:
            names = self.streams["language"].keys[video] if self.cut else [video]
            always = Rows(np.zeros((1, 1)), np.array([-np.inf]), np.array([np.inf]))
            parts = [(name, always) for name in names]
        elif labels.cut:
            parts = [(key, labels.rows(key)) for key in labels.keys[video]]
        else:
            rows = labels.rows(video)
            parts = [(f"{video}[{k}]", rows.where(np.array([k]))) for k in range(len(rows.start))]
        # Read once per video what is not already cut into the labels' segments.
        whole = {role: stream.video_rows(video) for role, stream in self.streams.items() if role != "labels"}
        segments = []
        for name, label in parts:
            if labels and len(label.start) and not (label.features.size and np.isfinite(label.features[0, 0])):
                value = label.features[0, 0] if label.features.size else "nothing"
                raise UserError(f"{labels.path}: the label of {name} is {value}, expected a finite score")
            segment = self._segment(name, label, whole, split) if len(label.start) else None
            if segment is None:
                self.dropped["segments without words"] += 1
            else:
                segments.append(segment)
        return segments

    def _segment(self, name: str, label: Rows, whole: dict[str, Rows | None], split: str) -> _Segment | None:
        """One segment, word by word; None if it holds no word."""
        word_role = "words" if "words" in self.streams else "language"
        words = self._own_rows(word_role, name)
        if words is None and (rows := whole[word_role]) is not None:
            middle = (rows.start + rows.stop) / 2
            words = rows.where((middle >= label.start[0]) & (middle < label.stop[0]))
        if words is None:
            return None
        spoken = ~_is_pause(words.features) if word_role == "words" else np.ones(len(words.start), bool)
        kept = np.flatnonzero(spoken)[-self.steps :]
        if not len(kept):
            return None
        features = {}
        for modality in MODALITIES:
            own = words if modality == word_role else self._own_rows(modality, name)
            if own is not None and len(own.start) == len(words.start):
                frames, counts = finite_float32(own.features[kept])
            elif (rows := whole[modality] if own is None else own) is not None:
                frames, counts = mean_over_words(rows, words.start[kept], words.stop[kept])
            else:
                continue
            self.nonfinite[split, modality].update(counts)
            features[modality] = frames
        instants = words.stop[kept] - words.start[kept] <= EPSILON
        self.instants["words"] += int(instants.sum())
        for modality in MODALITIES:
            there = modality in features and features[modality].any(axis=1)
            self.instants[modality] += int((instants & ~there).sum())
        return _Segment(name, float(label.features[0, 0]), len(kept), features)

    def _own_rows(self, role: str, name: str) -> Rows | None:
        """The rows that a stream has cut for this very segment.

        Only where the labels are cut too: otherwise its k may count words.
        """
        stream = self.streams[role]
        return stream.rows(name) if self.cut and stream.has(name) else None


def mean_over_words(rows: Rows, start: np.ndarray, stop: np.ndarray) -> tuple[np.ndarray, dict[str, int]]:
    """Mean of the rows `[R, d]` that overlap each word's interval.

    A word without duration overlaps nothing: it takes the rows of the same interval, or else those that it lies in.

    Args:
        rows: features with their times, in any order; NaN and infinities count as 0 in the mean.
        start, stop: `[W]` seconds.

    Returns:
        `[W, d]` float32, zero for a word that no row belongs to; the numbers of non-finite values met (`nan`, `inf`).
    """
    near = rows.where((rows.start <= stop.max() + EPSILON) & (rows.stop >= start.min() - EPSILON))
    start, stop = start[:, None], stop[:, None]
    overlap = np.minimum(near.stop, stop) - np.maximum(near.start, start)
    instant = (near.stop - near.start <= EPSILON) & (near.start >= start) & (near.start < stop)
    own = (np.abs(near.start - start) <= EPSILON) & (np.abs(near.stop - stop) <= EPSILON)
    own |= ~own.any(axis=1, keepdims=True) & (near.start <= start) & (start < near.stop)
    chosen = np.where(stop - start <= EPSILON, own, (overlap > EPSILON) | instant)
    used = chosen.any(axis=0)
    x, counts = finite_float32(near.features[used])
    weights = chosen[:, used].astype(np.float64)
    total = weights.sum(1, keepdims=True)
    return (weights @ x / np.maximum(total, 1)).astype(np.float32), counts


def _is_pause(words: np.ndarray) -> np.ndarray:
    """`[R, 1]` bytes or strings -> bool `[R]`."""
    texts = [w.decode("utf-8", "replace") if isinstance(w, bytes) else str(w) for w in words[:, 0].tolist()]
    return np.array([text.strip() == PAUSE for text in texts], bool)


class _PaddedFrames:
    """A modality of all segments as `[N, steps, d]` float32, made when it is sliced."""

    def __init__(self, frames: list[np.ndarray], steps: int, width: int) -> None:
        self.frames = frames
        self.shape, self.dtype = (len(frames), steps, width), np.dtype(np.float32)

    def __getitem__(self, rows: slice) -> np.ndarray:
        frames = self.frames[rows]
        padded = np.zeros((len(frames), *self.shape[1:]), self.dtype)
        for i, x in enumerate(frames):
            padded[i, self.shape[1] - len(x) :] = x
        return padded


def _raw_split(segments: list[_Segment], widths: dict[str, int], steps: int) -> RawSplit:
    words = np.zeros((len(segments), steps), bool)
    for i, segment in enumerate(segments):
        words[i, -segment.words :] = True
    return RawSplit(
        # Each modality by itself, taken out of the segments, so that it is freed as soon as it is packed.
        features={
            m: _PaddedFrames([s.features.pop(m, np.zeros((0, width), np.float32)) for s in segments], steps, width)
            for m, width in widths.items()
        },
        labels=np.array([segment.label for segment in segments]),
        ids=[segment.name for segment in segments],
        tokens=words,
    )
