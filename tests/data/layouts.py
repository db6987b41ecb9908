"""Files in the layouts that users hold on disk, written as the formats describe them, from unpadded sequences.

A source split is a list of clips; a clip maps modality -> `[length, d]`, without the modalities that it lacks.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path

import h5py
import numpy as np

from fastmmkd.modalities import MODALITIES

Clip = Mapping[str, np.ndarray]
WIDTHS = {"language": 6, "audio": 4, "visual": 3}
PICKLE_KEYS = {"language": "text", "audio": "audio", "visual": "vision"}
MFN_PREFIXES = {"language": "text", "audio": "audio", "visual": "video"}


def random_clips(rng: np.random.Generator, count: int, longest: int = 5) -> list[dict[str, np.ndarray]]:
    """Clips whose three modalities have the same length of 2 to `longest` frames, none of them zero."""
    lengths = rng.integers(2, longest + 1, count)
    return [{m: nonzero(rng, n, d) for m, d in WIDTHS.items()} for n in lengths]


def nonzero(rng: np.random.Generator, frames: int, width: int) -> np.ndarray:
    return (rng.uniform(0.5, 2, (frames, width)) * rng.choice([-1, 1], (frames, width))).astype(np.float32)


def padded(clips: Sequence[Clip], modality: str, steps: int, side: str, dtype: str = "float64") -> np.ndarray:
    """`[N, steps, d]` with zeros on the `side` ("left" or "right"); absent modalities are all zero."""
    out = np.zeros((len(clips), steps, WIDTHS[modality]), dtype)
    for i, clip in enumerate(clips):
        x = clip.get(modality, np.zeros((0, WIDTHS[modality])))
        at = steps - len(x) if side == "left" else 0
        out[i, at : at + len(x)] = x
    return out


def dump(content: object, path: Path, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    return path


def mmsa_split(clips: Sequence[Clip], labels: Sequence[float], name: str, steps: Mapping[str, int]) -> dict:
    """A split of `aligned_50.pkl`: right-padded; text_bert = token ids, mask, segment ids; BERT fills padding too."""
    lengths = np.array([len(clip.get("language", ())) for clip in clips])
    mask = np.arange(steps["language"])[None, :] < lengths[:, None]
    text = padded(clips, "language", steps["language"], "right", "float32")
    text[~mask & (lengths > 0)[:, None]] = 0.123
    bert = np.stack([np.where(mask, 2023, 0), mask, np.zeros_like(mask)], axis=1).astype(np.float64)
    return {
        "raw_text": np.array([f"sentence {i}" for i in range(len(clips))], dtype=object),
        "id": [f"{name}$_${i}" for i in range(len(clips))],
        "text": text,
        "text_bert": bert,
        "audio": padded(clips, "audio", steps["audio"], "right"),
        "vision": padded(clips, "visual", steps["visual"], "right"),
        "annotations": ["Neutral"] * len(clips),
        "classification_labels": np.zeros(len(clips)),
        "regression_labels": np.asarray(labels, np.float32),
    }


def mult_split(clips: Sequence[Clip], labels: np.ndarray, steps: Mapping[str, int]) -> dict:
    """A split of MulT's pickles: left-padded; labels as given, `[N, 1, 1]` or `[N, 4, 2]`; no ids."""
    features = {PICKLE_KEYS[m]: padded(clips, m, steps[m], "left") for m in MODALITIES}
    return {**features, "labels": labels}


def write_mfn(folder: Path, name: str, features: Mapping[str, np.ndarray], labels: np.ndarray, key: str = "d1") -> None:
    """`{text,audio,video}_<split>[_emb].h5` and `y_<split>.h5`, one float64 data set each."""
    for modality, x in features.items():
        suffix = "_emb" if modality == "language" else ""
        with h5py.File(folder / f"{MFN_PREFIXES[modality]}_{name}{suffix}.h5", "w") as file:
            file[key] = x.astype(np.float64)
    with h5py.File(folder / f"y_{name}.h5", "w") as file:
        file[key] = labels.astype(np.float64)


def write_csd(
    path: Path, root: str, entries: Mapping[str, tuple[np.ndarray, np.ndarray]], metadata: Mapping[str, object] = {}
) -> Path:
    """`/<root>/data/<key>/{features, intervals}` and `/<root>/metadata/<key>`, one JSON string each."""
    with h5py.File(path, "w") as file:
        data = file.create_group(f"{root}/data")
        for key, (features, intervals) in entries.items():
            group = data.create_group(key)
            group["features"], group["intervals"] = features, np.asarray(intervals, np.float64)
        about = file.create_group(f"{root}/metadata")
        for key, value in {"root name": root, **metadata}.items():
            about.create_dataset(key, (1,), dtype=h5py.string_dtype())[0] = json.dumps(value)
    return path
