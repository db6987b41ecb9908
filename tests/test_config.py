"""Configs: the shipped ones are valid, and every mistake is one line that names the key and what was expected."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmmkd.blocks import Config, TrainBlock
from fastmmkd.config import load_config, parse_config, stated_timeout
from fastmmkd.errors import UserError
from fastmmkd.methods import METHODS

CONFIGS = sorted((Path(__file__).parents[1] / "configs").glob("*.json"))
MINIMAL: dict[str, Any] = {
    "method": "umdf",
    "data": {"path": "data/x.h5"},
    "train": {"task": "regression", "batch_size": 8, "epochs": 3},
    "deepspeed": {"optimizer": {"type": "Adam", "params": {"lr": 0.001}}},
}


def changed(key: str, value: Any) -> dict[str, Any]:
    """The minimal config with one value set: `changed("train.epochs", 2)`."""
    raw = copy.deepcopy(MINIMAL)
    node = raw
    *parents, last = key.split(".")
    for parent in parents:
        node = node.setdefault(parent, {})
    node[last] = value
    return raw


def complaint(raw: dict[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        parse_config(raw, "my.json")
    message = str(caught.value)
    assert "\n" not in message
    return message


def written(folder: Path, raw: Any) -> Path:
    path = folder / "my.json"
    path.write_text(json.dumps(raw))
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_config_is_valid_and_shows_every_block(path: Path) -> None:
    config = load_config(path)
    without = set() if config.teacher else {"teacher"}
    assert set(json.loads(path.read_text())) == set(type(config).model_fields) - without
    assert parse_config(config.model_dump(mode="json")) == config


def test_there_are_shipped_configs() -> None:
    data = ("mosi", "mosei", "iemocap", "ict_mmmo", "cmu_mosi")
    assert {"demo.json"} | {f"{method}_{name}.json" for method in METHODS for name in data} <= {
        path.name for path in CONFIGS
    }


EXPECTED = [
    (
        "modle",
        {},
        "modle: unknown key; expected one of method, data, model, missing, loss, train, eval, deepspeed; "
        "did you mean model?",
    ),
    (
        "train.epoch",
        3,
        f"train.epoch: unknown key; expected one of {', '.join(TrainBlock.model_fields)}; did you mean train.epochs?",
    ),
    ("loss.xyz", 3, "loss.xyz: unknown key; expected one of lambda_fea, lambda_logits"),
    ("train.epochs", "2", 'train.epochs: expected an integer, got "2"'),
    ("train.epochs", 2.0, "train.epochs: expected an integer, got 2.0"),
    ("train.epochs", 0, "train.epochs: expected a number greater than 0, got 0"),
    ("train.seeds", 5, "train.seeds: expected a list, got 5"),
    ("train.seeds", [1, "a"], 'train.seeds.1: expected an integer, got "a"'),
    ("train.seeds", [1, 1], "train.seeds: expected at least one seed, all different and from 0 to 2147483647"),
    ("train.seeds", [], "train.seeds: expected at least one seed, all different and from 0 to 2147483647"),
    ("train.seeds", [2**31], "train.seeds: expected at least one seed, all different and from 0 to 2147483647"),
    ("train", 3, "train: expected a block of keys, got 3"),
    ("data.path", None, "data.path: expected a string, got null"),
    ("data.clip", 0, "data.clip: expected a number greater than 0, got 0"),
    (
        "data.standardise",
        False,
        "data.clip: 10.0 is in standard deviations; expected null where standardise is false",
    ),
    ("missing.enabled", "true", 'missing.enabled: expected a boolean, got "true"'),
    ("missing.p_max", 1.5, "missing.p_max: expected a number less than or equal to 1, got 1.5"),
    ("loss.lambda_fea", float("inf"), "loss.lambda_fea: expected a finite number, got Infinity"),
    ("eval.sweep", [0.0, 1.1], "eval.sweep: expected ratios between 0 and 1, at most 1000 of them"),
    ("eval.sweep", [0.5, 0, 0.5], "eval.sweep: expected every ratio once"),
    ("train.device", "gpu", "train.device: expected 'auto', 'cpu' or 'cuda', got \"gpu\""),
    ("model.dropout", 1, "model.dropout: expected a number less than 1, got 1"),
    ("model.dropout", -0.1, "model.dropout: expected a number greater than or equal to 0, got -0.1"),
    ("model.heads", 7, "model.heads: 7 does not divide width 40; expected one of [1, 2, 4, 5, 8, 10, 20, 40]"),
    (
        "train.task",
        "regresion",
        "train.task: 'regresion' is not a task; expected one of regression, regression-sims, classification-2, "
        "classification-3, classification-7, emotions-binary, emotions-4way; did you mean regression?",
    ),
    ("deepspeed", [], "deepspeed: expected a block of keys, got []"),
    ("deepspeed.optimiser", {}, "deepspeed.optimiser: unknown key; did you mean deepspeed.optimizer?"),
    ("deepspeed.optimizer", {}, 'deepspeed.optimizer.type: missing; expected for example "Adam"'),
    ("deepspeed.optimizer.type", "Adamm", "deepspeed.optimizer.type: 'Adamm' is not an optimizer; did you mean Adam?"),
    ("deepspeed.fp16", True, "deepspeed.fp16: expected a block of keys, got true"),
    ("deepspeed.bf16.enabled", "yes", 'deepspeed.bf16.enabled: expected true or false, got "yes"'),
    ("deepspeed.zero_optimization.stage", 3, "deepspeed.zero_optimization.stage: expected 0, 1 or 2, got 3"),
    (
        "deepspeed.fp16.enabled",
        True,
        "deepspeed.zero_optimization.stage: 0 with fp16 divides gradients by a loss scale that it never applied; "
        "expected 1 or 2",
    ),
    (
        "deepspeed.gradient_accumulation_steps",
        2,
        "deepspeed.gradient_accumulation_steps: expected 1, the losses are defined on the whole mini-batch",
    ),
    (
        "deepspeed.checkpoint",
        {"load_universal": True},
        "deepspeed.checkpoint: expected it left out, checkpoints are written and read by fastmmkd",
    ),
    (
        "deepspeed.train_batch_size",
        16,
        "deepspeed.train_batch_size: 16, but train.batch_size is 8; expected one of them",
    ),
    (
        "deepspeed.train_micro_batch_size_per_gpu",
        8,
        "deepspeed.train_micro_batch_size_per_gpu: expected it left out, it is train.batch_size over the number of "
        "processes",
    ),
]


@pytest.mark.parametrize(("key", "value", "message"), EXPECTED, ids=[f"{key}={value}" for key, value, _ in EXPECTED])
def test_a_mistake_is_named_with_what_was_expected(key: str, value: Any, message: str) -> None:
    assert complaint(changed(key, value)) == f"my.json: {message}"


def test_fp16_needs_a_gpu_and_excludes_bf16() -> None:
    raw = changed("deepspeed.zero_optimization.stage", 1)
    raw["deepspeed"]["fp16"] = {"enabled": True}
    assert parse_config(raw).deepspeed["fp16"] == {"enabled": True}
    raw["train"]["device"] = "cpu"  # where it falls back to fp32, as with "auto"
    assert parse_config(raw).deepspeed["fp16"] == {"enabled": True}
    raw["deepspeed"]["bf16"] = {"enabled": True}
    assert complaint(raw) == ("my.json: deepspeed.bf16.enabled: fp16 and bf16 are both on; expected one of them")


@pytest.mark.parametrize("key", ["data", "train", "deepspeed", "train.task", "data.path"])
def test_a_missing_key_is_named(key: str) -> None:
    raw = copy.deepcopy(MINIMAL)
    node = raw
    *parents, last = key.split(".")
    for parent in parents:
        node = node[parent]
    del node[last]
    assert complaint(raw) == f"my.json: {key}: missing"


def test_without_a_method_nothing_else_is_judged() -> None:
    raw = {key: value for key, value in MINIMAL.items() if key != "method"}
    expected = f"my.json: method: missing; expected one of {', '.join(METHODS)}"
    assert complaint(raw) == complaint(raw | {"model": {"heads": 4}}) == expected


def test_a_required_key_that_is_misspelt_is_named_as_it_is_written() -> None:
    raw = copy.deepcopy(MINIMAL)
    raw["train"]["taks"] = raw["train"].pop("task")
    assert complaint(raw).startswith("my.json: train.taks: unknown key; ")
    assert complaint(raw).endswith("did you mean train.task?")


@pytest.mark.parametrize("key", ["scheduler", "fp16", "bf16", "zero_optimization", "gradient_clipping", "zenflow"])
def test_null_leaves_a_part_of_the_deepspeed_block_out(key: str) -> None:
    assert parse_config(changed(f"deepspeed.{key}", None)).deepspeed[key] is None


def test_a_run_needs_an_optimizer() -> None:
    assert complaint(changed("deepspeed.optimizer", None)).startswith("my.json: deepspeed.optimizer: missing; expected")


@pytest.mark.parametrize("kind", ["Adam", "ADAMW", "Lamb", "SGD", "RMSprop"])
def test_optimizers_of_deepspeed_and_torch_are_known(kind: str) -> None:
    assert parse_config(changed("deepspeed.optimizer.type", kind)).deepspeed["optimizer"]["type"] == kind


def test_deepspeed_keys_that_we_do_not_know_pass() -> None:
    """A newer DeepSpeed may have them; only near misses are refused."""
    assert "zenflow" in parse_config(changed("deepspeed.zenflow", {})).deepspeed


class TestFiles:
    def test_a_missing_file_names_its_neighbour(self, tmp_path: Path) -> None:
        (tmp_path / "umdf_mosi.json").write_text("{}")
        path = tmp_path / "umdf_mosii.json"
        with pytest.raises(UserError) as caught:
            load_config(path)
        assert str(caught.value) == f"{path}: no such config file; did you mean umdf_mosi.json?"

    def test_a_missing_folder_is_no_crash(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"no such config file$"):
            load_config(tmp_path / "nowhere" / "my.json")

    def test_a_folder_is_not_a_config(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="cannot read this config file \\(Is a directory\\)"):
            load_config(tmp_path)

    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b'{"method": "umdf",}', "line 1 column 19"),
            (b'{"method": "\xff"}', "utf-8"),
            (b'{"data": {"clip": NaN}}', "NaN is no JSON number"),
            (b"", "line 1 column 1"),
        ],
    )
    def test_what_is_not_json_says_where(self, tmp_path: Path, content: bytes, reason: str) -> None:
        path = tmp_path / "my.json"
        path.write_bytes(content)
        with pytest.raises(UserError, match="not a JSON file") as caught:
            load_config(path)
        assert reason in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_list_is_not_a_config(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match="expected a JSON object with the keys method, data, "):
            load_config(written(tmp_path, [1]))


class TestOverrides:
    @pytest.fixture
    def path(self, tmp_path: Path) -> Path:
        return written(tmp_path, MINIMAL)

    def test_values_are_json_or_plain_strings(self, path: Path) -> None:
        config = load_config(
            path,
            [
                "train.epochs=7",
                "train.seeds=[4, 5]",
                "train.select=mae",
                "data.path=a=b.h5",
                "data.clip=null",
                "model.mcim=false",
                "deepspeed.bf16.enabled=true",
                "eval.sweep=[0, 1]",
            ],
        )
        assert config.train.epochs == 7
        assert config.train.seeds == (4, 5)
        assert config.train.select == "mae"
        assert config.data.path == "a=b.h5"
        assert config.data.clip is None
        assert config.model.mcim is False
        assert config.deepspeed["bf16"] == {"enabled": True}
        assert config.eval.sweep == (0.0, 1.0)

    @pytest.mark.parametrize("override", ["train.epochs", "=3", ""])
    def test_one_without_key_or_value(self, path: Path, override: str) -> None:
        with pytest.raises(UserError) as caught:
            load_config(path, [override])
        assert str(caught.value) == f"--set {override}: expected KEY=VALUE, for example --set train.epochs=2"

    def test_one_that_passes_through_a_value(self, path: Path) -> None:
        with pytest.raises(UserError) as caught:
            load_config(path, ["train.epochs.x=3"])
        assert str(caught.value) == "--set train.epochs.x=3: epochs is not a block of keys"

    def test_a_typo_in_one_names_the_key(self, path: Path) -> None:
        with pytest.raises(UserError, match=r"train\.epoch: unknown key; .*did you mean train\.epochs\?"):
            load_config(path, ["train.epoch=3"])

    def test_nan_is_not_a_number(self, path: Path) -> None:
        with pytest.raises(UserError, match=r'loss\.lambda_fea: expected a number, got "NaN"'):
            load_config(path, ["loss.lambda_fea=NaN"])

    @settings(deadline=None, max_examples=25)
    @given(override=st.text(max_size=20) | st.from_regex(r"(train|data|model|deepspeed)(\.\w{0,8}){0,2}=\S{0,8}"))
    def test_no_override_crashes(self, tmp_path_factory: pytest.TempPathFactory, override: str) -> None:
        path = written(tmp_path_factory.getbasetemp(), MINIMAL)
        try:
            config = load_config(path, [override])
        except UserError:
            return
        assert isinstance(config, Config)

    @settings(deadline=None, max_examples=25)
    @given(
        epochs=st.integers(1, 10**6),
        path=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30),
    )
    def test_what_json_can_say_arrives(self, tmp_path_factory: pytest.TempPathFactory, epochs: int, path: str) -> None:
        file = written(tmp_path_factory.getbasetemp(), MINIMAL)
        config = load_config(file, [f"train.epochs={epochs}", f"data.path={json.dumps(path)}"])
        assert (config.train.epochs, config.data.path) == (epochs, path)


class TestDistillation:
    """What the methods with a teacher add."""

    @pytest.fixture(params=["corrkd", "hrlf"])
    def method(self, request: pytest.FixtureRequest) -> str:
        return request.param

    def test_without_a_teacher_block_there_is_no_distillation(self, method: str) -> None:
        assert parse_config(MINIMAL | {"method": method}).teacher is None
        assert parse_config(MINIMAL | {"method": method, "teacher": None}).teacher is None

    def test_null_switches_a_file_s_teacher_off(self, method: str) -> None:
        file = CONFIGS[0].parent / f"{method}_mosi.json"
        assert load_config(file).teacher is not None
        assert load_config(file, ["teacher=null"]).teacher is None

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("teacher", {"epochs": 0}, "teacher.epochs: expected a number greater than 0, got 0"),
            (
                "teacher",
                {"epochs": 1, "epoch": 2},
                "teacher.epoch: unknown key; expected one of epochs, incomplete_samples, patience, "
                "accept_floor; did you mean teacher.epochs?",
            ),
            ("teacher", True, "teacher: expected a block of keys, got true"),
            ("model.heads", 7, "model.heads: 7 does not divide width 40; expected one of [1, 2, 4, 5, 8, 10, 20, 40]"),
        ],
    )
    def test_a_mistake_is_named(self, method: str, key: str, value: Any, message: str) -> None:
        assert complaint(changed(key, value) | {"method": method}) == f"my.json: {message}"

    @pytest.mark.parametrize(
        ("method", "key", "value", "message"),
        [
            ("corrkd", "loss.rcd", "mse", "loss.rcd: expected 'mutual-information' or 'kl', got \"mse\""),
            ("corrkd", "loss.eta", 0, "loss.eta: expected a number greater than 0, got 0"),
            (
                "corrkd",
                "loss.eta",
                2.5,
                "loss.eta: 2.5, but unit vectors are at most 2 apart; expected at most 2, or normal",
            ),
            ("corrkd", "loss.prototypes", 5, "loss.prototypes: expected 2, 3 or 7, got 5"),
            (
                "corrkd",
                "model.mcim",
                True,
                "model.mcim: unknown key; expected one of width, attention_mask, masked_la",
            ),
            ("hrlf", "model", {"width": 5, "heads": 5}, "model.width: 5; expected an even number, Q_m and U_m have"),
            ("hrlf", "loss.frf_gradient", "z", "loss.frf_gradient: expected 'factors' or 'everything', got \"z\""),
            ("hrlf", "loss.hmi_negatives", "all", "loss.hmi_negatives: expected 'layer' or 'joined', got \"all\""),
            ("hrlf", "loss.lambda_frf", 0, "loss.lambda_frf: 0 leaves the decoder untrained; expected a positive we"),
            ("umdf", "teacher", {"epochs": 1}, "teacher: expected null, got"),
        ],
    )
    def test_a_mistake_of_one_method_is_named(self, method: str, key: str, value: Any, message: str) -> None:
        assert complaint(changed(key, value) | {"method": method}).startswith(f"my.json: {message}")

    def test_an_unknown_method_is_named(self) -> None:
        assert complaint(changed("method", "corkd")) == (
            f'my.json: method: expected one of {", ".join(METHODS)}, got "corkd"; did you mean corrkd?'
        )
        assert complaint(changed("method", 3)) == f"my.json: method: expected one of {', '.join(METHODS)}, got 3"

    def test_iemocap_configs_serve_both_readings(self, method: str) -> None:
        file = CONFIGS[0].parent / f"{method}_iemocap.json"
        assert load_config(file).task.problems == 4
        assert load_config(file, ["train.task=emotions-4way"]).task.problems == 1

    def test_shipped_teachers_follow_the_student_s_epochs(self, method: str) -> None:
        for name in ("mosi", "mosei", "iemocap", "cmu_mosi", "ict_mmmo"):
            config = load_config(CONFIGS[0].parent / f"{method}_{name}.json", ["train.epochs=1"])
            teacher, student = METHODS[method].phases_of(config)
            assert (teacher.epochs(config), student.epochs(config)) == (1, 1)
            assert teacher.epochs(parse_config(config.model_dump(mode="json") | {"teacher": {"epochs": 3}})) == 3

    def test_positions_count_from_the_utterance_that_is_labelled(self, method: str) -> None:
        assert load_config(CONFIGS[0].parent / f"{method}_cmu_mosi.json").model.positions == "last"

    @pytest.mark.parametrize(
        ("name", "corrkd", "hrlf"),
        [
            ("mosi", (4e-3, 64, 50, 10, 1.2), (1e-3, 128, 50, 10)),
            ("mosei", (2e-3, 32, 20, 8, 1.0), (2e-3, 16, 20, 8)),
            ("iemocap", (4e-3, 64, 30, 10, 1.4), (4e-3, 32, 30, 10)),
        ],
    )
    def test_shipped_hyper_parameters_are_the_papers(self, name: str, corrkd: tuple, hrlf: tuple) -> None:
        for method, expected in (("corrkd", corrkd), ("hrlf", hrlf)):
            config = load_config(CONFIGS[0].parent / f"{method}_{name}.json")
            lr = config.deepspeed["optimizer"]["params"]["lr"]
            values = (lr, config.train.batch_size, config.train.epochs, config.model.heads)
            assert values + ((config.loss.eta,) if method == "corrkd" else ()) == expected
            assert config.model.width == 40


@settings(deadline=None, max_examples=25)
@given(block=st.sampled_from(["data", "model", "missing", "loss", "train", "eval", ""]), key=st.text(max_size=12))
def test_every_unknown_key_is_refused_by_name(block: str, key: str) -> None:
    fields = METHODS["umdf"].config.model_fields
    known = fields[block].annotation.model_fields if block else fields  # type: ignore[union-attr]
    if key in known:
        return
    raw = copy.deepcopy(MINIMAL)
    (raw.setdefault(block, {}) if block else raw)[key] = 1
    name = f"{block}.{key}" if block else key
    with pytest.raises(UserError) as caught:
        parse_config(raw, "my.json")
    assert str(caught.value).startswith(f"my.json: {name}: unknown key; expected one of ")


ODD = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 4)
    | st.sampled_from([10**7, -(10**30), 10**400, 2**31, 2**63])
    | st.sampled_from([0.0, -1.0, 0.5, 1e-300, 1e30, 1e308, float("inf"), float("-inf"), float("nan")])
    | st.sampled_from(["", "x", "0.1", "Adam", "umdf", "auto", "nan", "\0", "\ud800", "a" * 400, "[bold]", "é\n"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "params", "lr", "x"]), inner),
    max_leaves=5,
)


def blocks_of(raw: Any) -> list[dict[str, Any]]:
    """A block and all within it."""
    inner = [block for value in raw.values() if isinstance(value, dict) for block in blocks_of(value)]
    return [raw, *inner]


@settings(deadline=None, max_examples=150)
@given(path=st.sampled_from(CONFIGS), data=st.data())
def test_a_shipped_config_that_was_changed_anywhere_is_accepted_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, path: Path, data: st.DataObject
) -> None:
    raw = json.loads(path.read_text())
    for _ in range(data.draw(st.integers(1, 2))):
        block = data.draw(st.sampled_from(blocks_of(raw)))
        block[data.draw(st.sampled_from([*block, "type", "x"]))] = data.draw(ODD)
    refused_or_accepted(written(tmp_path_factory.getbasetemp(), raw))


def refused_or_accepted(file: Path) -> None:
    message = ""
    try:
        assert isinstance(load_config(file), Config)
    except UserError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < len(str(file)) + 500


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("deepspeed.optimizer.params.lr", 1e30, "expected a number from 0 to 10.0, got 1e+30"),
        ("deepspeed.optimizer.params.lr", -1, "expected a number from 0 to 10.0, got -1"),
        ("deepspeed.optimizer.params.lr", "x", 'expected a number from 0 to 10.0, got "x"'),
        ("deepspeed.optimizer.params.lr", [0.1], "expected a number from 0 to 10.0, got [0.1]"),
        ("deepspeed.optimizer.params.lr", True, "expected a number from 0 to 10.0, got true"),
        ("deepspeed.optimizer.params.lr", 10**400, "expected a number from 0 to 10.0, got 1000000000"),
        ("deepspeed.optimizer.params.betas", [0.9], "expected two numbers from 0 to below 1, got [0.9]"),
        ("deepspeed.optimizer.params.betas", [2, 3], "expected two numbers from 0 to below 1, got [2, 3]"),
        ("deepspeed.optimizer.params.weight_decay", -1, "expected a number from 0, got -1"),
        ("deepspeed.optimizer.params.eps", "x", 'expected a number from 0, got "x"'),
        ("deepspeed.optimizer.params.torch_adam", "x", 'expected true or false, got "x"'),
        ("deepspeed.optimizer.params", 3, "expected a block of keys, got 3"),
        ("deepspeed.optimizer.params", None, "expected a block of keys, got null"),
        (
            "deepspeed.optimizer.type",
            "LBFGS",
            "LBFGS computes the loss several times a step; expected for example A",
        ),
        ("deepspeed.gradient_clipping", -1, "expected a number from 0, which is none, got -1"),
        ("deepspeed.gradient_clipping", "x", 'expected a number from 0, which is none, got "x"'),
        ("deepspeed.gradient_clipping", True, "expected a number from 0, which is none, got true"),
        ("deepspeed.zero_optimization.stage", True, "expected 0, 1 or 2, got true"),
        ("deepspeed.steps_per_print", 0, "expected an integer from 1, got 0"),
        ("deepspeed.scheduler", {}, None),
        (
            "deepspeed.scheduler.type",
            None,
            'missing; expected for example "WarmupLR", or null in place of the sche',
        ),
        ("deepspeed.gradient_accumulation_steps", True, "expected 1, the losses are defined on the whole mini-batch"),
        ("eval.sweep", [10**400], None),
        ("eval.sweep", [True], None),
        ("eval.sweep", [0.5] * 200_000, "expected ratios between 0 and 1, at most 1000 of them"),
        ("model.width", 10**7, "expected a number less than or equal to 8192, got 10000000"),
        ("data.path", "", "expected the name of a file"),
        ("data.path", "a\0b", "expected the name of a file"),
        ("method", ["umdf"], f'expected one of {", ".join(METHODS)}, got ["umdf"]'),
        ("method", None, f"expected one of {', '.join(METHODS)}, got null"),
    ],
)
def test_odd_values_are_refused_by_key(key: str, value: Any, message: str | None) -> None:
    found = complaint(changed(key, value))
    assert found.startswith(f"my.json: {key}: {message}" if message else f"my.json: {key}")


@pytest.mark.parametrize("kind", ["WarmupLR", "WarmupDecayLR"])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("warmup_max_lr", 1e30, "expected a number from 0 to 10.0, got 1e+30"),
        ("warmup_min_lr", "x", 'expected a number from 0 to 10.0, got "x"'),
        ("warmup_num_steps", -3, "expected an integer from 0, got -3"),
        ("warmup_num_steps", 1.5, "expected an integer from 0, got 1.5"),
        ("total_num_steps", 0, "expected an integer from 1, got 0"),
        ("warmup_type", "x", 'expected "log" or "linear", got "x"'),
    ],
)
def test_odd_schedules_are_refused_by_key(kind: str, key: str, value: Any, message: str) -> None:
    found = complaint(changed("deepspeed.scheduler", {"type": kind, "params": {key: value}}))
    assert found == f"my.json: deepspeed.scheduler.params.{key}: {message}"


@pytest.mark.parametrize("text", ["[" * 100_000, '{"method": ' + '{"a": ' * 900 + "1" + "}" * 901, "1" * 5000])
def test_json_that_goes_too_far_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "my.json"
    file.write_text(text)
    with pytest.raises(UserError):
        load_config(file)
    refused_or_accepted(file)
    with pytest.raises(UserError) as caught:
        load_config(written(tmp_path, MINIMAL), [f"model.width={text}"])
    assert len(str(caught.value)) < len(str(file)) + 500


@pytest.mark.parametrize(
    ("stated", "overrides", "expected"),
    [
        ({}, [], 600.0),
        ({"timeout_seconds": 30}, [], 30.0),
        ({"timeout_seconds": 30}, ["train.timeout_seconds=1.5"], 1.5),
        ({"timeout_seconds": "soon"}, [], 600.0),
        ({"timeout_seconds": True}, [], 600.0),
        ({"timeout_seconds": 0}, [], 600.0),
        ({"timeout_seconds": 30}, ["train"], 600.0),
    ],
)
def test_how_long_processes_wait_is_known_before_the_config_is(
    tmp_path: Path, stated: dict[str, Any], overrides: list[str], expected: float
) -> None:
    """What is wrong with it is said when all have met."""
    raw = copy.deepcopy(MINIMAL)
    raw["train"] |= stated
    assert stated_timeout(written(tmp_path, raw), overrides) == expected
    assert stated_timeout(tmp_path / "none.json") == 600.0
