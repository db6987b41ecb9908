"""Containers that a pickle holds: whether anybody can walk through them."""

from __future__ import annotations

from typing import Any

import numpy as np

DEEPEST = 32
"""Levels of containers within containers."""
ENTRIES_PER_BYTE = 16
"""Entries of containers for each byte of the file: a few lists that hold each other many times unfold into billions."""


class Unfolding(Exception):
    """Containers that hold each other so that nobody could walk through them."""


def refuse_unfolding(content: Any, size: int) -> None:
    """Raises Unfolding where containers hold each other so that nobody could walk through them.

    Args:
        size: of the file, in bytes.
    """
    measured: dict[int, tuple[int, int]] = {}
    """Container -> entries in it and all below, and levels; (0, 0) while it is being measured."""
    waiting = [content]
    while waiting:
        container = waiting[-1]
        if measured.get(id(container), (0, 0)) != (0, 0):
            waiting.pop()
            continue
        inner = [entry for entry in _entries(container) if _is_container(entry)]
        if id(container) not in measured:
            measured[id(container)] = (0, 0)
            unknown = [entry for entry in inner if id(entry) not in measured]
            if any(measured.get(id(entry)) == (0, 0) for entry in inner):
                raise Unfolding("a container holds itself")
            waiting += unknown
            if unknown:
                continue
        if any(measured[id(entry)] == (0, 0) for entry in inner):
            raise Unfolding("a container holds itself")
        below = [measured[id(entry)] for entry in inner]
        entries = len(_entries(container)) + sum(count for count, _ in below)
        levels = 1 + max((depth for _, depth in below), default=0)
        if levels > DEEPEST:
            raise Unfolding(f"it has containers within containers, more than {DEEPEST} levels")
        if entries > ENTRIES_PER_BYTE * size:
            raise Unfolding("its containers hold each other so often that they are far larger than the file")
        measured[id(container)] = entries, levels
        waiting.pop()


def _is_container(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict)) or (isinstance(value, np.ndarray) and value.dtype.kind == "O")


def _entries(container: Any) -> list[Any]:
    if isinstance(container, np.ndarray):
        return container.reshape(-1).tolist() if container.dtype.kind == "O" else []
    if isinstance(container, dict):
        return list(container.values())
    return list(container) if isinstance(container, (list, tuple)) else []
