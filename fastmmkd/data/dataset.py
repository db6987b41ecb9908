"""A data set in memory: three splits of packed sequences, and what is known about where they come from.

Use it through `fastmmkd.data.store`, which also reads and writes it.

Shape legend: N samples, T frames of the longest, R_m rows (real frames of all samples) and d_m features of modality m.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastmmkd.data.packing import pack, padded_right, unpack
from fastmmkd.errors import UserError
from fastmmkd.labels import EMOTIONS
from fastmmkd.modalities import MODALITIES, condition_modalities

__all__ = ["DTYPES", "EMOTIONS", "SPLITS", "Dataset", "Split"]

SPLITS = ("train", "valid", "test")
DTYPES = ("float32", "float16")
"""Of features on disk."""


@dataclass
class Split:
    """One split in memory, as it is stored: the real frames of all samples, without padding.

    A modality that the whole data set lacks has `[0, d_m]` with d_m >= 1, and `present[:, m]` is False everywhere.
    """

    features: dict[str, np.ndarray]
    """Modality -> `[R_m, d_m]` float32 (or float16): one sample's frames after the other's, in time order."""
    lengths: np.ndarray
    """`[N, 3]` int32, rows that each sample has of each modality; 0 exactly where it is absent."""
    present: np.ndarray
    """`[N, 3]` bool, whether the sample has the modality at all."""
    labels: np.ndarray
    """`[N]` float32 scores in [-3, 3] (of CH-SIMS: in [-1, 1]), or `[N, 4]` float32 emotion indicators in the order of
    `EMOTIONS`."""
    ids: list[str]
    """`[N]` names, unique in the data set."""
    ideal: dict[str, np.ndarray] = field(default_factory=dict)
    """Condition -> `[N, C]` float32 posterior over `Dataset.ideal_support`; empty for real data."""

    @classmethod
    def from_padded(
        cls,
        features: Mapping[str, np.ndarray],
        lengths: np.ndarray,
        present: np.ndarray,
        labels: np.ndarray,
        ids: list[str],
        ideal: dict[str, np.ndarray] | None = None,
    ) -> Split:
        """Pack sequences that are padded with zeros, on the left or on the right.

        Args:
            features: modality -> `[N, T_m, d_m]`; a sample's real frames come last and before them all is zero, or they
                come first and all is zero behind them (`packing.padded_right` says where that is ambiguous).
            lengths: `[N, 3]` int, real frames; what it says of an absent modality does not count.
            present: `[N, 3]` bool.
            labels, ids, ideal: as they are.

        Raises:
            UserError: a modality is missing, shapes do not fit together, a length is not in [0, T_m], or a frame that
                is not zero lies outside the real ones whichever side is padded.
        """
        if set(features) != set(MODALITIES):
            raise UserError(
                f"features are of {', '.join(sorted(features)) or 'nothing'}, expected {', '.join(MODALITIES)}"
            )
        shape = (len(labels), len(MODALITIES))
        if np.shape(lengths) != shape or np.shape(present) != shape:
            shapes = f"{list(np.shape(lengths))} and {list(np.shape(present))}"
            raise UserError(f"lengths and present are {shapes} for {len(labels)} labels, expected {list(shape)}")
        lengths = np.where(present, lengths, 0).astype(np.int32)
        packed = {}
        for i, m in enumerate(MODALITIES):
            right = padded_right(features[m], lengths[:, i], m)
            packed[m] = pack(features[m], lengths[:, i], m, features[m].dtype, right)
        return cls(packed, lengths, present, labels, ids, ideal or {})

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def longest(self) -> tuple[int, ...]:
        """Frames of the longest language, audio and visual sequence; 0 where no sample has the modality."""
        return tuple(self.lengths.max(axis=0, initial=0).tolist())

    @property
    def aligned(self) -> bool:
        """Whether the modalities that a sample has are of the same length, in every sample (word-aligned data)."""
        return bool((~self.present | (self.lengths == self.lengths.max(axis=1, keepdims=True))).all())

    def tested(self, condition: str) -> np.ndarray:
        """`[n]` int64, the samples that a testing condition counts: those that have all that it keeps."""
        return np.flatnonzero(self.present[:, list(condition_modalities(condition))].all(axis=1))

    def starts(self, modality: str) -> np.ndarray:
        """`[N + 1]` int64: the rows of sample i are `starts[i]` to `starts[i + 1]`, and `starts[N]` is R_m."""
        starts = np.zeros(len(self.lengths) + 1, np.int64)
        np.cumsum(self.lengths[:, MODALITIES.index(modality)], out=starts[1:])
        return starts

    def row_samples(self, modality: str) -> np.ndarray:
        """`[R_m]` int64, the sample that each row belongs to."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths[:, MODALITIES.index(modality)])

    def frame_mask(self, modality: str) -> np.ndarray:
        """`[R_m]` bool, True where a frame is there: a row that is all zero is a missing frame."""
        return np.any(self.features[modality], axis=-1)

    def padded(self, modality: str, steps: int | None = None) -> np.ndarray:
        """`[N, T, d_m]` copy with zeros before each sample's frames; T is `steps`, or the modality's longest.

        Raises:
            ValueError: a sample has more frames than `steps`.
        """
        m = MODALITIES.index(modality)
        steps = self.longest[m] if steps is None else steps
        if self.longest[m] > steps:
            raise ValueError(f"{modality} has samples of {self.longest[m]} frames, steps is {steps}")
        return unpack(self.features[modality], self.lengths[:, m], steps)

    def take(self, rows: np.ndarray) -> Split:
        """Some of its samples, copied: `[n]` int64 indices, or `[N]` bool."""
        rows = np.arange(len(self))[rows]
        return Split(
            features={m: x[self._frames_of(rows, m)] for m, x in self.features.items()},
            lengths=self.lengths[rows],
            present=self.present[rows],
            labels=self.labels[rows],
            ids=[self.ids[i] for i in rows],
            ideal={condition: p[rows] for condition, p in self.ideal.items()},
        )

    def _frames_of(self, samples: np.ndarray, modality: str) -> np.ndarray:
        """`[R]` int64, the rows of these samples, one sample's after the other's."""
        lengths = self.lengths[samples, MODALITIES.index(modality)].astype(np.int64)
        shifts = self.starts(modality)[samples] - (np.cumsum(lengths) - lengths)
        return np.repeat(shifts, lengths) + np.arange(lengths.sum())


