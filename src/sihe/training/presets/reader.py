"""Reading a configuration from a file, or one that ships with the house: `load_config("nano-10m", …)`."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from sihe.core.errors import ConfigError
from sihe.training.config import TrainConfig


def preset_names() -> list[str]:
    """The names that `load_config` knows."""
    entries = resources.files(__package__).iterdir()
    return sorted(entry.name.removesuffix(".yaml") for entry in entries if entry.name.endswith(".yaml"))


def load_config(source: str | Path, overrides: Mapping[str, Any] | None = None) -> TrainConfig:
    """The configuration in a YAML file or preset `source`; `overrides` have dotted keys (`model.num_layers`) and win.

    Raises `ConfigError`.
    """
    values = _read(source)
    for key, value in (overrides or {}).items():
        section, _, inner = key.rpartition(".")
        target = values.setdefault(section, {}) if section else values
        if not isinstance(target, dict):
            raise ConfigError(f"training setting {section!r} has no parts, got {key!r}", key=key)
        target[inner] = value
    return TrainConfig.from_mapping(values)


def parse_override(item: str) -> tuple[str, Any]:
    """`"model.num_layers=4"` as a key and a value (YAML). Raises `ConfigError`."""
    key, equals, text = item.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set takes KEY=VALUE, got {item!r}", key=key)
    try:
        return key.strip(), yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"--set {key}: {text!r} is not YAML", key=key) from error


def _read(source: str | Path) -> dict[str, Any]:
    path = Path(source)
    try:
        if str(source) in preset_names():
            text = resources.files(__package__).joinpath(f"{source}.yaml").read_text(encoding="utf-8")
        else:
            text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError) as error:
        known = ", ".join(preset_names())
        raise ConfigError(
            f"{str(source)!r} is neither a file nor a preset; presets are {known}", key="config"
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text", key="config") from error
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}", key="config") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold settings, one a line, got {type(values).__name__}", key="config")
    return values
