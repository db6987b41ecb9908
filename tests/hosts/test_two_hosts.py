"""Trainings on two hosts made of namespaces (`namespaces.py`), and what becomes of them when something goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.hosts.namespaces import reason_against, two_hosts
from tests.hosts.trials import TRIALS, Lab, needs_ssh

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    if reason := reason_against():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("hosts") / "lab"
    with two_hosts(folder) as hosts:
        yield Lab(hosts, folder)


@pytest.mark.parametrize("name", TRIALS)
def test_trial(name: str, lab: Lab) -> None:
    if needs_ssh(name) and (reason := reason_against(ssh=True)):
        pytest.skip(reason)
    assert TRIALS[name](lab)


def test_hosts_leave_nothing_behind(tmp_path: Path) -> None:
    """Neither processes nor mounts nor interfaces."""
    if reason := reason_against():
        pytest.skip(reason)

    def there() -> tuple[str, list[str]]:
        interfaces = sorted(path.name for path in Path("/sys/class/net").iterdir())
        return Path("/proc/self/mounts").read_text(), interfaces

    before = there()
    with two_hosts(tmp_path / "lab") as (alpha, beta):
        assert (alpha.run("hostname").strip(), beta.run("hostname").strip()) == ("alpha", "beta")
        inits = [host.init for host in (alpha, beta)]
    assert there() == before
    assert not any(Path(f"/proc/{init}").exists() for init in inits)
