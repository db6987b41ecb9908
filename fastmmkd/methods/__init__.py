"""The methods by name. A method is a file of this folder that has a `METHOD`, see `fastmmkd.methods.method`."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules

from fastmmkd.methods.method import Method, by_name


def _found() -> Iterator[Method]:
    for module in iter_modules(__path__):
        method = getattr(import_module(f"{__name__}.{module.name}"), "METHOD", None)
        if method is not None:
            yield method


METHODS: dict[str, Method] = by_name(_found())
