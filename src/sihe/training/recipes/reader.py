"""Reading a recipe from a file, or one that ships with the house: `load_recipe("grpo", …)`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from sihe.core.errors import ConfigError
from sihe.training.recipes.config import RecipeConfig

_SHIPPED = "presets"


def recipe_names() -> list[str]:
    """The names that `load_recipe` knows."""
    entries = resources.files(__package__).joinpath(_SHIPPED).iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def load_recipe(source: str | Path, overrides: Mapping[str, Any] | None = None) -> RecipeConfig:
    """The recipe in a YAML file or shipped under the name `source`.

    `overrides` have dotted keys and win; stages go by number, from 0: `stages.1.beta`. Raises `ConfigError`.
    """
    values = _read(source)
    for key, value in (overrides or {}).items():
        _set(values, key, value)
    return RecipeConfig.from_mapping(values)


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    target: Any = values
    for section in sections:
        if isinstance(target, list):
            if not (section.isdigit() and int(section) < len(target)):
                raise ConfigError(f"recipe setting {key!r}: stages go from 0 to {len(target) - 1}", key=key)
            target = target[int(section)]
        else:
            target = target.setdefault(section, {})
        if not isinstance(target, dict | list):
            raise ConfigError(f"recipe setting {section!r} has no parts, got {key!r}", key=key)
    if isinstance(target, list):
        raise ConfigError(
            f"recipe setting {key!r}: say which setting of the stage, as in {key}.update.steps=50", key=key
        )
    target[last] = value


def _read(source: str | Path) -> dict[str, Any]:
    try:
        if str(source) in recipe_names():
            shipped = resources.files(__package__).joinpath(_SHIPPED, f"{source}.yaml")
            text = shipped.read_text(encoding="utf-8")
        else:
            text = Path(source).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError) as error:
        known = ", ".join(recipe_names())
        raise ConfigError(
            f"{str(source)!r} is neither a file nor a recipe; recipes are {known}", key="recipe"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{source} is not UTF-8 text", key="recipe") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{source} is not valid YAML: {error}", key="recipe") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold settings, one a line, got {type(values).__name__}", key="recipe")
    return values
