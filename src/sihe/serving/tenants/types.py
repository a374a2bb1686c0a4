"""Tenants, their keys, and who is calling. Values only; none of them holds a key that would open anything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from enum import StrEnum
from typing import Any

from sihe.core.errors import InvalidInput
from sihe.core.ids import check_name

DEFAULT_TENANT = "default"
MAX_LIMIT = 10**15
MAX_TENANT_PRIORITY = 1000


class Right(StrEnum):
    """What a key may do. `ADMIN` includes the others."""

    INFER = "infer"  # ask deployments for answers
    OBSERVE = "observe"  # read metrics, deployments and everybody's usage
    DEPLOY = "deploy"  # change deployments and aliases
    ADMIN = "admin"  # keys, tenants, and every page and API that no other right opens


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a tenant or a key may ask for; None: as much as it likes.

    Rates are token buckets as large as one minute's worth. Days and months are those of UTC.
    """

    requests_per_min: int | None = None
    tokens_per_min: int | None = None
    tokens_per_day: int | None = None
    tokens_per_month: int | None = None
    concurrency: int | None = None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise InvalidInput(f"{name} must be a whole number or absent, got {value!r}")
            if value is not None and not 1 <= value <= MAX_LIMIT:
                raise InvalidInput(f"{name} must be 1 to {MAX_LIMIT} (absent: no limit), got {value!r}")

    @classmethod
    def from_mapping(cls, values: Mapping[str, Any]) -> Limits:
        """Limits by name. Raises `InvalidInput` that names what is unknown."""
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise InvalidInput(f"unknown limit {name!r}: known are {', '.join(known)}")
        return cls(**values)

    def to_mapping(self) -> dict[str, int]:
        """The limits that are set, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who pays. `priority` is added to each request's (lower goes first).

    An isolated tenant shares no cached prefix with others: how fast an answer begins then tells nobody else what it
    has asked before.
    """

    name: str = DEFAULT_TENANT
    limits: Limits = Limits()
    priority: int = 0
    is_isolated: bool = False
    is_disabled: bool = False

    def __post_init__(self) -> None:
        check_name("tenant", self.name)
        if abs(self.priority) > MAX_TENANT_PRIORITY:
            raise InvalidInput(
                f"a tenant's priority is {-MAX_TENANT_PRIORITY} to {MAX_TENANT_PRIORITY}, got {self.priority!r}"
            )


@dataclass(frozen=True, slots=True)
class ApiKey:
    """What is known of a key: all but the key. `id` is its public part; `deployments` None means all of them."""

    id: str
    name: str
    tenant: str
    rights: frozenset[Right]
    deployments: frozenset[str] | None
    limits: Limits
    created_at: datetime
    expires_at: datetime | None = None
    disabled_at: datetime | None = None
    last_used_at: datetime | None = None

    def __post_init__(self) -> None:
        check_name("key", self.name)
        if not self.rights:
            raise InvalidInput(f"a key needs at least one right: {', '.join(Right)}")
        for deployment in self.deployments or ():
            check_name("deployment", deployment)

    def opens_at(self, now: datetime) -> bool:
        """Whether the key is good at that time."""
        return self.disabled_at is None and (self.expires_at is None or now < self.expires_at)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who sends a request, and what they may."""

    tenant: Tenant
    key_id: str
    rights: frozenset[Right]
    deployments: frozenset[str] | None = None
    limits: Limits = Limits()

    def may(self, right: Right) -> bool:
        """Whether a right is held."""
        return right in self.rights or Right.ADMIN in self.rights

    def may_use(self, deployment: str) -> bool:
        """Whether that deployment may be asked, whether it exists or not."""
        return self.may(Right.INFER) and (self.deployments is None or deployment in self.deployments)

    def priority(self, asked: int) -> int:
        """The priority of a request that asks for `asked`: who is no admin may stand back, and not push forward."""
        return self.tenant.priority + (asked if self.may(Right.ADMIN) else max(0, asked))

    def cache_salt(self, asked: str) -> str:
        """The salt of a request that asks for `asked`: no other tenant can name an isolated one's."""
        if self.tenant.is_isolated:
            return f"tenant:{self.tenant.name}:{asked}"
        return f"shared:{asked}" if asked else ""


ANYBODY = Caller(Tenant(), "", frozenset(Right))  # where no key is asked for


def parse_rights(names: list[str] | tuple[str, ...]) -> frozenset[Right]:
    """Rights by name. Raises `InvalidInput`."""
    try:
        return frozenset(Right(name) for name in names)
    except ValueError as error:
        raise InvalidInput(f"{error}: rights are {', '.join(Right)}") from error
