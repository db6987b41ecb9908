"""The files of a CMU-MultimodalSDK folder: which computational sequence is which, and the folds."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from fastmmkd.data.checked_hdf5 import in_one_line, member, refuse_elsewhere, values
from fastmmkd.data.store import SPLITS
from fastmmkd.errors import UserError
from fastmmkd.files import read_json

# In order of precedence: "Opinion Segment Labels" must not be read as anything else. "COAVAREP" is how MOSEI spells it.
ROLE_PATTERNS = (
    ("labels", re.compile(r"label|opinion")),
    ("phones", re.compile(r"phone")),
    ("language", re.compile(r"glove|wordvector")),
    ("words", re.compile(r"words")),
    ("audio", re.compile(r"coa?varep")),
    ("visual", re.compile(r"facet")),
)
ROLE_WIDTHS = {300: "language", 74: "audio", 35: "visual", 36: "visual", 47: "visual"}
"""Feature widths of GloVe, COVAREP and Facet, for files whose names say nothing."""
REQUIRED = {
    "language": "GloVe vectors (such as CMU_MOSI_TimestampedWordVectors.csd)",
    "audio": "COVAREP (such as CMU_MOSI_COVAREP.csd)",
    "visual": "Facet (such as CMU_MOSI_Visual_Facet_42.csd)",
    "labels": "opinion segment labels (such as CMU_MOSI_Opinion_Labels.csd)",
}
FOLDS_EXAMPLE = '{"train": ["video", ...], "valid": [...], "test": [...]}'
_SEGMENT_KEY = re.compile(r"^(.*)\[(\d+)\]$")
_SDK_FOLD = re.compile(r"^standard_(train|valid|test)_fold$")


class Rows(NamedTuple):
    """Rows of a stream: features `[R, d]` (bytes or strings for words), start and stop `[R]` in seconds."""

    features: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def where(self, chosen: np.ndarray) -> Rows:
        return Rows(self.features[chosen], self.start[chosen], self.stop[chosen])


@dataclass
class Stream:
    """One computational sequence, keyed by `video` or, when it was cut before, by `video[k]`."""

    path: Path
    root: h5py.Group
    keys: dict[str, list[str]]
    """Video -> its keys, in the order of k."""
    width: int
    """d of its features; 1 for words."""
    role: str = ""
    """One of those of `ROLE_PATTERNS`, once it is known."""
    untimed: dict[str, int] = field(default_factory=dict)
    """Key -> its rows that were left out, since they begin or end at no finite time."""

    @property
    def videos(self) -> list[str]:
        return list(self.keys)

    @cached_property
    def cut(self) -> bool:
        """Whether the keys are `video[k]`: found once, as every segment asks and there are thousands of keys."""
        return any(_SEGMENT_KEY.match(key) for keys in self.keys.values() for key in keys)

    @property
    def dataset_name(self) -> str:
        with in_one_line(self.path):
            return about(self.root, "dataset name")

    def has(self, key: str) -> bool:
        return key in self.root["data"]

    def video_rows(self, video: str) -> Rows | None:
        """All rows of a video in the order of their start times; None if the stream lacks it."""
        parts = [self.rows(key) for key in self.keys.get(video, [])]
        if not parts:
            return None
        rows = Rows(*(np.concatenate(column) for column in zip(*parts, strict=True)))
        return rows.where(np.argsort(rows.start, kind="stable"))

    def rows(self, key: str) -> Rows:
        """The rows under one key that have finite times.

        Raises:
            UserError: features or intervals are missing, no arrays of this file or unreadable, are not numbers (words
                are text), or do not fit together or the stream's width; a label without a finite time.
        """
        with in_one_line(self.path):
            features = values(self.root, f"data/{key}/features")
            intervals = values(self.root, f"data/{key}/intervals")
        if intervals.dtype.kind not in "iuf":
            raise UserError(f"{self.path}: {key} has intervals of {intervals.dtype}, expected seconds")
        features, intervals = features.reshape(len(features), _width(features)), intervals.astype(np.float64)
        if features.shape[1] != self.width or intervals.shape != (len(features), 2):
            raise UserError(
                f"{self.path}: {key} has features {list(features.shape)} and intervals {list(intervals.shape)}, "
                f"expected [n, {self.width}] and [n, 2]"
            )
        if features.dtype.kind not in "iuf" and self.role != "words":
            raise UserError(f"{self.path}: {key} has features of {features.dtype}, expected numbers")
        rows, timed = Rows(features, intervals[:, 0], intervals[:, 1]), np.isfinite(intervals).all(axis=1)
        if timed.all():
            return rows
        if self.role == "labels":
            i = int(np.argmin(timed))
            raise UserError(f"{self.path}: {key} has the interval {intervals[i].tolist()}, expected finite seconds")
        self.untimed[key] = int((~timed).sum())
        return rows.where(timed)


@contextmanager
def open_streams(folder: Path, labelled: bool = True) -> Iterator[dict[str, Stream]]:
    """Role (`language`, `audio`, `visual`, `labels`, and `words` where there is one) -> open stream.

    Args:
        folder: of the `.csd` files.
        labelled: False: there need be no labels.

    A file's role is read off its root name, its file name, its description or, last, the width of its features; other
    files are ignored.

    Raises:
        UserError: a file is not a computational sequence, a role is missing, or two files claim the same one.
    """
    with ExitStack() as stack:
        streams: dict[str, Stream] = {}
        files = sorted(folder.glob("*.csd"))
        for path in files:
            stream = _open(stack, path)
            role = _role(stream)
            if role in streams:
                raise UserError(
                    f"{folder}: both {streams[role].path.name} and {path.name} are {role}; remove one of them"
                )
            if role is not None:
                stream.role = role
                streams[role] = stream
        required = {role: text for role, text in REQUIRED.items() if labelled or role != "labels"}
        if missing := [text for role, text in required.items() if role not in streams]:
            names = ", ".join(path.name for path in files) or "no .csd files"
            raise UserError(f"{folder}: no {' and no '.join(missing)}; found {names}")
        yield streams


def about(root: h5py.Group, key: str) -> str:
    """An entry of a computational sequence's metadata: a JSON string, or bare text in old files; empty if it lacks.

    Raises:
        UserError: it is a link to another place, or not all there.
    """
    if not isinstance(root.get("metadata"), h5py.Group) or key not in root["metadata"]:
        return ""
    entry = member(root, f"metadata/{key}")
    if not isinstance(entry, h5py.Dataset) or h5py.check_string_dtype(entry.dtype) is None or entry.size != 1:
        return ""
    refuse_elsewhere(root, f"metadata/{key}", entry)
    text = entry.asstr(errors="replace")[()] if entry.shape == () else entry.asstr(errors="replace")[:].reshape(-1)[0]
    with suppress(ValueError, RecursionError):
        text = str(json.loads(text))
    return text


def read_folds(folder: Path) -> dict[str, str]:
    """Video -> split, from `splits.json` or the SDK's `*_std_folds.py` (read as data, not run).

    Raises:
        UserError: neither is there, it lacks a split, or a video is in two splits.
    """
    path = folder / "splits.json"
    scripts = [script for script in sorted(folder.glob("*_std_folds.py")) if script.is_file()]
    if path.is_file():
        lists = read_json(path, f"JSON of the folds, {FOLDS_EXAMPLE}")
        if not isinstance(lists, dict):
            raise UserError(f"{path}: holds a {type(lists).__name__}, expected {FOLDS_EXAMPLE}")
    elif scripts:
        path = scripts[0]
        lists = _sdk_folds(path)
    else:
        raise UserError(f"{path}: no such file, expected the video ids of the folds as {FOLDS_EXAMPLE}")
    folds: dict[str, str] = {}
    for name in SPLITS:
        if not isinstance(lists.get(name), list):
            raise UserError(f"{path}: no list for {name!r}, expected {FOLDS_EXAMPLE}")
        for video in lists[name]:
            if folds.setdefault(str(video), name) != name:
                raise UserError(f"{path}: video {video!r} is in {folds[str(video)]} and in {name}")
    return folds


def _sdk_folds(path: Path) -> dict[str, Any]:
    """`standard_train_fold = [...]` and its siblings, as literals."""
    lists: dict[str, Any] = {}
    try:
        for node in ast.parse(path.read_text("utf-8")).body:
            name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
            if isinstance(node, ast.Assign) and (match := _SDK_FOLD.match(name)):
                lists[match[1]] = ast.literal_eval(node.value)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError) as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not a list of folds ({said}), expected standard_train_fold = [...]") from error
    return lists


def _open(stack: ExitStack, path: Path) -> Stream:
    if not path.is_file():
        raise UserError(f"{path}: not a file, expected a computational sequence")
    with in_one_line(path):
        file = stack.enter_context(h5py.File(path, "r"))
        groups = [group for group in (member(file, name) for name in file) if isinstance(group, h5py.Group)]
        roots = [group for group in groups if isinstance(group.get("data", getlink=True), h5py.HardLink)]
        if len(roots) != 1 or not isinstance(data := roots[0]["data"], h5py.Group) or not len(data):
            found = ", ".join(map(ascii, file)) or "nothing"
            raise UserError(f"not a computational sequence, expected one group with data, found {found}")
        keys: dict[str, list[tuple[int, str]]] = {}
        for key in data:
            if not isinstance(key, str):
                raise UserError(f"the key {key!a} is no UTF-8, expected the name of a video")
            match = _SEGMENT_KEY.match(key)
            video, k = (match[1], int(match[2])) if match else (key, 0)
            keys.setdefault(video, []).append((k, key))
        ordered = {video: [key for _, key in sorted(segments)] for video, segments in sorted(keys.items())}
        first = next(iter(data))
        if not isinstance(data.get(first), h5py.Group) or "features" not in data[first]:
            raise UserError("not a computational sequence, its entries have no features")
        features = member(data, f"{first}/features")
        if not isinstance(features, h5py.Dataset) or not features.shape:
            raise UserError(f"not a computational sequence, the features of {first!a} are no array [n, d]")
    return Stream(path, roots[0], ordered, _width(features))


def _width(features: np.ndarray | h5py.Dataset) -> int:
    return int(np.prod(features.shape[1:]))


def _role(stream: Stream) -> str | None:
    for name in _names(stream):
        plain = re.sub(r"[^a-z0-9]", "", name.lower())
        for role, pattern in ROLE_PATTERNS:
            if pattern.search(plain):
                return None if role == "phones" else role
    return ROLE_WIDTHS.get(stream.width)


def _names(stream: Stream) -> Iterator[str]:
    """What may say which role it has, one after the other: metadata are not read where the root's name does."""
    yield stream.root.name
    with in_one_line(stream.path):
        yield about(stream.root, "root name")
        yield stream.path.stem
        # Last: it may well mention other streams.
        yield about(stream.root, "computational sequence description")
