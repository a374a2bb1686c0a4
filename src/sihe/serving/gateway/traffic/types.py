"""How a deployment's requests are dealt out, as values: arms, shadow, logs, and who asks.

A deployment always has the arm `stable`, which is what was deployed. Others stand beside it with a share of the
requests each; `stable` gets the rest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, get_args

from sihe.core.errors import AlreadyExists, ConfigError, InvalidInput, NotFound
from sihe.core.ids import check_name
from sihe.serving.gateway.settings import ModelSettings, from_mapping

STABLE = "stable"
SHADOW = "shadow"
CANARY = "canary"
MAX_ARMS = 8  # each is a whole model in memory
KEEP_DAYS = 30  # logged requests, where nothing else is said: enough to evaluate a version, no archive of users' texts
MAX_KEEP_DAYS = 36_500
Sticky = Literal["session", "tenant", "none"]


@dataclass(frozen=True, slots=True)
class Sender:
    """Where one request comes from: the id that it bears, and by what its sender is known again (`user`, a session
    header). Who pays for it, and what they may, is the tenants' `Caller`."""

    request_id: str
    session: str | None = None


@dataclass(frozen=True, slots=True)
class Arm:
    """One version beside the stable one. `settings` None are the stable arm's; `weight` is its share of requests."""

    name: str
    model: str
    selector: str
    weight: float
    settings: ModelSettings | None = None

    def __post_init__(self) -> None:
        check_name("arm", self.name)
        if self.name in (STABLE, SHADOW):
            raise InvalidInput(f"an arm cannot be named {self.name!r}: every deployment has its own of that name")
        check_share("weight", self.weight)

    @property
    def target(self) -> str:
        """The followed reference, such as `gpt@3`."""
        return f"{self.model}@{self.selector}" if self.selector else self.model


@dataclass(frozen=True, slots=True)
class Shadow:
    """A version that is sent copies of a `share` of requests, whose answers nobody gets.

    With `only_idle` a copy runs only while no caller's request does, and is given up when one comes: right where both
    compute on the same processors. `max_waiting` copies wait at most; more are dropped.
    """

    model: str
    selector: str
    share: float
    settings: ModelSettings | None = None
    only_idle: bool = True
    max_waiting: int = 64

    def __post_init__(self) -> None:
        check_share("share", self.share)
        if not 1 <= self.max_waiting <= 10_000:
            raise InvalidInput(f"max_waiting must be 1 to 10000, got {self.max_waiting!r}")

    @property
    def target(self) -> str:
        """The followed reference."""
        return f"{self.model}@{self.selector}" if self.selector else self.model


@dataclass(frozen=True, slots=True)
class LogPolicy:
    """Which share of requests is logged to the lake, whether with their text (of models that do not generate, their
    inputs and outputs) or only lengths and hashes, and after how many days the records are removed."""

    share: float = 0.0
    text: bool = False
    keep_days: int = KEEP_DAYS

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise InvalidInput(f"share must be 0 (log nothing) to 1, got {self.share!r}")
        if not (isinstance(self.keep_days, int) and 1 <= self.keep_days <= MAX_KEEP_DAYS):
            raise InvalidInput(f"keep_days must be whole days, 1 to {MAX_KEEP_DAYS}, got {self.keep_days!r}")


