"""Reading configs: one JSON file that says everything about a run, overrides, and what is said about mistakes.

The blocks (`fastmmkd.blocks`) are `method, data, model, missing, teacher, loss, train, eval, deepspeed`; `model` and
`loss` are the method's own, `teacher` is for the methods that have one. The `deepspeed` block goes to DeepSpeed as it
is.
Every mistake is one line that names the file, the key, what was expected, and the nearest valid key.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import NoneType
from typing import Any, get_args

from pydantic import ValidationError

from fastmmkd.blocks import LONGEST_TIMEOUT_S, Config, TrainBlock
from fastmmkd.errors import UserError, nearest, shown
from fastmmkd.files import refuse_special


def load_config(path: Path | str, overrides: list[str] | None = None) -> Config:
    """Read and validate a config file.

    Args:
        path: a JSON file.
        overrides: `key.path=value` strings (`--set`); the value is JSON, or a plain string where it is not.

    Raises:
        UserError: one line that names the file, the key and what was expected.
    """
    return parse_config(read_config(path, overrides), str(path))


def read_config(path: Path | str, overrides: list[str] | None = None) -> dict[str, Any]:
    """What a config file and overrides say, not validated yet: for what is refused before torch is imported.

    Raises:
        UserError: no such file, or no JSON object.
    """
    path = Path(path)
    try:
        refuse_special(path, "a config")
        raw = json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse_constant)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file{nearest(path.name, _json_names(path.parent))}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read this config file ({error.strerror})") from None
    except (ValueError, RecursionError) as error:  # of JSON or UTF-8
        raise UserError(f"{path}: not a JSON file: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: expected a JSON object with the keys {', '.join(Config.model_fields)}")
    for override in overrides or []:
        _apply_override(raw, override)
    return raw


def stated_timeout(path: Path | str, overrides: list[str] | None = None) -> float:
    """`train.timeout_seconds` of a config that may be missing or wrong, which is said later; then the default."""
    default = float(TrainBlock.model_fields["timeout_seconds"].default)
    try:
        train = read_config(path, overrides).get("train")
    except UserError:
        return default
    stated = train.get("timeout_seconds") if isinstance(train, dict) else None
    if isinstance(stated, bool) or not isinstance(stated, int | float) or not 1 <= stated <= LONGEST_TIMEOUT_S:
        return default
    return float(stated)


def command_overrides(assignments: list[str], data: str | None, seeds: str | None, together: bool = False) -> list[str]:
    """The overrides that a command's `--set`, `--data`, `--seeds` and `--together` stand for."""
    overrides = list(assignments)
    if data is not None:
        overrides.append(f"data.path={json.dumps(data)}")
    if seeds is not None:
        overrides.append(f"train.seeds=[{seeds}]")
    if together:
        overrides.append("train.together=true")
    return overrides


def parse_config(raw: dict[str, Any], name: str = "config") -> Config:
    """Validate a config held in memory; `name` stands for the file in error messages."""
    from fastmmkd.methods import METHODS  # and torch with them

    method = raw.get("method")
    if "method" not in raw and not any(nearest(key, ["method"]) for key in raw if key not in Config.model_fields):
        raise UserError(f"{name}: method: missing; expected one of {', '.join(METHODS)}")
    if "method" in raw and not (isinstance(method, str) and method in METHODS):
        hint = nearest(str(method), METHODS)
        raise UserError(f"{name}: method: expected one of {', '.join(METHODS)}, got {shown(method)}{hint}")
    schema = METHODS[method].config if method else Config
    try:
        config = schema.model_validate_json(json.dumps(raw))
    except ValidationError as error:
        raise UserError(f"{name}: {_first_problem(error, schema)}") from None
    except RecursionError:
        raise UserError(f"{name}: blocks within blocks, too deep; expected those of the README") from None
    if config.train.together and not METHODS[config.method].grouped:
        raise UserError(
            f"{name}: train.together: {METHODS[config.method].title} trains one seed at a time; expected false"
        )
    return config


def _json_names(folder: Path) -> list[str]:
    return [p.name for p in folder.glob("*.json")] if folder.is_dir() else []


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: expected KEY=VALUE, for example --set train.epochs=2")
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError):
        value = text
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"--set {override}: {parent} is not a block of keys")
    node[last] = value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _first_problem(error: ValidationError, schema: type[Config]) -> str:
    first, *others = error.errors()
    if first["type"] == "missing":  # a key that is misspelt is missing, too
        first = next((other for other in others if other["type"] == "extra_forbidden"), first)
    location = [str(part) for part in first["loc"]]
    key = ".".join(location)
    if first["type"] == "extra_forbidden":
        block: Any = schema
        for part in location[:-1]:
            annotation = block.model_fields[part].annotation
            block = next((choice for choice in get_args(annotation) if choice is not NoneType), annotation)
        names = [name for name, field in block.model_fields.items() if field.annotation is not NoneType]
        prefix = ".".join([*location[:-1], ""])
        return f"{key}: unknown key; expected one of {', '.join(names)}" + nearest(key, [prefix + n for n in names])
    if first["type"] == "missing":
        return f"{key}: missing"
    if first["type"] == "json_invalid":  # half a surrogate pair, or nested too deep
        return f"no JSON that can be read: {first['ctx']['error']}"
    if first["type"] == "value_error":
        message = first["msg"].removeprefix("Value error, ")
        return f"{key}.{message}" if key in ("data", "model", "loss") else f"{key}: {message}" if key else message
    expected = first["msg"].removeprefix("Input should be ")
    plainly = {"an object": "a block of keys", "a valid array": "a list", "a valid integer": "an integer"}
    expected = plainly.get(expected, expected).replace("a valid ", "a ")
    if expected.startswith(("greater", "less")):
        expected = f"a number {expected}"
    return f"{key}: expected {expected}, got {shown(first['input'])}"
