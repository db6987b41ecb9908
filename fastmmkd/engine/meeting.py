"""How the processes of a run meet before they share anything else, and how they end where one of them cannot go on.

They meet at a store in the first process, at MASTER_ADDR:MASTER_PORT (under `torchrun` at its agent's), which needs
neither a device nor a network interface to be chosen: what one process cannot do is known to all of them before any
waits in a collective operation, and hosts that differ are refused before anything is written.

An error is said once. The first process says what all have found; who has found something else says it with its host
and its rank before it.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from threading import Thread
from typing import Any, TypeVar

import torch.distributed as dist

from fastmmkd.engine.world import is_first, number_of_processes
from fastmmkd.errors import Lost, UserError

LOOK_S = 0.05
"""Between two looks at who has come."""
NOTE_S = 15.0
"""After which the first process says whom all wait for."""
UNTIL_SAID_S = 3.0
"""What a process leaves to the others to hear of an error, and to the first one to say it."""

BROKEN = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|timed? ?out|socket (is )?closed|connectfullmesh"
    r"|peer closed|no route|unreachable|remote process exited",
    re.IGNORECASE,
)
"""What collective operations say of other processes that are gone or do not answer."""
TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)


Answer = TypeVar("Answer")


class Meeting:
    """The processes of a run, and what they tell each other before there are collective operations.

    Args:
        store: of all of them.
        rank, size: which process this is, of how many.
        timeout: seconds to wait for the others.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        self.store, self.rank, self.size, self.timeout = store, rank, size, timeout
        self.hosts: list[str | None] = [None] * self.size
        self._round = 0
        self.hosts = self.exchange(socket.gethostname())

    def exchange(self, fact: Any) -> list[Any]:
        """A fact (JSON) of every process, in the order of ranks; each of them asks.

        Raises:
            UserError: somebody does not come within the timeout.
            Lost: the store is gone, and with it the first process.
        """
        return self._answered(lambda: self._exchange(fact), self.timeout + UNTIL_SAID_S)

    def _exchange(self, fact: Any) -> list[Any]:
        self.post(fact)
        facts, started, noted = [], time.monotonic(), False
        for rank in range(self.size):
            while not self._has(self._key(rank), within=0.2):
                waited = time.monotonic() - started
                if waited > self.timeout:
                    raise UserError(self._missing())
                if waited > NOTE_S and self.rank == 0 and not noted:
                    print(f"waiting for {self._named(self._absent())}", file=sys.stderr)
                    noted = True
            facts.append(json.loads(self.store.get(self._key(rank))))
        return facts

    def post(self, fact: Any) -> None:
        """Leave a fact for the others' next `exchange` without waiting for theirs."""
        self._round += 1
        self.store.set(self._key(self.rank), json.dumps(fact))

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """See the function of that name."""
        refusal: str | None = None
        try:
            yield
        except UserError as error:
            refusal = str(error)
        except OSError as error:
            refusal = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        except BaseException as error:
            self.post(f"ended by {type(error).__name__}")
            raise
        verdicts = self.exchange(refusal)
        if any(verdicts):
            raise UserError("\n".join(_lines(verdicts, self.hosts)))

    def prefix(self, error: str) -> str | None:
        """What this process puts before an error of its own; None where the first one says the same."""

        def is_said() -> bool:
            self.store.set(f"error/{self.rank}", error)
            return self.rank > 0 and self._has("error/0", UNTIL_SAID_S) and self.store.get("error/0").decode() == error

        with suppress(Lost):
            if self._answered(is_said, 2 * UNTIL_SAID_S):
                return None
        return f"{self.hosts[self.rank]}, rank {self.rank}: " if self.rank else ""

    def leave(self) -> None:
        """Let the others hear of an error before this process, which may hold the store, ends."""
        end = time.monotonic() + UNTIL_SAID_S

        def wait() -> None:
            self.store.set(f"left/{self.rank}", "")
            for rank in range(self.size if self.rank == 0 else 0):
                self._has(f"left/{rank}", max(0.0, end - time.monotonic()))

        with suppress(Lost):
            self._answered(wait, 2 * UNTIL_SAID_S)

    def _key(self, rank: int) -> str:
        return f"{self._round}/{rank}"

    def _has(self, key: str, within: float) -> bool:
        end = time.monotonic() + within
        while not self.store.check([key]):  # to wait for it would log what it waits for
            if time.monotonic() > end:
                return False
            time.sleep(LOOK_S)
        return True

    def _absent(self) -> list[int]:
        return [rank for rank in range(self.size) if not self.store.check([self._key(rank)])]

    def _named(self, ranks: list[int]) -> str:
        hosts = [f" on {self.hosts[rank]}" if self.hosts[rank] else "" for rank in ranks]
        return ", ".join(f"rank {rank}{host}" for rank, host in zip(ranks, hosts, strict=True))

    def _missing(self) -> str:
        absent = self._absent()
        at = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        return (
            f"{self.size - len(absent)} of {self.size} processes met at {at} within {self.timeout:g} s "
            f"(train.timeout_seconds); not there: {self._named(absent)}"
        )

    def _answered(self, ask: Callable[[], Answer], within: float) -> Answer:
        """What `ask` gets of the store, in a thread: where a link is down a store's socket waits for ever.

        Raises:
            Lost: the store is gone, or does not answer within so many seconds.
        """
        found: list[Answer] = []
        failed: list[BaseException] = []

        def run() -> None:
            try:
                found.append(ask())
            except BaseException as error:
                failed.append(error)

        thread = Thread(target=run, daemon=True, name="meeting")
        thread.start()
        thread.join(within)
        if failed and not isinstance(failed[0], RuntimeError):
            raise failed[0]
        if not found:
            did = "has ended" if failed else f"has not answered within {self.timeout:g} s (train.timeout_seconds)"
            raise Lost(f"the first process, which the others meet at, {did}") from (failed[0] if failed else None)
        return found[0]


