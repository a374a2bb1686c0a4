"""Rates counted in the memory of this process."""

from __future__ import annotations

import threading

from sihe.core.clock import Clock
from sihe.serving.tenants.bucket import Level, amount_at, taken
from sihe.serving.tenants.ports import Decision, Demand


class LocalCounter:
    """A `RateCounter` for one process. It remembers a bucket for each tenant and key that was seen with a limit."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._levels: dict[str, Level] = {}
        self._running: dict[str, int] = {}

    def take(self, demand: Demand) -> Decision:
        """Takes everything that is demanded, or nothing."""
        now_s = self._clock.monotonic_s()
        with self._lock:
            present = [amount_at(meter.rate, self._levels.get(meter.name), now_s) for meter in demand.meters]
            running = [self._running.get(slots.name, 0) for slots in demand.slots]
            granted = all(there >= meter.amount for there, meter in zip(present, demand.meters, strict=True)) and all(
                busy < slots.limit for busy, slots in zip(running, demand.slots, strict=True)
            )
            if granted:
                for meter in demand.meters:
                    self._levels[meter.name] = taken(meter.rate, self._levels.get(meter.name), meter.amount, now_s)
                for slots in demand.slots:
                    self._running[slots.name] = self._running.get(slots.name, 0) + 1
                present = [self._levels[meter.name].amount for meter in demand.meters]
                running = [busy + 1 for busy in running]
        return Decision(granted, tuple(present), tuple(running), "")

    def settle(self, demand: Demand, lease: str, refunds: dict[str, float]) -> None:
        """Frees the slots and corrects the buckets."""
        now_s = self._clock.monotonic_s()
        with self._lock:
            for slots in demand.slots:
                left = self._running.pop(slots.name) - 1
                if left:  # a name of which nothing runs is forgotten: keys come and go
                    self._running[slots.name] = left
            for meter in demand.meters:
                if refund := refunds.get(meter.name):
                    self._levels[meter.name] = taken(meter.rate, self._levels.get(meter.name), -refund, now_s)

    def close(self) -> None:
        """Nothing runs in the background."""
