from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from fastmmkd.data.store import SPLITS, Dataset, Split
from fastmmkd.modalities import MODALITIES


def _split(rng: np.random.Generator, name: str, samples: int, kind: str) -> Split:
    steps, widths = {"language": 5, "audio": 7, "visual": 4}, {"language": 6, "audio": 4, "visual": 3}
    present = rng.random((samples, 3)) < 0.8
    present[:, 0] |= ~present.any(1)
    lengths = np.stack([rng.integers(1, steps[m] + 1, samples) for m in MODALITIES], axis=1) * present
    features = {}
    for i, m in enumerate(MODALITIES):
        x = rng.normal(size=(samples, steps[m], widths[m])).astype(np.float32)
        x[np.arange(steps[m])[None, :] < steps[m] - lengths[:, i, None]] = 0
        features[m] = x
    labels = rng.integers(-9, 10, samples) / 3 if kind == "score" else rng.random((samples, 4)) < 0.4
    return Split.from_padded(
        features=features,
        lengths=lengths.astype(np.int32),
        present=present,
        labels=labels.astype(np.float32),
        ids=[f"{name}[{i}] ünï" for i in range(samples)],
    )


@pytest.fixture
def make_dataset() -> Callable[..., Dataset]:
    """A valid random data set: `make_dataset(seed=0, kind="score")`, three splits of 12, 6 and 5 samples."""

    def make(seed: int = 0, kind: str = "score") -> Dataset:
        rng = np.random.default_rng(seed)
        sizes = dict(zip(SPLITS, (12, 6, 5), strict=True))
        return Dataset(
            splits={name: _split(rng, name, n, kind) for name, n in sizes.items()},
            label_kind=kind,
            source="random numbers",
            importer="synthetic",
            report={"notes": ["a note"]},
        )

    return make
