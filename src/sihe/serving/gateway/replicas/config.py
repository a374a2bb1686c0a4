"""How many replicas a deployment has, where they run, and how requests go to them. Values only, checked when made."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar, Literal

from sihe.core.errors import ConfigError

MAX_HEDGED = 0.05  # "The Tail at Scale" (Dean and Barroso, CACM 2013) reports gains at 2 %; more is load, not insurance


@dataclass(frozen=True, slots=True)
class LocalBackend:
    """Engines in the process that serves."""

    kind: ClassVar[Literal["local"]] = "local"


@dataclass(frozen=True, slots=True)
class RayBackend:
    """One actor of a Ray cluster a replica, with so many `cpus` and `gpus`, `resources` of the cluster's own names
    (`{"highmem": 1}`), on as few nodes as possible (`pack`) or on many (`spread`)."""

    kind: ClassVar[Literal["ray"]] = "ray"
    cpus: float = 1.0
    gpus: float = 0.0
    resources: tuple[tuple[str, float], ...] = ()
    placement: Literal["pack", "spread"] = "spread"

    def __post_init__(self) -> None:
        _check(_is_number(self.cpus) and self.cpus >= 0, "backend.cpus", self.cpus, "a number of at least 0")
        _check(_is_number(self.gpus) and self.gpus >= 0, "backend.gpus", self.gpus, "a number of at least 0")
        _check(self.placement in ("pack", "spread"), "backend.placement", self.placement, "pack or spread")
        given = self.resources.items() if isinstance(self.resources, Mapping) else self.resources
        for name, amount in given:
            _check(_is_number(amount) and amount > 0, f"backend.resources.{name}", amount, "a number above 0")
        object.__setattr__(self, "resources", tuple(sorted((str(name), float(amount)) for name, amount in given)))


@dataclass(frozen=True, slots=True)
class OpenAiBackend:
    """A server of OpenAI's protocol a replica: one that runs at `url`, or one that `command` starts, such as
    `vllm serve {model} --host 127.0.0.1 --port {port} --served-model-name {name}`.

    `{model}` is the version's folder, `{port}` a free port, `{name}` what requests will call the model; `start_s`
    bounds its start. `model` is the name to ask for at a `url`.
    """

    kind: ClassVar[Literal["openai"]] = "openai"
    url: str | None = None
    command: str | None = None
    model: str | None = None
    start_s: float = 600.0

    def __post_init__(self) -> None:
        _check((self.url is None) != (self.command is None), "backend.url", self.url, "given, or backend.command")
        if self.url is not None:
            _check(self.url.startswith(("http://", "https://")), "backend.url", self.url, "http://… or https://…")
            _check(bool(self.model), "backend.model", self.model, "the name of the model at the url")
        else:
            _check("{port}" in (self.command or ""), "backend.command", self.command, "a command with {port}")
            try:
                shlex.split(self.command or "")
            except ValueError as error:
                raise ConfigError(f"backend.command: {error}, got {self.command!r}", key="backend.command") from error
        _check(_is_number(self.start_s) and self.start_s > 0, "backend.start_s", self.start_s, "a number above 0")


Backend = LocalBackend | RayBackend | OpenAiBackend
_BACKENDS: dict[str, type[Backend]] = {kind.kind: kind for kind in (LocalBackend, RayBackend, OpenAiBackend)}


@dataclass(frozen=True, slots=True)
class ScalingConfig:
    """When there shall be more replicas, and when fewer.

    A replica should have `target_in_flight` requests in hand (by default three quarters of its `max_batch_size`), use
    at most the share `target_kv` of its cache, and answer within `target_ttft_s` where that is given. A load within
    `tolerance` of the target changes nothing. More replicas come when they were asked for during all of the last
    `up_after_s`, at most doubling each `up_cooldown_s`; fewer when they would have sufficed for all of the last
    `down_after_s`. With `min_replicas=0` the last one goes after `idle_s` without a request, and comes back at once.
    """

    target_in_flight: float | None = None
    target_kv: float = 0.85
    target_ttft_s: float | None = None
    tolerance: float = 0.1
    up_after_s: float = 3.0
    up_cooldown_s: float = 5.0
    down_after_s: float = 120.0
    idle_s: float = 300.0

    def __post_init__(self) -> None:
        for name in ("target_in_flight", "target_ttft_s"):
            value = getattr(self, name)
            _check(
                value is None or (_is_number(value) and value > 0),
                f"scaling.{name}",
                value,
                "empty or a number above 0",
            )
        for name in ("up_after_s", "up_cooldown_s", "down_after_s", "idle_s"):
            value = getattr(self, name)
            _check(_is_number(value) and value >= 0, f"scaling.{name}", value, "a number of at least 0")
        _check(_is_number(self.target_kv) and 0 < self.target_kv <= 1, "scaling.target_kv", self.target_kv, "in (0, 1]")
        _check(_is_number(self.tolerance) and 0 <= self.tolerance < 1, "scaling.tolerance", self.tolerance, "in [0, 1)")


@dataclass(frozen=True, slots=True)
class ReplicaConfig:
    """Replicas of one deployment, and how requests go to them.

    A request that meets no replica, while one is on its way, waits for at most `wait_s`, with at most `max_waiting`
    others. One that has not begun to stream is tried on at most `max_attempts` replicas. `hedge` is the share of
    requests that may be sent to a second replica when their first token is late (0: none). `timeout_s` bounds a whole
    answer, of every kind of model.
    """

    min_replicas: int = 1
    max_replicas: int = 1
    scaling: ScalingConfig = field(default_factory=ScalingConfig)
    backend: Backend = field(default_factory=LocalBackend)
    wait_s: float = 60.0
    max_waiting: int = 256
    max_attempts: int = 3
    hedge: float = 0.0
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("min_replicas", 0), ("max_replicas", 1), ("max_waiting", 0), ("max_attempts", 1)):
            value = getattr(self, name)
            fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
            _check(fits, name, value, f"a whole number of at least {least}")
        _check(self.min_replicas <= self.max_replicas, "max_replicas", self.max_replicas, "at least min_replicas")
        _check(_is_number(self.wait_s) and self.wait_s >= 0, "wait_s", self.wait_s, "a number of at least 0")
        _check(_is_number(self.hedge) and 0 <= self.hedge <= MAX_HEDGED, "hedge", self.hedge, f"0 to {MAX_HEDGED}")
        fits = self.timeout_s is None or (_is_number(self.timeout_s) and self.timeout_s > 0)
        _check(fits, "timeout_s", self.timeout_s, "empty or a number above 0")

    @property
    def is_elastic(self) -> bool:
        """Whether the number of replicas follows the load."""
        return self.min_replicas != self.max_replicas

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> ReplicaConfig:
        """The configuration that stored or posted `values` describe. Raises `ConfigError` that names the key."""
        values = dict(values)
        if "scaling" in values:
            values["scaling"] = _made(ScalingConfig, values["scaling"], "scaling")
        if "backend" in values:
            given = values["backend"]
            kind = given.get("kind") if isinstance(given, Mapping) else given
            _check(isinstance(kind, str) and kind in _BACKENDS, "backend", given, f"one of {', '.join(_BACKENDS)}")
            rest = {key: value for key, value in given.items() if key != "kind"} if isinstance(given, Mapping) else {}
            values["backend"] = _made(_BACKENDS[str(kind)], rest, "backend")
        return _made(cls, values, "")

    def to_mapping(self) -> dict[str, Any]:
        """What differs from the defaults: what is stored with a deployment."""
        plain = _differing(self, ReplicaConfig(), leave=("scaling", "backend"))
        if self.scaling != ScalingConfig():
            plain["scaling"] = _differing(self.scaling, ScalingConfig())
        if self.backend != LocalBackend():
            plain["backend"] = {"kind": self.backend.kind, **asdict(self.backend)}
            if isinstance(self.backend, RayBackend):
                plain["backend"]["resources"] = dict(self.backend.resources)
        return plain


def _made(kind: Any, values: Any, where: str) -> Any:
    _check(isinstance(values, Mapping), where or "replicas", values, "an object")
    known = [item.name for item in fields(kind)]
    for key in values:
        if key not in known:
            name = f"{where}.{key}" if where else str(key)
            raise ConfigError(f"unknown replica setting {name!r}: known are {', '.join(known) or 'none'}", key=name)
    return kind(**values)


def _differing(value: Any, default: Any, *, leave: tuple[str, ...] = ()) -> dict[str, Any]:
    names = [item.name for item in fields(value) if item.name not in leave]
    return {name: getattr(value, name) for name in names if getattr(value, name) != getattr(default, name)}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value and abs(value) < 1e12


def _check(holds: bool, name: str, value: object, expected: str) -> None:
    if not holds:
        raise ConfigError(f"{name} must be {expected}, got {value!r}", key=name)
