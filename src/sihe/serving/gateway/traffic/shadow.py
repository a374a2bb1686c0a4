"""Copies of requests for a version that nobody waits for: what it would have answered, beside what was answered.

A copy is made when the caller's own answer is whole, waits in a queue of fixed length, and runs at the lowest priority
and at nobody's cost. What does not fit is dropped and counted. Nothing here raises or waits in a caller's path. What a
copy is, and how its answer is compared, depends on the kind of model (`copies`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from sihe.core.clock import Clock
from sihe.core.telemetry import logger
from sihe.serving.errors import StreamClosed
from sihe.serving.exchange import Measure
from sihe.serving.gateway.traffic.copies import Copied, Found, Running, ShadowRoute
from sihe.serving.gateway.traffic.presence import Presence
from sihe.serving.gateway.traffic.types import Shadow

Fate = Literal["compared", "failed", "yielded", "dropped"]
_MAX_AGE_S = 120.0  # a copy that has waited longer says nothing about the same load
_MAX_WAITING_BYTES = 64 * 2**20  # of tensors and texts that wait for the shadow


@dataclass(frozen=True, slots=True)
class Comparison:
    """A caller's request, and how the shadow answered it."""

    request_id: str
    copied: Copied
    found: Found


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """What has become of copies for the version behind `target` since the serving process began to make them.

    `mean_agreement` is of a `measure` that suits the model (`exchange.Agreement`); both are None before the first
    comparison, and so is `mean_latency_s`, of the shadow's answers.
    """

    copies: int
    compared: int
    failed: int
    yielded: int
    dropped: int
    same: int
    mean_agreement: float | None
    mean_latency_ratio: float | None
    measure: Measure | None = None
    mean_latency_s: float | None = None
    target: str = ""


@dataclass(frozen=True, slots=True)
class _Copy:
    request_id: str
    copied: Copied
    size: int
    made_s: float


class ShadowRunner:
    """Runs copies one after another on a thread of its own.

    `route` is that of the shadow's version. `on_comparison` gets each result, on this thread.
    """

    def __init__(
        self,
        name: str,
        shadow: Shadow,
        *,
        route: ShadowRoute,
        presence: Presence,
        clock: Clock,
        on_comparison: Callable[[Comparison], None],
        on_fate: Callable[[Fate], None],
    ) -> None:
        self.shadow = shadow
        self._route = route
        self._presence = presence
        self._clock = clock
        self._on_comparison = on_comparison
        self._on_fate = on_fate
        self._log = logger("serving").bind(deployment=name)
        self._changed = threading.Condition()
        self._waiting: deque[_Copy] = deque()
        self._waiting_bytes = 0
        self._running: Running | None = None
        self._closing = False
        self._fates: dict[Fate, int] = {"compared": 0, "failed": 0, "yielded": 0, "dropped": 0}
        self._same = 0
        self._agreement = 0.0
        self._latency_ratio = 0.0
        self._latency_s = 0.0
        self._measure: Measure | None = None
        self._stop_watching = presence.watch(self._step_back, self._wake)
        self._thread = threading.Thread(target=self._run, name=f"shadow {name}", daemon=True)
        self._thread.start()

    def offer(self, request_id: str, copied: Copied) -> None:
        """Takes a copy of a request that has been answered; drops it when the queue is full. Returns at once."""
        size = copied.size
        with self._changed:
            fits = len(self._waiting) < self.shadow.max_waiting and self._waiting_bytes + size <= _MAX_WAITING_BYTES
            is_taken = fits and not self._closing
            if is_taken:
                self._waiting.append(_Copy(request_id, copied, size, self._clock.monotonic_s()))
                self._waiting_bytes += size
                self._changed.notify_all()
        if not is_taken:
            self._note("dropped")

    def report(self) -> ShadowReport:
        """What has become of copies so far."""
        with self._changed:
            compared = self._fates["compared"]
            return ShadowReport(
                copies=sum(self._fates.values()),
                compared=compared,
                failed=self._fates["failed"],
                yielded=self._fates["yielded"],
                dropped=self._fates["dropped"],
                same=self._same,
                mean_agreement=self._agreement / compared if compared else None,
                mean_latency_ratio=self._latency_ratio / compared if compared else None,
                measure=self._measure,
                mean_latency_s=self._latency_s / compared if compared else None,
                target=self.shadow.target,
            )

    def close(self) -> None:
        """Forgets what waits, gives up what runs, and ends the thread."""
        self._stop_watching()
        with self._changed:
            self._closing = True
            self._changed.notify_all()
            running = self._running
        if running is not None:
            running.close()
        self._thread.join()

    # ---- callers' side: at once, and never an error -----------------------------------------------------------------

    def _step_back(self) -> None:
        """A caller comes: what runs here makes room."""
        running = self._running
        if running is not None and self.shadow.only_idle:
            try:
                running.close()
            except Exception as error:  # noqa: BLE001 - on a caller's thread
                self._log.warning("shadow_not_stopped", error=repr(error))

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    # ---- the runner's thread ----------------------------------------------------------------------------------------

    def _run(self) -> None:
        while (copy := self._next()) is not None:
            try:
                if self._clock.monotonic_s() - copy.made_s > _MAX_AGE_S or not self._route.is_ready:
                    self._note("dropped")
                else:
                    self._compare(copy)
            except StreamClosed:
                self._note("yielded")
            except Exception as error:  # noqa: BLE001 - a shadow's failure is a finding, and nobody else's trouble
                self._log.info("shadow_failed", request=copy.request_id, error=repr(error))
                self._note("failed")

    def _next(self) -> _Copy | None:
        with self._changed:
            while not self._closing:
                if self._waiting and (self._presence.is_idle or not self.shadow.only_idle):
                    copy = self._waiting.popleft()
                    self._waiting_bytes -= copy.size
                    return copy
                self._changed.wait()
            return None

    def _compare(self, copy: _Copy) -> None:
        running = copy.copied.start(self._route, self._clock)
        try:
            self._running = running
            # Who came between the look and here has not been seen by `_step_back`.
            if self._closing or (self.shadow.only_idle and not self._presence.is_idle):
                raise StreamClosed("a caller has come")
            found = running.result()
        finally:
            self._running = None
            running.end()
        caller_s, shadow_s = copy.copied.outcome.latency_s, found.outcome.latency_s
        with self._changed:
            self._same += found.agreement.is_same
            self._agreement += found.agreement.share
            self._measure = found.agreement.measure
            self._latency_s += shadow_s
            self._latency_ratio += shadow_s / max(caller_s, 1e-9)
        self._note("compared")
        self._on_comparison(Comparison(copy.request_id, copy.copied, found))

    def _note(self, fate: Fate) -> None:
        with self._changed:
            self._fates[fate] += 1
        self._on_fate(fate)