@dataclass(frozen=True, slots=True)
class TrafficPolicy:
    """How requests are dealt out.

    `sticky` says by what the same sender is known and kept on one arm: `session` by the `user` field or the session
    header, `tenant` also by its tenant, `none` not at all. Whoever is not known is dealt anew with each request. `salt`
    decides, with the deployment's name, who gets what: change it, and all are dealt anew.
    """

    arms: tuple[Arm, ...] = ()
    shadow: Shadow | None = None
    logs: LogPolicy = field(default_factory=LogPolicy)
    sticky: Sticky = "session"
    salt: str = ""

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise InvalidInput(f"an arm's name stands once, got {', '.join(names)}")
        if len(names) > MAX_ARMS:
            raise InvalidInput(f"a deployment has at most {MAX_ARMS} arms beside {STABLE!r}, got {len(names)}")
        whole = math.fsum(arm.weight for arm in self.arms)
        if whole > 1 + 1e-9:
            raise InvalidInput(f"the weights of the arms beside {STABLE!r} add up to {whole:g}: at most 1")
        if self.sticky not in get_args(Sticky):
            raise InvalidInput(f"sticky must be one of {', '.join(get_args(Sticky))}, got {self.sticky!r}")
        if len(self.salt) > 120:
            raise InvalidInput(f"salt has at most 120 characters, got {len(self.salt)}")

    @property
    def weights(self) -> dict[str, float]:
        """The share of each arm, `stable` first."""
        rest = 1 - math.fsum(arm.weight for arm in self.arms)
        return {STABLE: max(0.0, round(rest, 12)), **{arm.name: arm.weight for arm in self.arms}}

    def arm(self, name: str) -> Arm:
        """The arm of that name. Raises `NotFound`."""
        for arm in self.arms:
            if arm.name == name:
                return arm
        known = ", ".join([STABLE, *(arm.name for arm in self.arms)])
        raise NotFound("arm", name, hint=f"the deployment has {known}")

    def with_arm(self, arm: Arm) -> TrafficPolicy:
        """The same with `arm`, in the place of one of its name if there is one."""
        others = tuple(other for other in self.arms if other.name != arm.name)
        return replace(self, arms=(*others, arm))

    def with_new_arm(self, arm: Arm) -> TrafficPolicy:
        """The same with `arm`. Raises `AlreadyExists`."""
        if any(other.name == arm.name for other in self.arms):
            raise AlreadyExists("arm", arm.name, hint="remove it first")
        return replace(self, arms=(*self.arms, arm))

    def without_arm(self, name: str) -> TrafficPolicy:
        """The same without that arm; its share goes back to `stable`. Raises `NotFound`."""
        gone = self.arm(name)
        return replace(self, arms=tuple(arm for arm in self.arms if arm != gone))

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, as the records hold them."""
        return asdict(self) | {"arms": [_plain(arm) for arm in self.arms], "shadow": _plain(self.shadow)}

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any] | None) -> TrafficPolicy:
        """The policy that `to_mapping` wrote; the default one for None. Raises `ConfigError`, `InvalidInput`."""
        if not values:
            return cls()
        shadow = values.get("shadow")
        try:
            return cls(
                arms=tuple(Arm(**_with_settings(arm)) for arm in values.get("arms", ())),
                shadow=Shadow(**_with_settings(shadow)) if shadow else None,
                logs=LogPolicy(**values.get("logs", {})),
                sticky=values.get("sticky", "session"),
                salt=values.get("salt", ""),
            )
        except (TypeError, AttributeError) as error:  # fields of a newer version, or none where there were some
            raise ConfigError(f"how requests are dealt out cannot be read: {error}", key="traffic") from error


@dataclass(frozen=True, slots=True)
class ArmStatus:
    """What an arm is doing: the version that answers (None: none yet), how it is, and why it cannot serve if so."""

    name: str
    target: str
    weight: float
    state: str
    version: int | None
    in_flight: int
    error: str | None


def check_share(name: str, value: float) -> None:
    """Raises `InvalidInput` unless `value` is a share of requests: above 0 and at most 1."""
    if not (isinstance(value, int | float) and 0 < value <= 1):
        raise InvalidInput(f"{name} must be a share of requests, above 0 and at most 1, got {value!r}")


def sticky_key(policy: TrafficPolicy, sender: Sender, tenant: str) -> str | None:
    """By what the sender is known again; None for nobody in particular, who is dealt anew with each request."""
    if policy.sticky == "none":
        return None
    if sender.session:
        return f"session:{tenant}:{sender.session}"  # two tenants may both have a user "1"
    return f"tenant:{tenant}" if policy.sticky == "tenant" and tenant else None


def _plain(part: Arm | Shadow | None) -> dict[str, Any] | None:
    if part is None:
        return None
    return asdict(part) | {"settings": part.settings.to_mapping() if part.settings is not None else None}


def _with_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    settings = values.get("settings")
    return {**values, "settings": from_mapping(settings) if settings is not None else None}
