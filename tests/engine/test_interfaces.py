"""The interface that hosts reach each other by."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import pytest

from fastmmkd.engine import interfaces
from fastmmkd.errors import UserError

LOOPBACK = "lo"
Choose = Callable[..., str | None]


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch) -> Choose:
    """`choose(master, own, addresses, named=None)`: what GLOO_SOCKET_IFNAME is where this host's address on the way to
    each other is `own[other]`, and the processes have found `addresses`."""

    def make(master: str, own: dict[str, str], addresses: list[str], named: str | None = None) -> str | None:
        monkeypatch.setenv("MASTER_ADDR", master)
        monkeypatch.setenv("MASTER_PORT", "29500")
        monkeypatch.setenv(interfaces.VARIABLE, named or "")
        monkeypatch.setattr(interfaces, "source_address", lambda address, port: own[address])
        monkeypatch.setattr(interfaces, "exchange", lambda address: addresses)
        monkeypatch.setattr(interfaces, "interface_with", lambda address: f"of {address}")
        interfaces.choose_interface()
        return os.environ[interfaces.VARIABLE] or None

    return make


def test_one_host_needs_none(choose: Choose) -> None:
    assert choose("127.0.0.1", {"127.0.0.1": "127.0.0.1"}, ["127.0.0.1"] * 2) is None
    assert choose("10.0.0.1", {"10.0.0.1": "10.0.0.1"}, ["10.0.0.1"] * 2) is None


def test_the_way_to_the_first_process(choose: Choose) -> None:
    assert choose("10.0.0.1", {"10.0.0.1": "10.0.0.2"}, ["10.0.0.1", "10.0.0.2"]) == "of 10.0.0.2"


def test_a_first_process_that_knows_itself_by_its_name(choose: Choose) -> None:
    """Debian's 127.0.1.1: it takes the way to another."""
    own = {"alpha": "127.0.0.1", "10.0.0.2": "10.0.0.1"}
    assert choose("alpha", own, ["127.0.0.1", "10.0.0.2"]) == "of 10.0.0.1"


def test_a_name_that_was_given_stays(choose: Choose) -> None:
    own = {"10.0.0.1": "10.0.0.2"}
    assert choose("10.0.0.1", own, ["10.0.0.1", "10.0.0.2"], named=LOOPBACK) == LOOPBACK
    with pytest.raises(UserError, match=r"^GLOO_SOCKET_IFNAME: nothing9: no such interface here; expected one of .*lo"):
        choose("10.0.0.1", own, ["10.0.0.1", "10.0.0.2"], named="nothing9")


def test_addresses_of_this_host() -> None:
    assert interfaces.source_address("127.0.0.1", 80) == "127.0.0.1"
    assert interfaces.interface_with("127.0.0.1") == LOOPBACK
    with pytest.raises(UserError, match=r"^GLOO_SOCKET_IFNAME: no interface has 192\.0\.2\.1, "):
        interfaces.interface_with("192.0.2.1")


def test_no_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_name(*arguments: object, **named: object) -> None:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_name)
    with pytest.raises(
        UserError, match=r"^MASTER_ADDR: no way to gpu07 \(Name or service not known\); expected a host"
    ):
        interfaces.source_address("gpu07", 80)
