"""The exceptions that commands turn into one line and an exit code (see `fastmmkd.cli`)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Bad input from outside: a file, a config key, a shape.

    The message is one line that names the file, key or shape and says what was expected.
    Commands print it without a traceback and exit with code 2 (see `fastmmkd.cli`).
    """


class Interrupted(Exception):
    """A run was asked to stop (Ctrl-C, SIGTERM), and has saved its state; commands exit with code 130."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """`"; did you mean X?"` for the choice nearest to a word, or nothing."""
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""
