"""Files that are either whole or not there, and on the disk once they are."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from fastmmkd.errors import CannotWrite, UserError

TEMPORARY = re.compile(r"\..+\.(\d+)\.tmp")
"""What `replacing` calls a file that is not whole yet; the number is the process's."""


def make_directory(directory: Path) -> Path:
    """Create a folder (and its parents) where it is missing.

    Raises:
        CannotWrite: it cannot be created, or a file lies in its place.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotWrite(f"{directory}: cannot create this folder ({error.strerror})") from error
    return directory


def refuse_unwritable(directory: Path) -> None:
    """Find out whether a folder can be written to, and leave nothing in it.

    Raises:
        CannotWrite: it cannot.
    """
    try:
        with TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise CannotWrite(f"{directory}: cannot write in this folder ({error.strerror})") from error


def refuse_special(path: Path, what: str) -> None:
    """Refuse what is neither a file nor a folder: a pipe is waited for for ever, a device has no end.

    Args:
        what: was expected there.

    Raises:
        UserError: so it is.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise UserError(f"{path}: not a file; expected {what}")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """What goes wrong in the block is that `path` cannot be written.

    Raises:
        CannotWrite: so it did.
    """
    try:
        yield
    except OSError as error:
        raise CannotWrite(f"{path}: cannot write this file ({error.strerror or error})") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it takes the place of `path` when the block ends without an error.

    What was written is on the disk before the old file goes, and the new name is when the block is over.

    Raises:
        CannotWrite: the folder cannot be written to, the path names no file, or something else lies in its place.
    """
    if not path.name:
        raise CannotWrite(f"{path}: cannot write this file (it is a folder)")
    with writing(path):
        special = path.exists() and not path.is_file() and not path.is_dir()
    if special:  # such as /dev/null, which must not be replaced
        raise CannotWrite(f"{path}: cannot write this file (it is a pipe or a device)")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with writing(path):
            yield temporary
            flush(temporary)
            os.replace(temporary, path)
            flush(path.parent)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_stale(paths: Iterable[Path]) -> None:
    """Remove those of some files that `replacing` left half written in processes that were killed.

    Files of this process's id are among them: call it where this process writes nothing there.
    """
    for path in paths:
        owner = TEMPORARY.fullmatch(path.name)
        if owner and (int(owner[1]) == os.getpid() or not _is_alive(int(owner[1]))):
            with suppress(OSError):
                path.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def flush(path: Path) -> None:
    """Wait until a file's contents, or a folder's names, are on the disk.

    Raises:
        OSError: they cannot be written.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's contents, in hexadecimal.

    Raises:
        OSError: it cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text through `replacing`."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file through `replacing`.

    Raises:
        ValueError: a number is NaN or infinite, which JSON does not know.
    """
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: Path, what: str) -> Any:
    """Read a JSON file that should be `what`.

    Raises:
        UserError: it is missing or not JSON.
    """
    try:
        refuse_special(path, what)
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected {what}") from None
    except (ValueError, RecursionError) as error:  # of JSON, UTF-8, or an integer of thousands of digits
        raise UserError(f"{path}: not {what}: {error}") from None
