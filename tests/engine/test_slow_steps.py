"""Steps that take far longer than usual are told of while they do."""

from __future__ import annotations

import time

import pytest

from fastmmkd.engine.slow_steps import SlowSteps

PATIENCE_S = 10.0


def until(lines: list[str], count: int) -> None:
    end = time.monotonic() + PATIENCE_S
    while len(lines) < count:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_step_is_told_of_while_it_goes_on_and_when_it_is_done() -> None:
    lines: list[str] = []
    with SlowSteps(lines.append, timeout=600, least=0.05, first=100) as slow:
        for _ in range(3):
            with slow.watched("this step"):
                pass
        with slow.watched("this step"):
            until(lines, 1)
    assert lines[0].startswith("this step takes 0 s so far, those before took ")
    assert lines[0].endswith("the run ends 600 s (train.timeout_seconds) after its last answer")
    assert lines[1].startswith("this step was done after ")
    assert len(lines) == 2


def test_the_first_step_has_longer_and_steps_as_long_as_those_before_are_not_told_of() -> None:
    lines: list[str] = []
    with SlowSteps(lines.append, timeout=600, least=0.02, first=100) as slow:
        for _ in range(4):
            with slow.watched("this step"):
                time.sleep(0.05)
    assert lines == []
    with SlowSteps(lines.append, timeout=600, least=0.02, first=0.03) as slow, slow.watched("this step"):
        until(lines, 1)
    assert "those before" not in lines[0]


def test_between_steps_nothing_is_waited_for() -> None:
    lines: list[str] = []
    with SlowSteps(lines.append, timeout=600, least=0.02, first=0.03) as slow:
        with slow.watched("this step"):
            pass
        time.sleep(0.2)
    assert lines == []


def test_an_error_ends_the_watch() -> None:
    with pytest.raises(ZeroDivisionError), SlowSteps(print, timeout=600) as slow, slow.watched("this step"):
        raise ZeroDivisionError
    assert not slow._thread.is_alive()


def test_before_the_timeout_it_is_told_in_any_case() -> None:
    lines: list[str] = []
    with SlowSteps(lines.append, timeout=0.1, least=10, first=100) as slow, slow.watched("this checkpoint"):
        until(lines, 1)
    assert lines[0].startswith("this checkpoint takes 0 s so far: another process may be slow")
