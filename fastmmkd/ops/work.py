"""What an operation must move and compute, the units of the formulas that the operations come with.

Bytes are those of inputs and outputs, each moved once. Operations are additions, subtractions, multiplications,
divisions, roots, exponentials and logarithms in the least that an algorithm without stored pairs does; a sum of n terms
counts n, comparisons count nothing.

Shape legend of the formulas: G groups, T queries and K keys of a sample, H heads, R rows, D features, N samples, M rows
of the other side, C classes; e bytes of an element.
"""

from __future__ import annotations

from typing import NamedTuple

FLOAT = 4
"""Bytes of float32, in which statistics, losses and their gradients are."""


class Work(NamedTuple):
    """What an operation must move and compute."""

    bytes: int
    operations: int


def loss_work(groups: int, read: int, written: int, operations: int) -> Work:
    """Of one group: bytes read, float32 elements written besides the loss, and operations."""
    return Work(groups * (read + FLOAT * written + FLOAT), groups * operations)
