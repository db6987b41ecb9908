"""A training that is killed at random moments comes to what one does that was left alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.engine.kill_loop import kills
from tests.engine.run_records import assert_same_run

KILLS = 5


@pytest.mark.slow
@pytest.mark.parametrize("method", ["umdf", "corrkd"])
def test_killed_at_random_moments(method, tiny_config, tiny_store, distilled_config_of, tmp_path: Path) -> None:
    raw = tiny_config if method == "umdf" else distilled_config_of(method, tiny_store)
    config = tmp_path / "tiny.json"
    config.write_text(json.dumps(raw))
    killed = 0
    for alone, run, here in kills(config, tmp_path, KILLS, seed=KILLS):
        assert_same_run(alone, run)
        killed += here
    assert killed == KILLS
