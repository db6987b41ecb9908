"""The files of a CMU-MultimodalSDK folder: which computational sequence is which, and the folds."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np

from fastmmkd.data.store import SPLITS
from fastmmkd.errors import UserError

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

    @property
    def videos(self) -> list[str]:
        return list(self.keys)

    @cached_property
    def cut(self) -> bool:
        """Whether the keys are `video[k]`: found once, as every segment asks and there are thousands of keys."""
        return any(_SEGMENT_KEY.match(key) for keys in self.keys.values() for key in keys)

    @property
    def dataset_name(self) -> str:
        return metadata(self.root).get("dataset name", "")

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
        """The rows under one key.

        Raises:
            UserError: features or intervals are missing or unreadable, or do not fit together or the stream's width.
        """
        try:
            entry = self.root["data"][key]
            features, intervals = np.asarray(entry["features"]), np.asarray(entry["intervals"], np.float64)
        except (KeyError, OSError, ValueError) as error:
            raise UserError(f"{self.path}: {key} cannot be read ({error})") from error
        features = features.reshape(len(features), _width(features))
        if features.shape[1] != self.width or intervals.shape != (len(features), 2):
            raise UserError(
                f"{self.path}: {key} has features {list(features.shape)} and intervals {list(intervals.shape)}, "
                f"expected [n, {self.width}] and [n, 2]"
            )
        return Rows(features, intervals[:, 0], intervals[:, 1])


@contextmanager
def open_streams(folder: Path) -> Iterator[dict[str, Stream]]:
    """Role (`language`, `audio`, `visual`, `labels`, and `words` where there is one) -> open stream.

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
                streams[role] = stream
        if missing := [text for role, text in REQUIRED.items() if role not in streams]:
            names = ", ".join(path.name for path in files) or "no .csd files"
            raise UserError(f"{folder}: no {' and no '.join(missing)}; found {names}")
        yield streams


def metadata(root: h5py.Group) -> dict[str, str]:
    """The metadata of a computational sequence as text; each entry is one JSON string, or bare text in old files."""
    entries = {}
    for key, value in root.get("metadata", {}).items():
        raw = np.asarray(value[()]).reshape(-1)
        text = raw[0] if len(raw) else ""
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text)
        with suppress(ValueError):
            text = str(json.loads(text))
        entries[key] = text
    return entries


def read_folds(folder: Path) -> dict[str, str]:
    """Video -> split, from `splits.json` or the SDK's `*_std_folds.py` (read as data, not run).

    Raises:
        UserError: neither is there, it lacks a split, or a video is in two splits.
    """
    path = folder / "splits.json"
    if path.is_file():
        lists = _json_folds(path)
    elif scripts := sorted(folder.glob("*_std_folds.py")):
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


def _json_folds(path: Path) -> dict[str, Any]:
    try:
        lists = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error}), expected {FOLDS_EXAMPLE}") from error
    if not isinstance(lists, dict):
        raise UserError(f"{path}: holds a {type(lists).__name__}, expected {FOLDS_EXAMPLE}")
    return lists


def _sdk_folds(path: Path) -> dict[str, Any]:
    """`standard_train_fold = [...]` and its siblings, as literals."""
    lists: dict[str, Any] = {}
    try:
        for node in ast.parse(path.read_text("utf-8")).body:
            name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else ""
            if isinstance(node, ast.Assign) and (match := _SDK_FOLD.match(name)):
                lists[match[1]] = ast.literal_eval(node.value)
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{path}: not a list of folds ({error}), expected standard_train_fold = [...]") from error
    return lists


def _open(stack: ExitStack, path: Path) -> Stream:
    try:
        file = stack.enter_context(h5py.File(path, "r"))
    except OSError as error:
        raise UserError(f"{path}: not a readable HDF5 file ({error})") from error
    roots = [group for group in file.values() if isinstance(group, h5py.Group) and "data" in group]
    if len(roots) != 1 or not len(roots[0]["data"]):
        raise UserError(f"{path}: not a computational sequence, expected one group with data, found {', '.join(file)}")
    keys: dict[str, list[tuple[int, str]]] = {}
    for key in roots[0]["data"]:
        match = _SEGMENT_KEY.match(key)
        video, k = (match[1], int(match[2])) if match else (key, 0)
        keys.setdefault(video, []).append((k, key))
    ordered = {video: [key for _, key in sorted(segments)] for video, segments in sorted(keys.items())}
    try:
        width = _width(roots[0]["data"][next(iter(roots[0]["data"]))]["features"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a computational sequence, its entries have no features") from error
    return Stream(path, roots[0], ordered, width)


def _width(features: np.ndarray | h5py.Dataset) -> int:
    return int(np.prod(features.shape[1:]))


def _role(stream: Stream) -> str | None:
    about = metadata(stream.root)
    # The description comes last: it may well mention other streams.
    names = (
        stream.root.name,
        about.get("root name"),
        stream.path.stem,
        about.get("computational sequence description"),
    )
    for name in names:
        plain = re.sub(r"[^a-z0-9]", "", (name or "").lower())
        for role, pattern in ROLE_PATTERNS:
            if pattern.search(plain):
                return None if role == "phones" else role
    return ROLE_WIDTHS.get(stream.width)
