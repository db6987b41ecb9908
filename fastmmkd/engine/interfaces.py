"""Which network interface the processes of several hosts reach each other by.

Gloo takes the address that the host's own name stands for. On Debian that is 127.0.1.1, where no other host arrives.
"""

from __future__ import annotations

import ipaddress
import os
import socket

import psutil

from fastmmkd.engine.meeting import all_or_none, exchange
from fastmmkd.errors import UserError

VARIABLE = "GLOO_SOCKET_IFNAME"


def choose_interface() -> None:
    """Have gloo use the interface by which this host and the first process reach each other.

    Nothing is chosen where all processes are on one host, or where GLOO_SOCKET_IFNAME names one.

    Raises:
        UserError: no such interface, or none that has the address.
    """
    with all_or_none():
        own = source_address(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    addresses = exchange(own)
    with all_or_none():
        if named := os.environ.get(VARIABLE):
            refuse_unknown(named)
        elif len(set(addresses)) > 1:
            if is_loopback(own):  # the first process's host knows itself by its own name
                own = source_address(next(a for a in addresses if not is_loopback(a)), int(os.environ["MASTER_PORT"]))
            os.environ[VARIABLE] = interface_with(own)


def source_address(address: str, port: int) -> str:
    """This host's address on the way to another; nothing is sent.

    Raises:
        UserError: it has no address, or no way there.
    """
    try:
        family, kind, protocol, _, target = socket.getaddrinfo(address, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise UserError(
            f"MASTER_ADDR: no way to {address} ({error.strerror}); expected a host of this network"
        ) from None


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def interface_with(address: str) -> str:
    """The interface that has an address: `"eth0"`.

    Raises:
        UserError: none has.
    """
    for name, addresses in psutil.net_if_addrs().items():
        if any(address == other.address.partition("%")[0] for other in addresses):
            return name
    raise UserError(f"{VARIABLE}: no interface has {address}, by which the other hosts are reached; expected its name")


def refuse_unknown(named: str) -> None:
    """Refuse GLOO_SOCKET_IFNAME that names an interface which is not there.

    Raises:
        UserError: so it does.
    """
    there = [name for _, name in socket.if_nameindex()]
    for name in named.split(","):
        if name not in there:
            raise UserError(f"{VARIABLE}: {named}: no such interface here; expected one of {', '.join(there)}")
