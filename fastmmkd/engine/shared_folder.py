"""A run's folder is one for all its processes.

What the first one writes the others read, such as teachers and checkpoints, and under ZeRO each of them writes its part
of a checkpoint there.
"""

from __future__ import annotations

import os
import secrets
import time
from pathlib import Path

from fastmmkd.engine.meeting import all_or_none, exchange, met
from fastmmkd.engine.world import is_first
from fastmmkd.errors import UserError
from fastmmkd.files import make_directory, refuse_unwritable

SEEN_WITHIN_S = 5.0
"""What a network file system may take to show another host's file."""


def share_folder(output: Path) -> None:
    """Make a run's folder, in the first process, and see to it that all of them see and can write it.

    Raises:
        UserError: a process does not see what the first one writes there; its line says which.
        CannotWrite: one cannot write there.
    """
    with all_or_none():
        if is_first():
            make_directory(output)
            refuse_unwritable(output)
    if not (meeting := met()):
        return
    # The name is new, so that no host remembers that there was no such file.
    sign = output / f".shared_{secrets.token_hex(4)}.{os.getpid()}.tmp"
    with all_or_none():
        if is_first():
            sign.touch()
    sign = output / exchange(sign.name)[0]
    try:
        with all_or_none():
            if not _appears(sign):
                raise UserError(
                    f"{output}: rank 0 on {meeting.hosts[0]} has made a file there that is not seen here; expected one "
                    "folder that all hosts share: --out on a file system that they all have"
                )
            refuse_unwritable(output)
    finally:
        if is_first():
            sign.unlink(missing_ok=True)


def _appears(path: Path) -> bool:
    end = time.monotonic() + SEEN_WITHIN_S
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True
