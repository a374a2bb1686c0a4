"""Names that load when they are first used, so that importing a room costs nothing."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from sihe.core.errors import MissingExtra


def attach(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` for a package whose public `names` map to the modules that define them.

    Written in a room as `__getattr__, __dir__, __all__ = attach(__name__, {"Engine": "sihe.serving.engine.engine"})`.
    """

    def getattribute(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(names[name]), name)

    public = sorted(names)
    return getattribute, lambda: public, public


def require(module: str, *, extra: str) -> ModuleType:
    """The imported `module`; `MissingExtra` with the install line when its package is absent."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and module.split(".")[0] == error.name.split(".")[0]:
            raise MissingExtra(module.split(".")[0], extra) from error
        raise