@dataclass
class Dataset:
    """All splits of a data set and what is known about it."""

    splits: dict[str, Split]
    label_kind: str
    """`"score"` (sentiment in [-3, 3]), `"sims"` (in [-1, 1], with the metrics of CH-SIMS) or `"emotions"` (happy, sad,
    angry, neutral); `""` where there are no labels, and those of the splits say nothing."""
    source: str
    """One line on where it comes from, for reports."""
    importer: str
    """`"mmsa"`, `"mult"`, `"csd"`, `"mfn"`, `"npz"` or `"synthetic"`."""
    label_map: str = "identity"
    """How stored labels were made from the source's: `"label - 3"` for ICT-MMMO."""
    report: dict[str, Any] = field(default_factory=dict)
    """What the importer counted and decided (non-finite values, padding sides, duplicates, re-split); JSON-able."""
    normalisation: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    """Modality -> (mean `[d_m]`, std `[d_m]`), float64, over present frames of the training split; computed by `write`.
    Where the training split lacks the modality, or a feature is constant: mean as measured (0 if none), std 1."""
    ideal_support: np.ndarray | None = None
    content_hash: str = ""
    """SHA-256 (hex) over features, lengths, presence, labels and ids in a canonical order; computed by `write`."""
    path: Path | None = None

    @property
    def feature_dims(self) -> tuple[int, ...]:
        """d_m of language, audio, visual."""
        first = next(iter(self.splits.values()))
        return tuple(first.features[modality].shape[-1] for modality in MODALITIES)

    @property
    def longest(self) -> tuple[int, ...]:
        """T of language, audio, visual: frames of the longest sequence of all splits."""
        return tuple(max(frames) for frames in zip(*(split.longest for split in self.splits.values()), strict=True))

    @property
    def aligned(self) -> bool:
        """Whether the modalities that a sample has are of the same length, in every sample of every split."""
        return all(split.aligned for split in self.splits.values())
