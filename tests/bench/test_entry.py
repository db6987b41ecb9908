"""How the benchmarks end."""

from __future__ import annotations

import signal

import pytest

from bench import entry
from fastmmkd.errors import UserError


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UserError("--op x: no such operation"), 2, "error: --op x: no such operation\n"),
        (entry.Failed("ours, frames 8: off by 1"), 1, "error: ours, frames 8: off by 1\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_errors_are_one_line_and_an_exit_code(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def main() -> int:
        raise error

    with pytest.raises(SystemExit) as ended:
        entry.run(main)
    assert ended.value.code == code
    assert capsys.readouterr().err == said


def test_arguments_that_nobody_knows_are_one_line() -> None:
    with pytest.raises(UserError, match="unrecognized arguments: --fast; --help lists the arguments"):
        entry.Parser(prog="x").parse_args(["--fast"])


def test_a_kill_is_an_interruption_while_something_is_measured() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), entry.stopping():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
