"""The exceptions that commands turn into one line and an exit code (see `fastmmkd.cli`)."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

LONGEST_SHOWN = 100
"""Characters."""


class UserError(Exception):
    """Bad input from outside: a file, a config key, a shape.

    The message is one line that names the file, key or shape and says what was expected.
    Commands print it without a traceback and exit with code 2 (see `fastmmkd.cli`).
    """


class CannotWrite(UserError):
    """A file or folder that cannot be written: a full disk, one without permission, a folder that is gone."""


class Lost(Exception):
    """Another process of a run is gone, or does not answer; commands exit with code 1.

    The message is one line that says how that showed; what is on the disk is whole, and the run can be resumed.
    """


class Interrupted(Exception):
    """A run was asked to stop (Ctrl-C, SIGTERM), and has saved its state; commands exit with code 130."""


def shown(value: Any) -> str:
    """A value as JSON, for a message: cut off where it is long."""
    text = json.dumps(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."


def first_problem(error: ValidationError) -> str:
    """The first of what pydantic objects to, as one line: `"sweep.0.p: Input should be a valid number"`."""
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    what = first["msg"].removeprefix("Value error, ")
    return f"{where}: {what}" if where else what


def nearest(word: str, choices: Iterable[str]) -> str:
    """`"; did you mean X?"` for the choice nearest to a word, or nothing."""
    match = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {match[0]}?" if match else ""
