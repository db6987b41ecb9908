"""Two hosts on one machine: each with a network, processes, mounts and a name of its own, a cable between them.

They are made of Linux namespaces, which needs root: a process that sleeps holds each, and with it all of it ends. The
file system is this machine's, but for what is bound over it; `/etc/hosts` is as Debian's installer writes it, the own
name at 127.0.1.1. `sshd` listens on each.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

NAMES, NETWORK = ("alpha", "beta"), "10.77.0"
CABLE = "eth0"
HOLD = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"),
)
"""New namespaces, which end with whoever made them."""
BIN = Path(sys.executable).parent

Words = Sequence[str | Path]


def reason_against(ssh: bool = False) -> str | None:
    """Why there can be no such hosts here, or none that `ssh` and `pdsh` reach; None where there can."""
    tools = ("setpriv", "unshare", "nsenter", "ip", *(("ssh", "sshd", "pdsh") if ssh else ()))
    lacking = [tool for tool in tools if not which(tool)]
    if lacking:
        return f"{', '.join(lacking)} missing (Debian: iproute2, util-linux, openssh-server, pdsh)"
    cable = ["ip", "link", "add", "name", "end_a", "type", "veth", "peer", "name", "end_b"]
    tried = subprocess.run([*HOLD, *cable], capture_output=True)
    if tried.returncode:
        return f"no namespaces for this user: {tried.stderr.decode(errors='replace').strip().splitlines()[-1:]}"
    return None


def which(tool: str) -> str | None:
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


class Host:
    """One of them; `run` and `start` do as `subprocess` does, in it."""

    def __init__(self, name: str, address: str, init: int, folder: Path) -> None:
        self.name, self.address, self.init, self.folder = name, address, init, folder

    def start(self, command: Words, variables: Mapping[str, str] | None = None, **how: object) -> subprocess.Popen[str]:
        """A process in a group of its own, in the common folder; its output is kept in files that `output` reads."""
        kept = {
            name: value for name, value in os.environ.items() if name in ("PATH", "HOME", "LANG", "USER", "LOGNAME")
        }
        path = f"{self.folder / 'bin'}:{BIN}:{kept.get('PATH', '')}:/usr/sbin:/sbin"
        words = [
            "nsenter",
            "-t",
            str(self.init),
            "-m",
            "-u",
            "-n",
            "-p",
            "--wd=" + str(self.folder),
            *map(str, command),
        ]
        return subprocess.Popen(
            words,
            env=kept | {"PATH": path} | dict(variables or {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str | Path) -> str:
        """A short command that must succeed: what it prints."""
        process = self.start(command)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, f"{self.name}: {' '.join(map(str, command))}: {err}"
        return out

    def bind(self, source: Path, target: Path) -> None:
        """From now on this host sees `source` where the other one sees `target`."""
        self.run("mount", "--bind", source, target)

    def unbind(self, target: Path) -> None:
        self.run("umount", target)

    def cable(self, state: str) -> None:
        """Plug the cable in (`"up"`) or out (`"down"`)."""
        self.run("ip", "link", "set", CABLE, state)

    def sent(self) -> int:
        """Bytes that have left by the cable."""
        return int(self.run("cat", f"/sys/class/net/{CABLE}/statistics/tx_bytes"))


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """The hosts; `folder` is what they work in, and holds their keys and lists of names.

    All of it is gone with the block, whatever happens in it.
    """
    (folder / "bin").mkdir(parents=True)
    with ExitStack() as stack:
        inits = [_held(stack) for _ in NAMES]
        hosts = [
            Host(name, f"{NETWORK}.{i}", init, folder)
            for i, (name, init) in enumerate(zip(NAMES, inits, strict=True), 1)
        ]
        _connect(hosts)
        for host, other in zip(hosts, hosts[::-1], strict=True):
            host.run("hostname", host.name)
            names = folder / f"hosts.{host.name}"
            names.write_text(f"127.0.0.1 localhost\n127.0.1.1 {host.name}\n{other.address} {other.name}\n")
            host.bind(names, Path("/etc/hosts"))
        if which("sshd"):
            _serve(hosts, folder)
        yield hosts[0], hosts[1]


def _held(stack: ExitStack) -> int:
    """The first process of new namespaces; with it they go."""
    holder = subprocess.Popen([*HOLD, "sleep", "infinity"], stderr=subprocess.DEVNULL, start_new_session=True)

    stack.callback(holder.wait)
    stack.callback(holder.kill)
    children, deadline = Path(f"/proc/{holder.pid}/task/{holder.pid}/children"), time.monotonic() + 10
    while not (said := children.read_text().split()):
        assert holder.poll() is None, "no namespaces"
        assert time.monotonic() < deadline, "no namespaces"
        time.sleep(0.02)
    init = int(said[0])
    stack.callback(holder.wait)
    stack.callback(os.kill, init, signal.SIGKILL)  # with it all processes in there, and the holder
    while Path(f"/proc/{init}/comm").read_text().strip() != "sleep":  # mounts are in order by then
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return init


def _connect(hosts: Sequence[Host]) -> None:
    ends = [f"fmk{host.init % 10**6}" for host in hosts]
    ip = which("ip") or "ip"
    subprocess.run([ip, "link", "add", "name", ends[0], "type", "veth", "peer", "name", ends[1]], check=True)
    for host, end in zip(hosts, ends, strict=True):
        subprocess.run([ip, "link", "set", end, "netns", str(host.init), "name", CABLE], check=True)
        host.run("ip", "link", "set", "lo", "up")
        host.run("ip", "address", "add", f"{host.address}/24", "dev", CABLE)
        host.cable("up")


def _serve(hosts: Sequence[Host], folder: Path) -> None:
    """`sshd` on each host, and an `ssh` that knows their keys before any other in the path."""
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / f"{name}_key"], check=True)
    (folder / "known").write_text(
        "".join(f"{host.name},{host.address} {(folder / 'host_key.pub').read_text()}" for host in hosts)
    )
    (folder / "ssh_config").write_text(
        f"IdentityFile {folder / 'user_key'}\nUserKnownHostsFile {folder / 'known'}\nGlobalKnownHostsFile /dev/null\n"
        "BatchMode yes\nLogLevel ERROR\nControlMaster no\n"
    )
    (folder / "sshd_config").write_text(
        f"HostKey {folder / 'host_key'}\nAuthorizedKeysFile {folder / 'user_key.pub'}\nStrictModes no\nUsePAM no\n"
        "PermitRootLogin yes\nPasswordAuthentication no\nPidFile none\n"
    )
    wrapper = folder / "bin" / "ssh"
    wrapper.write_text(f'#!/bin/sh\nexec {which("ssh")} -F {folder / "ssh_config"} "$@"\n')
    wrapper.chmod(0o755)
    for host in hosts:
        host.run("mount", "-t", "tmpfs", "tmpfs", "/run")
        host.run("mkdir", "/run/sshd")
        host.run(which("sshd") or "sshd", "-f", folder / "sshd_config")


def interrupt(process: subprocess.Popen[str], number: int = signal.SIGINT) -> None:
    """A signal to a process and all that it has started, as a terminal sends it."""
    os.killpg(process.pid, number)
