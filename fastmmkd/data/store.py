"""The one on-disk format: an HDF5 file that holds every split of a data set.

Layout (format version 1)::

    /                                   attrs: format = "fastmmkd", version = 1
    /meta                               attrs: source, importer, importer_version, label_kind, label_names (JSON),
                                               label_map, content_hash, report (JSON: what the importer counted)
    /meta/normalisation/<modality>      mean [d_m], std [d_m] float64, over the training split's present frames
    /<split>/features/<modality>        [N, T_m, d_m] float16 or float32, left-padded, chunked by sample
    /<split>/lengths                    [N, 3] int32, real frames (present or missing) per modality, 0 where absent
    /<split>/present                    [N, 3] bool, whether the sample has the modality at all
    /<split>/labels                     [N] float32 (score) or [N, 4] float32 in {0, 1} (emotions)
    /<split>/ids                        [N] UTF-8 strings
    /<split>/ideal/<condition>          [N, C] float32, posterior of the label (synthetic data only)
    /meta/ideal_support                 [C] float32, label values (score) or class indices (emotions)

Features are stored raw: NaN and infinities replaced by 0, no normalisation applied. An all-zero frame inside the
real part of a sequence is a missing frame; `Split.frame_mask` says so.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastmmkd.modalities import MODALITIES

SPLITS = ("train", "valid", "test")
EMOTIONS = ("happy", "sad", "angry", "neutral")
"""Column order of emotion labels in the store (the papers' order)."""


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
