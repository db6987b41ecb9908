"""What the commands of this folder share: how they end."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from fastmmkd.errors import UserError


class Failed(Exception):
    """A check of what is measured failed; one line."""


class Parser(argparse.ArgumentParser):
    """Of a command's arguments; what it does not understand is bad input like any other."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; --help lists the arguments")


def run(main: Callable[[], int]) -> NoReturn:
    """End the process with the exit code of `main`.

    Bad input is one line and exit code 2, a failed check one line and exit code 1, Ctrl-C exit code 130.
    """
    try:
        sys.exit(main())
    except (UserError, Failed) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


@contextmanager
def stopping() -> Iterator[None]:
    """Inside the block SIGTERM is Ctrl-C."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
