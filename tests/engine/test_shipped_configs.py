"""Every shipped config leaves the floor within a fifth of its epochs, on synthetic data a quarter of the real size."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_records import records

from fastmmkd.config import load_config
from fastmmkd.data import store
from fastmmkd.data.synthetic import synthesize
from fastmmkd.engine.phases import phases_of
from fastmmkd.engine.teachers import phases_at_floor
from fastmmkd.methods import METHODS

CONFIGS = [f"{method}_{data}" for method in METHODS for data in ("mosi", "mosei", "iemocap")]
FRACTION, SEED = 0.25, 1


@pytest.fixture(scope="module")
def data_like(tmp_path_factory: pytest.TempPathFactory):
    """`data_like("mosi")`: a quarter of it, written once."""
    folder = tmp_path_factory.mktemp("synthetic")

    def make(name: str) -> Path:
        path = folder / f"{name}.h5"
        if not path.exists():
            store.write(synthesize(name, FRACTION, SEED), path)
        return path

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_phase_leaves_the_floor_within_a_fifth_of_its_epochs(
    name: str, train_tiny, data_like, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As it is shipped, one seed; the warm-up takes as many epochs as on all of the data. A teacher at the floor would
    be refused; so is a student here."""
    shipped = load_config(f"configs/{name}.json")
    changes = [f"data.path={data_like(name.split('_')[1])}", "train.seeds=[1]"]
    changes += [f"train.epochs={shipped.train.epochs // 5}", "eval.sweep=[]"]
    if shipped.teacher and shipped.teacher.epochs:
        changes.append(f"teacher.epochs={shipped.teacher.epochs // 5}")
    if shipped.deepspeed.get("scheduler"):
        warm_up = shipped.deepspeed["scheduler"]["params"]["warmup_num_steps"]
        changes.append(f"deepspeed.scheduler.params.warmup_num_steps={int(FRACTION * warm_up)}")
    config = load_config(f"configs/{name}.json", changes)
    run = train_tiny(config.model_dump(mode="json"), tmp_path / name)
    key = config.train.select or ("mae" if config.task.is_regression else "loss")
    with capsys.disabled():
        for phase in (*(spec.name for spec in phases_of(config)[:-1]), ""):
            reached = ", ".join(f"{record['valid'][key]:.3f}" for record in records(run, phase=phase))
            print(f"\n{name} {phase or 'last phase'}: validation {key} {reached}", end="")
    assert not any(phases_at_floor(config, run / "seed_1").values())
