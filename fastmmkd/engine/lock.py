"""A run's folder belongs to one training at a time."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO

from fastmmkd.errors import CannotWrite, UserError
from fastmmkd.run_folder import LOCK_FILE


class RunLock:
    """`flock` on `run.lock`, which names its holder: process, host and when it began.

    The kernel lets go of it with the process, however that ends; the file stays, and means nothing by itself. Of a run
    of several processes the first holds it for all.

    On NFS the Linux client makes of it a lock at the server, which holds between hosts (the server lets go of a dead
    client's when its lease is over); mounted with `nolock` or `local_lock` it holds between processes of one host only.
    Where the file system has no locks at all `take` says so, and it is up to the user to start a run once.
    """

    def __init__(self, run: Path) -> None:
        self.run = run
        self._file: IO[bytes] | None = None

    def take(self) -> str | None:
        """Hold it until `release`, or until this process ends: what is to be said, or None.

        Raises:
            UserError: another process holds it.
        CannotWrite: there can be no such file.
        """
        path = self.run / LOCK_FILE
        try:
            self._file = path.open("ab+", buffering=0)
        except OSError as error:
            raise CannotWrite(f"{path}: cannot write this file ({error.strerror})") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                holder = self._holder()
                self.release()
                raise UserError(f"{self.run}: {holder} trains here; expected it to end, or another folder") from None
            return f"{path}: no lock on this file system ({error.strerror}): start one training alone in this folder"
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        said = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started})
        with suppress(OSError):  # it is held all the same
            self._file.truncate(0)
            self._file.write(f"{said}\n".encode())
        return None

    def _holder(self) -> str:
        assert self._file
        try:
            self._file.seek(0)
            said = json.loads(self._file.read())
            return f"process {said['pid']} on {said['host']}, since {said['started']},"
        except (OSError, ValueError, KeyError, TypeError):  # it is just being written
            return "another process"

    def release(self) -> None:
        """Let go of it, where it is held."""
        if self._file:
            self._file.close()
            self._file = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def refuse_busy(run: Path) -> None:
    """Refuse a folder that another process trains in, before anything is loaded.

    Raises:
        UserError: as `RunLock.take`.
    """
    if (run / LOCK_FILE).exists():
        with RunLock(run) as lock:
            lock.take()
