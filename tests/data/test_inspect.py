from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from fastmmkd.data import store
from fastmmkd.data.importers.resplit import resplit
from fastmmkd.data.inspect import describe, quality
from fastmmkd.data.store import Dataset, Split
from fastmmkd.modalities import MODALITIES
from tests.handmade import lacking

Make = Callable[..., Dataset]


def hand_made() -> Dataset:
    """Three training samples of four frames: one whole, one without vision and short, one with a zero audio frame."""
    lengths = np.array([[4, 4, 4], [2, 2, 0], [3, 3, 3]], np.int32)
    real = np.arange(4)[None, :] >= 4 - lengths[:, :, None].transpose(1, 0, 2)
    features = {m: np.where(real[i], 1.0, 0.0)[:, :, None] * [1, 2.0] for i, m in enumerate(MODALITIES)}
    features["audio"][2, 2] = 0
    features["language"][0, :, 1] = [-300, 300, -300, 300]
    split = Split.from_padded(
        features={m: x.astype(np.float32) for m, x in features.items()},
        lengths=lengths,
        present=lengths > 0,
        labels=np.array([-2.5, 0.4, 3], np.float32),
        ids=["a", "b", "c"],
    )
    others = {
        name: Split(split.features, lengths, lengths > 0, split.labels, [name + i for i in "abc"])
        for name in ("valid", "test")
    }
    report = {"nonfinite": {"train": {"audio": {"nan": 2, "inf": 3}}}, "length_misfits": {"test": {"visual": 1}}}
    return Dataset({"train": split, **others}, "score", "by hand", "synthetic", report=report)


def test_numbers_of_a_hand_made_set() -> None:
    report = quality(hand_made())
    train = report["splits"]["train"]
    assert train["samples"] == 3
    assert train["present"] == {"language": 3, "audio": 3, "visual": 2}
    assert train["combinations"] == {"lav": 2, "la": 1}
    assert train["lengths"]["language"] == {"min": 2, "q25": 2.5, "median": 3, "q75": 3.5, "max": 4}
    assert train["lengths"]["visual"] == {"min": 3, "q25": 3.25, "median": 3.5, "q75": 3.75, "max": 4}
    assert train["labels"] == {"-3": 0, "-2": 1, "-1": 0, "0": 1, "+1": 0, "+2": 0, "+3": 1}
    assert train["real_frames"] == {"language": 9, "audio": 9, "visual": 7}
    assert train["zero_frames"] == {"language": 0, "audio": 1, "visual": 0}
    assert train["nonfinite"] == {"language": 0, "audio": 5, "visual": 0}
    language = report["modalities"]["language"]
    assert (language["longest"], language["features"], language["constant"]) == (4, 2, [0])
    values = hand_made().splits["train"].features["language"][:, 1]
    assert language["scale"]["largest_std"] == [1, pytest.approx(values.std())]
    assert report["modalities"]["audio"]["constant"] == [0, 1]
    assert report["modalities"]["audio"]["scale"] is None


def test_emotions_are_counted_each(make_dataset: Make) -> None:
    dataset = make_dataset(kind="emotions")
    labels = dataset.splits["valid"].labels
    expected = dict(zip(store.EMOTIONS, labels.sum(0).astype(int).tolist(), strict=True))
    assert quality(dataset)["splits"]["valid"]["labels"] == expected


def test_a_modality_and_a_sample_with_nothing(make_dataset: Make) -> None:
    dataset = make_dataset()
    for name, split in dataset.splits.items():
        dataset.splits[name] = lacking(split, "audio", slice(None))
    for m in ("language", "visual"):
        dataset.splits["train"] = lacking(dataset.splits["train"], m, slice(1))
    report = quality(dataset)
    assert report["splits"]["train"]["lengths"]["audio"] is None
    assert report["splits"]["train"]["combinations"]["none"] >= 1
    assert report["modalities"]["audio"] == {"longest": 0, "features": 4, "constant": [], "scale": None}
    assert "none" in rendered(dataset)


def rendered(dataset: Dataset) -> str:
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(describe(dataset))
    return console.export_text()


def test_the_numbers_are_json(make_dataset: Make, tmp_path: Path) -> None:
    dataset = store.write(make_dataset(), tmp_path / "a.h5")
    assert json.loads(json.dumps(quality(dataset))) == quality(dataset)


def test_the_report_shows_what_a_reader_needs(tmp_path: Path) -> None:
    dataset = store.write(hand_made(), tmp_path / "a.h5")
    text = rendered(dataset)
    assert dataset.content_hash in text
    assert "by hand" in text
    assert "word-aligned" in text
    assert "lav 2, la 1" in text
    assert "11.1 %" in text  # one of nine audio frames
    assert "! audio features without variation in training: 0, 1" in text
    assert "! 1 visual lengths in test contradict the data" in text


def test_the_report_tells_of_a_resplit(make_dataset: Make) -> None:
    text = rendered(resplit(make_dataset(), 7))
    assert "! re-split with seed 7" in text
    assert "! a note" in text
