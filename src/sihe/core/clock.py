"""Time as a dependency: logic that needs it takes a `Clock`, so that tests turn the hands themselves."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from typing import Protocol


class Clock(Protocol):
    """Wall time for records, monotonic time for durations."""

    def now(self) -> datetime:
        """Wall time, aware, in UTC."""
        ...

    def monotonic_s(self) -> float:
        """Seconds that never run backwards; only differences mean anything."""
        ...


class SystemClock:
    """The machine's clock."""

    def now(self) -> datetime:
        """The system's wall time."""
        return datetime.now(UTC)

    def monotonic_s(self) -> float:
        """The system's monotonic clock."""
        return time.monotonic()


class FakeClock:
    """A clock that stands still until `advance` is called."""

    def __init__(self, start: datetime = datetime(2026, 1, 1, tzinfo=UTC)) -> None:
        self._now = start
        self._elapsed_s = 0.0

    def now(self) -> datetime:
        """The time it was last set to."""
        return self._now

    def monotonic_s(self) -> float:
        """Seconds advanced so far."""
        return self._elapsed_s

    def advance(self, seconds: float) -> None:
        """Move both hands forward by `seconds` (must not be negative)."""
        if seconds < 0:
            raise ValueError(f"a clock cannot go back by {seconds!r} s")
        self._now += timedelta(seconds=seconds)
        self._elapsed_s += seconds
