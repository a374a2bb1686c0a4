"""Copies of requests for a version that nobody waits for: what it would have answered, beside what was answered.

A copy is made when the caller's own answer is whole, waits in a queue of fixed length, and runs at the lowest priority
and at nobody's cost. What does not fit is dropped and counted. Nothing here raises or waits in a caller's path.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from sihe.core.clock import Clock
from sihe.core.telemetry import logger
from sihe.serving.engine.stream import GenerationStream
from sihe.serving.engine.types import MAX_PRIORITY, GenerationRequest
from sihe.serving.errors import StreamClosed
from sihe.serving.gateway.traffic.outcome import Observation, Outcome
from sihe.serving.gateway.traffic.presence import Presence
from sihe.serving.gateway.traffic.types import Shadow

Fate = Literal["compared", "failed", "yielded", "dropped"]
_MAX_AGE_S = 120.0  # a copy that has waited longer says nothing about the same load


@dataclass(frozen=True, slots=True)
class Comparison:
    """A caller's answer and the shadow's to the same request. `agreement` is the share of tokens before they part."""

    request_id: str
    request: GenerationRequest
    served_by: str
    caller: Outcome
    shadow: Outcome
    is_same: bool
    agreement: float


@dataclass(frozen=True, slots=True)
class ShadowReport:
    """What has become of copies since this process began to make them."""

    copies: int
    compared: int
    failed: int
    yielded: int
    dropped: int
    same: int
    mean_agreement: float | None
    mean_latency_ratio: float | None


@dataclass(frozen=True, slots=True)
class _Copy:
    request_id: str
    request: GenerationRequest
    outcome: Outcome
    made_s: float


class ShadowRunner:
    """Runs copies one after another on a thread of its own.

    `start` sends a request to the shadow's version and `is_ready` says whether that can serve. `on_comparison` gets
    each result, on this thread.
    """

    def __init__(
        self,
        name: str,
        shadow: Shadow,
        *,
        start: Callable[[GenerationRequest], GenerationStream],
        is_ready: Callable[[], bool],
        presence: Presence,
        clock: Clock,
        on_comparison: Callable[[Comparison], None],
        on_fate: Callable[[Fate], None],
    ) -> None:
        self.shadow = shadow
        self._start = start
        self._is_ready = is_ready
        self._presence = presence
        self._clock = clock
        self._on_comparison = on_comparison
        self._on_fate = on_fate
        self._log = logger("serving").bind(deployment=name)
        self._changed = threading.Condition()
        self._waiting: deque[_Copy] = deque()
        self._running: GenerationStream | None = None
        self._closing = False
        self._fates: dict[Fate, int] = {"compared": 0, "failed": 0, "yielded": 0, "dropped": 0}
        self._same = 0
        self._agreement = 0.0
        self._latency_ratio = 0.0
        self._stop_watching = presence.watch(self._step_back, self._wake)
        self._thread = threading.Thread(target=self._run, name=f"shadow {name}", daemon=True)
        self._thread.start()

    def offer(self, request_id: str, request: GenerationRequest, outcome: Outcome) -> None:
        """Takes a copy of a request that has been answered; drops it when the queue is full. Returns at once."""
        copy = replace(request, priority=MAX_PRIORITY, tenant="")
        with self._changed:
            is_full = self._closing or len(self._waiting) >= self.shadow.max_waiting
            if not is_full:
                self._waiting.append(_Copy(request_id, copy, outcome, self._clock.monotonic_s()))
                self._changed.notify_all()
        if is_full:
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
                if self._clock.monotonic_s() - copy.made_s > _MAX_AGE_S or not self._is_ready():
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
                    return self._waiting.popleft()
                self._changed.wait()
            return None

    def _compare(self, copy: _Copy) -> None:
        outcomes: list[Outcome] = []
        started_s = self._clock.monotonic_s()
        with self._start(copy.request) as stream:
            self._running = stream
            stream.watch(Observation(self._clock, started_s, outcomes.append, keeps_text=True))
            try:
                # Who came between the look and here has not been seen by `_step_back`.
                if self._closing or (self.shadow.only_idle and not self._presence.is_idle):
                    raise StreamClosed("a caller has come")
                stream.result()
            finally:
                self._running = None
        mine, other = outcomes[0], copy.outcome
        agreement = _agreement(other, mine)
        comparison = Comparison(
            copy.request_id, copy.request, stream.served_by, other, mine, agreement == 1.0, agreement
        )
        with self._changed:
            self._same += comparison.is_same
            self._agreement += agreement
            self._latency_ratio += mine.latency_s / max(other.latency_s, 1e-9)
        self._note("compared")
        self._on_comparison(comparison)

    def _note(self, fate: Fate) -> None:
        with self._changed:
            self._fates[fate] += 1
        self._on_fate(fate)


def _agreement(a: Outcome, b: Outcome) -> float:
    """The share of the longer answer's tokens up to the first that differs; by characters where tokens are unknown."""
    left, right = (a.token_ids, b.token_ids) if a.token_ids and b.token_ids else (a.text or "", b.text or "")
    longer = max(len(left), len(right))
    if longer == 0:
        return 1.0
    same = next(
        (place for place, (x, y) in enumerate(zip(left, right, strict=False)) if x != y), min(len(left), len(right))
    )
    return same / longer
