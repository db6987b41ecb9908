"""Which video a sample is cut from, as far as ids say."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

_NUMBER = r"-?\d+(?:\.\d*)?(?:[eE][+-]?\d+)?"
_SEGMENTS = (
    re.compile(r"(.+?)\$_\$.*"),
    re.compile(r"(.+)\[\d+\]"),
    re.compile(rf"(.+)_{_NUMBER}_{_NUMBER}"),
    re.compile(r"(.+)_[FM]\d{3}"),
    re.compile(r"(.+)_\d+"),
)
"""Video and segment: MMSA's `video$_$clip`, the SDK's `video[k]`, `video_start_end`, IEMOCAP's `dialogue_F000`,
`video_clip`. What a set's ids are is said by all of them: a video's name may well end in a number."""
_CERTAIN = _SEGMENTS[:2]
"""Those that no name of a video looks like."""
_REPEATED = re.compile(r"#\d+$")
"""What the import appends to an id that occurs again."""
EXAMPLES = "video$_$clip, video[k], video_start_end or video_clip"


def videos_of(ids: Iterable[str]) -> list[str] | None:
    """The video of every id, by the first spelling that all of them follow; None where there is no such spelling."""
    plain = [_REPEATED.sub("", sample) for sample in ids]
    for spelling in _SEGMENTS:
        matches = [spelling.fullmatch(sample) for sample in plain]
        if all(matches):
            return [match[1] for match in matches if match]
    return None


def shared_videos(ids_of_splits: Mapping[str, Sequence[str]]) -> int:
    """How many videos have samples in several splits.

    Where not all ids follow one spelling, those that can be nothing else count.
    """
    everywhere = [sample for ids in ids_of_splits.values() for sample in ids]
    videos = iter(videos_of(everywhere) or map(_certain_video, everywhere))
    groups = [{next(videos) for _ in ids} - {None} for ids in ids_of_splits.values()]
    return sum(sum(video in group for group in groups) > 1 for video in set().union(*groups))


def _certain_video(sample: str) -> str | None:
    matches = (spelling.fullmatch(_REPEATED.sub("", sample)) for spelling in _CERTAIN)
    return next((match[1] for match in matches if match), None)
