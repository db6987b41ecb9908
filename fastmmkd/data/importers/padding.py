"""Where the real frames of a padded sequence are.

Shape legend: N samples, T frames. A span is a pair of int64 arrays `[N]`, (start, stop): frames
`start <= t < stop` are real, (0, 0) says that there are none.
"""

from __future__ import annotations

import numpy as np

Span = tuple[np.ndarray, np.ndarray]


def occupied_span(occupied: np.ndarray) -> Span:
    """From the first to the last True of each row of `[N, T]`; (0, 0) for a row without any."""
    steps = occupied.shape[1]
    any_frame = occupied.any(1)
    start = np.where(any_frame, occupied.argmax(1), 0)
    stop = np.where(any_frame, steps - occupied[:, ::-1].argmax(1), 0)
    return start, stop


def given_span(occupied: np.ndarray, lengths: np.ndarray) -> tuple[Span, np.ndarray]:
    """Place sequences of known length: at the end that leaves only zeros outside.

    Args:
        occupied: bool `[N, T]`, True where a frame is not all zero.
        lengths: int `[N]`, what the source says; values outside 0 .. T do not fit.

    Returns:
        The span, and bool `[N]`: True where the length fits neither end, so that the span is the occupied one.
    """
    steps = occupied.shape[1]
    start, stop = occupied_span(occupied)
    at_front, at_end = stop <= lengths, start >= steps - lengths
    fits = (at_front | at_end) & (lengths <= steps) & (lengths >= 0)
    # A sequence that fits both ways is padded on the right, as the sources with lengths are.
    given_start = np.where(at_front, 0, steps - lengths)
    given_stop = np.where(at_front, lengths, steps)
    return (np.where(fits, given_start, start), np.where(fits, given_stop, stop)), ~fits


def union_span(spans: list[Span]) -> Span:
    """The smallest span that covers every non-empty one; frames outside are padding that all modalities share."""
    starts, stops = (np.stack(part) for part in zip(*spans, strict=True))
    empty = stops == starts
    start = np.where(empty, np.iinfo(np.int64).max, starts).min(0)
    stop = np.where(empty, 0, stops).max(0)
    return np.where(stop > 0, start, 0), stop


def inside(span: Span, steps: int) -> np.ndarray:
    """`[N, steps]` bool, True for the real frames."""
    t = np.arange(steps)[None, :]
    return (t >= span[0][:, None]) & (t < span[1][:, None])


def side_counts(span: Span, steps: int) -> dict[str, int]:
    """How many samples were padded on which side: keys `left`, `right`, `both`, `none` (full), `empty`."""
    start, stop = span
    empty = stop == start
    left, right = (start > 0) & ~empty, (stop < steps) & ~empty
    counts = {
        "left": left & ~right,
        "right": right & ~left,
        "both": left & right,
        "none": ~(left | right | empty),
        "empty": empty,
    }
    return {side: int(which.sum()) for side, which in counts.items() if which.any()}
