"""What labels are made of: the emotions, and the classes that scores are binned into."""

from __future__ import annotations

import numpy as np

SCORE_LIMITS = {"score": 3.0, "sims": 1.0}
"""Kinds of labels that are sentiment scores, and where they end: +- 3 (MOSI, MOSEI, ICT-MMMO), +- 1 (CH-SIMS)."""
LABEL_KINDS = (*SCORE_LIMITS, "emotions")

EMOTIONS = ("happy", "sad", "angry", "neutral")
"""Column order of emotion labels in the store (the papers' order)."""

SCORE_CLASS_NAMES = {
    2: ("negative", "nonnegative"),
    3: ("negative", "zero", "positive"),
    7: ("-3", "-2", "-1", "0", "1", "2", "3"),
}
"""Names of the score classes, by how many there are."""

SIMS_EDGES = {2: (0.0,), 3: (-0.1, 0.1), 5: (-0.7, -0.1, 0.1, 0.7)}
"""Where CH-SIMS ends its classes, by how many there are; an edge belongs to the class below it."""


def sims_classes(scores: np.ndarray, classes: int) -> np.ndarray:
    """Bin scores of CH-SIMS into 2, 3 or 5 classes, int64, numbered from below; in single precision, as labels are."""
    return np.digitize(np.asarray(scores, np.float32), np.array(SIMS_EDGES[classes], np.float32), right=True)
