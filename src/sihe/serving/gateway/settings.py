"""The settings of a deployment's model, whatever kind of model it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sihe.core.errors import ConfigError
from sihe.serving.engine.config import EngineConfig
from sihe.serving.predictive.config import KIND, KIND_TAG, PredictiveConfig

if TYPE_CHECKING:
    from sihe.core.tracking import ModelVersion

ModelSettings = EngineConfig | PredictiveConfig


def from_mapping(values: Mapping[str, Any]) -> ModelSettings:
    """The settings that were stored. Raises `ConfigError` that names the key."""
    return PredictiveConfig.from_mapping(values) if values.get("kind") == KIND else EngineConfig.from_mapping(values)


def settings_for(version: ModelVersion, given: ModelSettings | Mapping[str, Any] | None) -> ModelSettings:
    """Settings for a version: its kind's defaults, or what is given, read as its kind has it. Raises `ConfigError`."""
    kind = PredictiveConfig if version.tags.get(KIND_TAG) == KIND else EngineConfig
    if given is None or isinstance(given, Mapping):
        return kind.from_mapping(given or {})
    check_kind(version, given)
    return given


def check_kind(version: ModelVersion, settings: ModelSettings) -> None:
    """Raises `ConfigError` when the settings are those of another kind of model."""
    is_predictive = version.tags.get(KIND_TAG) == KIND
    if is_predictive != isinstance(settings, PredictiveConfig):
        found, has = ("a predictive model", "an engine") if is_predictive else ("no predictive model", "one")
        raise ConfigError(
            f"{version.name}@{version.version} is {found}, and the deployment has the settings of {has}: deploy it "
            "again, so that it gets settings of its kind",
            key="settings",
        )
