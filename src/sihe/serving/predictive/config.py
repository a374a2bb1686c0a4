"""How a predictive model is served: sizes, waits and limits, checked when made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from sihe.core.errors import ConfigError

Wait = Literal["adaptive", "always"]
KIND = "predictive"  # what stands in stored settings, and in the tag of a registered version
KIND_TAG = "sihe.kind"


@dataclass(frozen=True, slots=True)
class PredictiveConfig:
    """Sizes and limits of one served predictive model.

    `max_batch_size` bounds the rows that are computed together. `max_delay_ms` is how long a request may be held back
    for others to join it; with `wait="adaptive"` it is held back only while the arrivals of the last moments make
    company likely, so that a lone request never waits, with `wait="always"` for the whole delay unless the batch fills.
    `instances` batches are computed at once. At most `max_waiting` requests wait. `timeout_ms` is the deadline of a
    request that names none. `threads` bounds those that a library uses within one batch (None: its own choice).
    `trusted_types` are the names of types outside scikit-learn that a `.skops` file may build.
    """

    max_batch_size: int = 32
    max_delay_ms: float = 1.0
    wait: Wait = "adaptive"
    instances: int = 1
    max_waiting: int = 1024
    timeout_ms: float | None = None
    threads: int | None = None
    trusted_types: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "instances", "max_waiting", "threads"):
            value = getattr(self, name)
            if value is None and name == "threads":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number of at least 1, got {value!r}", key=name)
        for name, least in (("max_delay_ms", 0.0), ("timeout_ms", 0.001)):
            value = getattr(self, name)
            if value is None and name == "timeout_ms":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= 3_600_000:
                raise ConfigError(f"{name} must be milliseconds, at least {least}, got {value!r}", key=name)
        if self.wait not in ("adaptive", "always"):
            raise ConfigError(f"wait must be adaptive or always, got {self.wait!r}", key="wait")
        if not isinstance(self.trusted_types, tuple) or not all(isinstance(name, str) for name in self.trusted_types):
            raise ConfigError(f"trusted_types must be names of types, got {self.trusted_types!r}", key="trusted_types")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> PredictiveConfig:
        """The configuration that stored or posted `values` describe. Raises `ConfigError` that names the key."""
        known = [field.name for field in fields(cls)]
        given = {key: value for key, value in values.items() if key != "kind"}
        for key in given:
            if key not in known:
                raise ConfigError(
                    f"unknown setting {key!r} of a predictive model: known are {', '.join(known)}", key=key
                )
        trusted = given.get("trusted_types")
        if isinstance(trusted, str):  # from the command line
            given["trusted_types"] = tuple(name.strip() for name in trusted.split(",") if name.strip())
        elif isinstance(trusted, list):
            given["trusted_types"] = tuple(trusted)
        return cls(**given)

    def to_mapping(self) -> dict[str, Any]:
        """What differs from the defaults, and the kind: what is stored with a deployment."""
        default = PredictiveConfig()
        changed = {field.name: getattr(self, field.name) for field in fields(self)}
        stored = {name: value for name, value in changed.items() if value != getattr(default, name)}
        if "trusted_types" in stored:
            stored["trusted_types"] = list(self.trusted_types)
        return {"kind": KIND, **stored}
