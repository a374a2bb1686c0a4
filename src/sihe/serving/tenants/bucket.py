"""A token bucket as a function of time: how much there is, how long to wait, what is left. Pure.

A bucket of `capacity` fills at `per_s` and holds no more. What is taken is an estimate; when the truth is known the
difference is given back, or taken on top: then the level may fall below zero, and the debt is worked off before the
next request passes. Over any span of T seconds at most `capacity + per_s * T` is granted, plus what was underestimated.
(The bucket: Turner, "New directions in communications", IEEE Communications 24(10), 1986; RFC 2697 uses its debt-free
form.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rate:
    """How large a bucket is and how fast it fills."""

    capacity: float
    per_s: float

    def __post_init__(self) -> None:
        if not (0 < self.capacity < math.inf and 0 < self.per_s < math.inf):
            raise ValueError(f"a rate has a positive capacity and speed, got {self.capacity!r} and {self.per_s!r}")

    @classmethod
    def per_minute(cls, amount: float) -> Rate:
        """`amount` a minute, all of which may come at once."""
        return cls(float(amount), amount / 60)


@dataclass(frozen=True, slots=True)
class Level:
    """What was in a bucket at a moment."""

    amount: float
    at_s: float


def amount_at(rate: Rate, level: Level | None, now_s: float) -> float:
    """What is in a bucket now: it is full before its first use. A clock that goes back fills nothing."""
    if level is None:
        return rate.capacity
    return min(rate.capacity, level.amount + max(0.0, now_s - level.at_s) * rate.per_s)


def taken(rate: Rate, level: Level | None, amount: float, now_s: float) -> Level:
    """The level after `amount` was taken, or, where it is negative, given back."""
    at_s = now_s if level is None else max(now_s, level.at_s)
    return Level(min(rate.capacity, amount_at(rate, level, now_s) - amount), at_s)


def wait_s(rate: Rate, present: float, amount: float) -> float:
    """How long until `amount` is there, where `present` is; infinite for more than the bucket holds."""
    if amount > rate.capacity:
        return math.inf
    return max(0.0, (amount - present) / rate.per_s)


def full_in_s(rate: Rate, present: float) -> float:
    """How long until the bucket is full."""
    return max(0.0, (rate.capacity - present) / rate.per_s)
