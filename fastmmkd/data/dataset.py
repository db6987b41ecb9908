"""A data set in memory: three splits of left-padded sequences, and what is known about where they come from.

Use it through `fastmmkd.data.store`, which also reads and writes it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastmmkd.labels import EMOTIONS
from fastmmkd.modalities import MODALITIES

__all__ = ["DTYPES", "EMOTIONS", "SPLITS", "Dataset", "Split"]

SPLITS = ("train", "valid", "test")
DTYPES = ("float32", "float16")
"""Of features on disk."""


@dataclass
class Split:
    """One split in memory, as it is stored.

    Shapes: N samples, T_m frames and d_m features of modality m. A modality that the whole data set lacks
    still has an array with T_m >= 1 and d_m >= 1, all zero, and `present[:, m]` is False everywhere.
    """

    features: dict[str, np.ndarray]
    """Modality name -> `[N, T_m, d_m]` float32 (or float16), left-padded: the real frames come last."""
    lengths: np.ndarray
    """`[N, 3]` int32."""
    present: np.ndarray
    """`[N, 3]` bool."""
    labels: np.ndarray
    """`[N]` float32 scores in [-3, 3], or `[N, 4]` float32 emotion indicators in the order of `EMOTIONS`."""
    ids: list[str]
    """`[N]` names, unique in the data set."""
    ideal: dict[str, np.ndarray] = field(default_factory=dict)
    """Condition -> `[N, C]` float32 posterior over `Dataset.ideal_support`; empty for real data."""

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, rows: np.ndarray) -> Split:
        """Some of its samples, copied: `[n]` int64 indices, or `[N]` bool."""
        rows = np.arange(len(self))[rows]
        return Split(
            features={m: x[rows] for m, x in self.features.items()},
            lengths=self.lengths[rows],
            present=self.present[rows],
            labels=self.labels[rows],
            ids=[self.ids[i] for i in rows],
            ideal={condition: p[rows] for condition, p in self.ideal.items()},
        )

    def frame_mask(self, modality: str) -> np.ndarray:
        """`[N, T_m]` bool, True where a frame is real and present: inside the length, modality there, not all zero."""
        x = self.features[modality]
        m = MODALITIES.index(modality)
        steps = x.shape[1]
        real = np.arange(steps)[None, :] >= steps - self.lengths[:, m, None]
        return real & self.present[:, m, None] & np.any(x != 0, axis=-1)


@dataclass
class Dataset:
    """All splits of a data set and what is known about it."""

    splits: dict[str, Split]
    label_kind: str
    """`"score"` (sentiment in [-3, 3]) or `"emotions"` (happy, sad, angry, neutral)."""
    source: str
    """One line on where it comes from, for reports."""
    importer: str
    """`"mmsa"`, `"mult"`, `"csd"`, `"mfn"` or `"synthetic"`."""
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
        return tuple(self.splits["train"].features[modality].shape[-1] for modality in MODALITIES)
