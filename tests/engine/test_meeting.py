"""Processes that meet, agree and end together: by threads that share a store, where the real ones have hosts."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from fastmmkd.engine import meeting
from fastmmkd.engine.meeting import Meeting, differing, is_lost, losses_named, meet, require_alike
from fastmmkd.errors import Lost, UserError

HOST = socket.gethostname()


def together(act: Callable[[Meeting], Any], size: int = 3, timeout: float = 10.0) -> list[Any]:
    """What each of some processes gets of `act`; an error in place of a result."""
    store = dist.HashStore()

    def process(rank: int) -> Any:
        try:
            return act(Meeting(store, rank, size, timeout))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(process, range(size)))


def refusing(of_ranks: dict[int, Exception]) -> Callable[[Meeting], str]:
    def act(of: Meeting) -> str:
        with of.all_or_none():
            if of.rank in of_ranks:
                raise of_ranks[of.rank]
        return "went on"

    return act


def test_facts_come_in_the_order_of_ranks() -> None:
    def act(of: Meeting) -> list[Any]:
        return [of.hosts, of.exchange({"rank": of.rank}), of.exchange(None)]

    assert together(act) == [[[HOST] * 3, [{"rank": 0}, {"rank": 1}, {"rank": 2}], [None] * 3]] * 3


def test_all_go_on_or_none_does() -> None:
    assert together(refusing({})) == ["went on"] * 3
    ends = together(refusing({1: UserError("no such file"), 2: FileNotFoundError(2, "gone", "a.h5")}))
    assert all(isinstance(end, UserError) for end in ends)
    assert {str(end) for end in ends} == {f"{HOST}, rank 1: no such file\n{HOST}, rank 2: a.h5: gone"}


def test_what_the_first_says_is_not_repeated() -> None:
    same = UserError("config.json: unknown key")
    assert str(together(refusing({0: same, 1: same, 2: UserError("another")}))[2]) == (
        f"config.json: unknown key\n{HOST}, rank 2: another"
    )


def test_a_process_that_breaks_leaves_word() -> None:
    ends = together(refusing({1: ZeroDivisionError()}))
    assert isinstance(ends[1], ZeroDivisionError)
    assert str(ends[0]) == str(ends[2]) == f"{HOST}, rank 1: ended by ZeroDivisionError"


def test_an_error_is_said_once() -> None:
    def act(of: Meeting) -> str | None:
        return of.prefix("the same" if of.rank < 2 else "its own")

    assert together(act) == ["", None, f"{HOST}, rank 2: "]


def test_who_does_not_come_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(meeting, "NOTE_S", 0.0)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1234")
    with pytest.raises(UserError) as caught:
        Meeting(dist.HashStore(), 0, 3, 0.3)
    said = "1 of 3 processes met at 10.0.0.1:1234 within 0.3 s (train.timeout_seconds); not there: rank 1, rank 2"
    assert str(caught.value) == said
    assert capsys.readouterr().err == "waiting for rank 1, rank 2\n"

    def act(of: Meeting) -> None:
        if of.rank < 2:
            of.exchange("here")

    first, _, gone = together(act, timeout=0.5)
    assert str(first).endswith(f"; not there: rank 2 on {HOST}")
    assert gone is None


def test_a_first_process_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(dist.HashStore):
        def check(self, *arguments: Any) -> bool:
            raise dist.DistNetworkError("Connection reset by peer")

    with pytest.raises(Lost, match="the first process, which the others meet at, has ended"):
        Meeting(Broken(), 1, 2, 1.0)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "MASTER_PORT"])
def test_where_to_meet_is_said(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for variable in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)
    if name == "MASTER_PORT":
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UserError, match=r"^WORLD_SIZE is 2; expected MASTER_ADDR and MASTER_PORT besides$"):
            meet(1.0)
    else:
        meet(1.0)
        assert meeting.met() is None


def test_a_port_that_is_taken_and_a_first_process_that_is_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("RANK", "0")
        with pytest.raises(UserError, match=rf"^port {port} is in use; expected a free one"):
            meet(1.0)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match=rf"^no first process at 127\.0\.0\.1:{port} within 1 s "):
        meet(1.0)
    assert meeting.met() is None


def test_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"precision": "fp32", "FASTMMKD_ISA": None}
    everyone: list[Any] = [["a", facts], ["b", facts]]
    monkeypatch.setattr(meeting, "exchange", lambda fact: everyone)
    assert require_alike(facts) == ["a", "b"]
    everyone[1] = ["b", facts | {"FASTMMKD_ISA": "avx2"}]
    with pytest.raises(UserError, match=r"^b, rank 1: FASTMMKD_ISA is avx2, on a, rank 0, it is not set$"):
        require_alike(facts)


def test_what_may_differ_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    everyone = [["a", "1"], ["b", None], ["b", None]]
    monkeypatch.setattr(meeting, "exchange", lambda fact: everyone)
    assert (differing("OMP_NUM_THREADS", "1") or "").startswith("OMP_NUM_THREADS differs: 1 on a, not set on b (")
    everyone[:] = [["a", "1"], ["b", "1"]]
    assert differing("OMP_NUM_THREADS", "1") is None


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            "[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.77.0.2]:35512",
            "another process has ended, at 10.77.0.2; what it says tells why",
        ),
        (
            "[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 20000ms for recv operation to complete",
            "another process has not answered within 20 s (train.timeout_seconds): its host or a link is down",
        ),
    ],
)
def test_losses_are_one_line_and_a_page_in_the_log(
    said: str, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Lost) as caught, losses_named(20, tmp_path / "log"):
        raise RuntimeError(said)
    assert str(caught.value) == told
    assert said in (tmp_path / "log").read_text()


def test_other_errors_stay_what_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="shapes"), losses_named(20, tmp_path / "log"):
        raise RuntimeError("shapes do not match")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not is_lost(RuntimeError("Connection closed by peer"))
    assert os.environ["WORLD_SIZE"] == "1"