_met: Meeting | None = None
"""That of this process; there is one as there is one default group."""


def met() -> Meeting | None:
    """The meeting that this process has joined."""
    return _met


def meet(timeout: float) -> None:
    """Join the other processes; nothing where there are none, or they have met before.

    Args:
        timeout: `train.timeout_seconds`.

    Raises:
        UserError: the first process is not there, its port is taken, or somebody does not come within the timeout.
    """
    global _met
    if _met or number_of_processes() == 1:
        return
    address, port = os.environ.get("MASTER_ADDR", ""), os.environ.get("MASTER_PORT", "")
    if not address or not port.isdigit():
        raise UserError(f"WORLD_SIZE is {number_of_processes()}; expected MASTER_ADDR and MASTER_PORT besides")
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = is_first() and not has_agent
    if not serves:
        _await_server(address, int(port), timeout)
    try:
        store = dist.TCPStore(
            address,
            int(port),
            is_master=serves,
            timeout=timedelta(seconds=timeout),
            wait_for_workers=False,
            multi_tenant=True,  # the default group comes to the same port
        )
    except RuntimeError as error:
        reason = "is in use" if "EADDRINUSE" in str(error) else f"cannot be used ({_first_line(error)})"
        raise UserError(
            f"port {port} {reason}; expected a free one, MASTER_PORT (deepspeed and torchrun: --master_port)"
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    kept_apart = dist.PrefixStore(f"fastmmkd/{attempt}", store)
    _met = Meeting(kept_apart, int(os.environ["RANK"]), number_of_processes(), timeout)


def _await_server(address: str, port: int, timeout: float) -> None:
    """Wait until the first process listens; torch would do so too, and log a page where it does not."""
    end, reason = time.monotonic() + timeout, "no answer"
    while (left := end - time.monotonic()) > 0:
        try:
            socket.create_connection((address, port), left).close()
            return
        except OSError as error:
            reason = error.strerror or reason
            time.sleep(LOOK_S)
    raise UserError(
        f"no first process at {address}:{port} within {timeout:g} s (train.timeout_seconds): {reason}; expected it "
        "there, and no firewall between"
    )


def exchange(fact: Any) -> list[Any]:
    """A fact (JSON) of every process, in the order of ranks."""
    return _met.exchange(fact) if _met else [fact]


@contextmanager
def all_or_none() -> Iterator[None]:
    """What one process refuses in the block, all do: nobody goes on where another cannot.

    Raises:
        UserError: in every process the same, with a line of each that has another reason.
    """
    with _met.all_or_none() if _met else nullcontext():
        yield


def _lines(verdicts: list[str | None], hosts: list[str | None]) -> Iterator[str]:
    """The first process's own, and of the others what it does not say already."""
    said: set[str | None] = {None}
    for rank, (verdict, host) in enumerate(zip(verdicts, hosts, strict=True)):
        if verdict not in said:
            yield f"{host}, rank {rank}: {verdict}" if rank else f"{verdict}"
        said.add(verdict)


def require_alike(facts: Mapping[str, Any]) -> list[str]:
    """Hold every process to the same facts; returns the host of each.

    Args:
        facts: what must be the same (JSON), by what it is called.

    Raises:
        UserError: in every process, with the first that differs, what differs and both values.
    """
    everyone = exchange([socket.gethostname(), dict(facts)])
    host_of_first, first = everyone[0]
    for i, (host, own) in enumerate(everyone):
        for name in first:
            if own[name] != first[name]:
                here, there = (_brief(x[name]) for x in (own, first))
                raise UserError(f"{host}, rank {i}: {name} is {here}, on {host_of_first}, rank 0, it is {there}")
    return [host for host, _ in everyone]


def differing(name: str, value: str | None) -> str | None:
    """What to say where an environment variable is not the same everywhere, though it may differ."""
    everyone = exchange([socket.gethostname(), value])
    if len({value for _, value in everyone}) == 1:
        return None
    values = ", ".join(dict.fromkeys(f"{_brief(value)} on {host}" for host, value in everyone))
    return f"{name} differs: {values} (few launchers pass variables on; deepspeed passes those of .deepspeed_env)"


def _brief(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_lost(error: BaseException) -> bool:
    """Whether an error of a collective operation says that another process is gone or does not answer."""
    if not isinstance(error, RuntimeError) or number_of_processes() == 1:
        return False
    return bool(BROKEN.search(str(error)))


@contextmanager
def losses_named(timeout: float, log_file: Path) -> Iterator[None]:
    """Turn what collective operations say of another process that is gone into one line.

    Args:
        timeout: `train.timeout_seconds`.
        log_file: where they are kept as they were.

    Raises:
        Lost: so it is.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_lost(error):
            raise
        with suppress(OSError), log_file.open("a", encoding="utf-8") as log:
            traceback.print_exc(file=log)
        if TIMED_OUT.search(str(error)):
            waited = f"{timeout:g} s (train.timeout_seconds)"
            reason = f"another process has not answered within {waited}: its host or a link is down"
        else:
            peer = re.search(r"\[([0-9a-fA-F.:]+)\]:\d+", str(error))
            reason = f"another process has ended{f', at {peer[1]}' if peer else ''}; what it says tells why"
        raise Lost(reason) from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]
