"""Files of the format's version 1, which held padded sequences, are still read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from fastmmkd.data import store
from fastmmkd.data.store import Dataset
from fastmmkd.errors import UserError
from fastmmkd.modalities import MODALITIES

Make = Callable[..., Dataset]
STEPS = {"language": 5, "audio": 9, "visual": 4}
"""T_m; audio's longest sequence has 7 frames."""


def old_hash(dataset: Dataset) -> str:
    """Of the arrays as they were, padded on the left."""
    digest = hashlib.sha256()
    for name, split in dataset.splits.items():
        arrays = {f"features/{m}": split.padded(m, STEPS[m]) for m in MODALITIES}
        arrays |= {"lengths": split.lengths, "present": split.present.astype(np.uint8), "labels": split.labels}
        for key, x in arrays.items():
            digest.update(f"{name}/{key}{x.shape}".encode() + x.tobytes())
        digest.update(json.dumps(split.ids).encode())
    return digest.hexdigest()


def write_version_1(written: Dataset, path: Path, dtype: str = "float32") -> str:
    """A data set that `store.write` gave back, as version 1 wrote it; returns its content hash."""
    with h5py.File(path, "w") as file:
        file.attrs.update(format="fastmmkd", version=1)
        meta = file.create_group("meta")
        texts = {key: getattr(written, key) for key in ("source", "importer", "label_kind", "label_map")}
        meta.attrs.update(texts, importer_version=1, report=json.dumps(written.report), content_hash=old_hash(written))
        for m, (mean, std) in written.normalisation.items():
            meta[f"normalisation/{m}/mean"], meta[f"normalisation/{m}/std"] = mean, std
        for name, split in written.splits.items():
            group = file.create_group(name)
            for m in MODALITIES:
                x = split.padded(m, STEPS[m]).astype(dtype)
                chunks = (min(len(x), 4), *x.shape[1:])
                group.create_dataset(f"features/{m}", data=x, chunks=chunks, compression="gzip", shuffle=True)
            group["lengths"], group["present"], group["labels"] = split.lengths, split.present, split.labels
            group.create_dataset("ids", data=split.ids, dtype=h5py.string_dtype())
        return meta.attrs["content_hash"]


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("kind", ["score", "emotions"])
def test_read_packed_under_its_own_hash(make_dataset: Make, tmp_path: Path, kind: str, dtype: str) -> None:
    new = store.write(make_dataset(kind=kind), tmp_path / "new.h5", dtype)
    content_hash = write_version_1(new, tmp_path / "old.h5", dtype)
    old = store.read(tmp_path / "old.h5")
    assert old.content_hash == store.read_header(tmp_path / "old.h5").content_hash == content_hash
    for name, split in old.splits.items():
        for m in MODALITIES:
            np.testing.assert_array_equal(split.features[m], new.splits[name].features[m])
            assert split.features[m].dtype == np.float32
        np.testing.assert_array_equal(split.lengths, new.splits[name].lengths)
        assert split.ids == new.splits[name].ids
    np.testing.assert_array_equal(old.normalisation["audio"], new.normalisation["audio"])
    again = store.write(old, tmp_path / "again.h5", dtype)
    assert again.content_hash == new.content_hash != content_hash


def test_the_hash_that_version_1_gave(make_dataset: Make, tmp_path: Path) -> None:
    """Recorded with the code that wrote version 1."""
    dataset = make_dataset()
    for split in dataset.splits.values():
        split.features = {m: np.round(x * 8) / 8 for m, x in split.features.items()}
    assert old_hash(dataset) == "881092a89b41c4eee135b4ea1e6062dd88dd3b28b060d3b37301ef0581a089cc"


def _stray(file: h5py.File) -> None:
    lengths = file["valid/lengths"][:, 1]
    i = int(np.flatnonzero(lengths > 0)[1])
    file["valid/features/audio"][i, STEPS["audio"] - lengths[i] - 1] = 1


def _longer(file: h5py.File) -> None:
    lengths = file["test/lengths"][()]
    lengths[0, 0] = 6
    file["test/lengths"][...] = lengths


def _value(file: h5py.File) -> None:
    file["train/features/language"][0, -1, 0] += 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_stray, r"valid/features/audio\[3, 2\] is not zero, but lies before the last \d frames"),
        (_longer, r"test/features/language has 5 frames, but the length of sample 0 is 6"),
        (_value, r"the contents do not match the stored hash; the file was damaged or edited"),
    ],
)
def test_damage(make_dataset: Make, tmp_path: Path, damage: Callable[[h5py.File], None], message: str) -> None:
    write_version_1(store.write(make_dataset(), tmp_path / "new.h5"), tmp_path / "old.h5")
    with h5py.File(tmp_path / "old.h5", "a") as file:
        damage(file)
    with pytest.raises(UserError, match=rf"old\.h5: {message}.*; import it again$"):
        store.read(tmp_path / "old.h5")
