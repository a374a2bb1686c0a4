"""What a request demands under its caller's limits, and what the answer to the demand says to the client. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import NamedTuple

from sihe.serving.errors import OverLimit, QuotaExceeded, RateLimited
from sihe.serving.tenants.bucket import Rate, full_in_s, wait_s
from sihe.serving.tenants.ports import Counted, Decision, Demand, Meter, Slots
from sihe.serving.tenants.types import Caller, Limits

_CONCURRENCY_RETRY_S = 1.0  # when a running request ends is unknown
_DAYS_TO_KEEP_TRYING_S = 60.0  # OpenAI's clients wait for at most so long: later than that they must not retry


class Scope(NamedTuple):
    """Whose limits: a tenant's, or one key's."""

    kind: str
    name: str


class Quota(NamedTuple):
    """`limit` tokens of a scope since `since`, until `until`."""

    scope: Scope
    period: str
    limit: int
    since: date
    until: datetime


def scopes(caller: Caller) -> Iterator[tuple[Scope, Limits]]:
    """The tenant's limits, and the key's own."""
    yield Scope("tenant", caller.tenant.name), caller.tenant.limits
    if caller.key_id:
        yield Scope("key", caller.key_id), caller.limits


def demand_of(caller: Caller, tokens: int) -> Demand:
    """What a request of about `tokens` takes from each of the caller's meters."""
    meters: list[Meter] = []
    slots: list[Slots] = []
    for scope, limits in scopes(caller):
        name = f"{scope.kind}:{scope.name}"
        if limits.requests_per_min is not None:
            meters.append(Meter(f"{name}:requests", "requests", Rate.per_minute(limits.requests_per_min), 1))
        if limits.tokens_per_min is not None:
            meters.append(Meter(f"{name}:tokens", "tokens", Rate.per_minute(limits.tokens_per_min), tokens))
        if limits.concurrency is not None:
            slots.append(Slots(name, limits.concurrency))
    return Demand(caller.tenant.name, tuple(meters), tuple(slots))


def largest_request(caller: Caller) -> float:
    """Tokens that a request may ever have under the rates; infinite without any."""
    rates = [limits.tokens_per_min for _, limits in scopes(caller) if limits.tokens_per_min is not None]
    return min(rates, default=math.inf)


def quotas_of(caller: Caller, now: datetime) -> Iterator[Quota]:
    """The quotas that hold now."""
    today = now.astimezone(UTC).date()
    first = today.replace(day=1)
    next_month = (first + timedelta(days=32)).replace(day=1)
    for scope, limits in scopes(caller):
        if limits.tokens_per_day is not None:
            yield Quota(scope, "day", limits.tokens_per_day, today, _midnight(today + timedelta(days=1)))
        if limits.tokens_per_month is not None:
            yield Quota(scope, "month", limits.tokens_per_month, first, _midnight(next_month))


def refusal(demand: Demand, decision: Decision) -> RateLimited | OverLimit | None:
    """The error of a demand that was not met: the meter that makes the caller wait longest."""
    if decision.is_granted:
        return None
    for asked in demand.meters:
        if asked.amount > asked.rate.capacity:
            return OverLimit(asked.name, limit=int(asked.rate.capacity), actual=int(asked.amount))
    waits = [
        (wait_s(meter.rate, present, meter.amount), meter)
        for meter, present in zip(demand.meters, decision.present, strict=True)
    ]
    longest, meter = max(waits, key=lambda item: item[0]) if waits else (0.0, None)
    if meter is not None and longest > 0:
        whose = meter.name.rpartition(":")[0]
        return RateLimited(
            f"{meter.counts}_per_min of {whose} is {meter.rate.capacity:.0f}, this request needs {meter.amount:.0f}",
            counts=meter.counts,
            retry_after_s=longest,
            headers=headers(demand, decision),
        )
    for slots, busy in zip(demand.slots, decision.running, strict=True):
        if busy >= slots.limit:
            return RateLimited(
                f"{busy} requests of {slots.name} run already, and {slots.limit} may",
                counts="concurrency",
                retry_after_s=_CONCURRENCY_RETRY_S,
                headers=headers(demand, decision),
            )
    # What was missing came back between the two looks at it.
    return RateLimited("the limit was just reached", counts="requests", retry_after_s=1.0, headers={})


def exceeded(quota: Quota, spent: int, asked: int, now: datetime) -> QuotaExceeded:
    """The error of a request for about `asked` tokens where `spent` of a quota are gone, or promised."""
    retry_s = (quota.until - now).total_seconds()
    return QuotaExceeded(
        f"{quota.scope.kind}:{quota.scope.name} may use {quota.limit} tokens a {quota.period}, has used {spent} and "
        f"asks for about {asked} more: ask for fewer, or come back at {quota.until.isoformat()}",
        period=quota.period,
        retry_after_s=retry_s,
        headers={"x-should-retry": "false"} if retry_s > _DAYS_TO_KEEP_TRYING_S else {},
    )


def headers(demand: Demand, decision: Decision) -> dict[str, str]:
    """OpenAI's `x-ratelimit-*` headers: of each kind, of the meter that has least left."""
    said: dict[str, str] = {}
    kinds: tuple[Counted, ...] = ("requests", "tokens")
    for kind in kinds:
        left = [
            (present, meter.rate)
            for meter, present in zip(demand.meters, decision.present, strict=True)
            if meter.counts == kind
        ]
        if left:
            present, rate = min(left, key=lambda item: item[0])
            said[f"x-ratelimit-limit-{kind}"] = f"{rate.capacity:.0f}"
            said[f"x-ratelimit-remaining-{kind}"] = str(max(0, math.floor(present)))
            said[f"x-ratelimit-reset-{kind}"] = duration(full_in_s(rate, present))
    return said


def duration(seconds: float) -> str:
    """A time as OpenAI writes it: `17ms`, `1s`, `6m0s`, `1h2m3s`. Rounded up, so that who waits for it is not early."""
    if seconds < 1:
        return f"{math.ceil(seconds * 1000)}ms"
    whole = math.ceil(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return (f"{hours}h" if hours else "") + (f"{minutes}m" if whole >= 60 else "") + f"{whole % 60}s"


def _midnight(day: date) -> datetime:
    return datetime(day.year, day.month, day.day, tzinfo=UTC)
