"""A request on its way through the replicas: until its first token it can change them, afterwards it cannot.

Generating has no side effects, so a request that nobody has seen a token of may be computed again, or twice at once;
one whose answer has begun ends with the error of its replica, as another replica could go on with other words.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import Protocol

from sihe.core.errors import InternalError, Unreachable, UserError
from sihe.serving.engine.stream import GenerationStream, Wake
from sihe.serving.engine.types import GenerationEvent, GenerationRequest
from sihe.serving.errors import EngineClosed, EngineDead, QueueFull, ReplicaLost
from sihe.serving.gateway.replicas.alarms import Alarm
from sihe.serving.gateway.replicas.balancer import prefix_of, work_of
from sihe.serving.gateway.replicas.replica import Replica

LOST = (EngineClosed, EngineDead, ReplicaLost, Unreachable)
"""Errors of a replica, not of the request: another one may answer it."""


class Desk(Protocol):
    """Who hears how requests fare (`Dispatcher`). Called from engines' threads: returns at once."""

    def began(self, answer: RoutedStream, replica: Replica) -> None:
        """The first event has come."""
        ...

    def finished(self, replica: Replica) -> None:
        """An answer is whole, or the replica found something wrong with the request: either way it does well."""
        ...

    def failed(self, answer: RoutedStream, replica: Replica, error: BaseException, *, again: bool) -> None:
        """A replica failed; with `again` the request must be sent to another."""
        ...

    def left(self, answer: RoutedStream) -> None:
        """The reader has closed the stream."""
        ...


@dataclass(slots=True, eq=False)
class Attempt:
    """One try on one replica."""

    answer: RoutedStream
    replica: Replica
    stream: GenerationStream | None = field(default=None, repr=False)

    def relay(self, said: GenerationEvent | BaseException) -> Wake | None:
        """Takes what the replica's engine says."""
        return self.answer.hear(self, said)

    def close(self) -> None:
        """Aborts it."""
        if self.stream is not None:
            self.stream.close()


class RoutedStream(GenerationStream):
    """The stream of a request whose replica may change before its first event."""

    def __init__(self, id: int, request: GenerationRequest, desk: Desk, *, now_s: float, max_attempts: int) -> None:
        super().__init__(id, "", abort=self._leave)
        self.request = request
        self.began_s = now_s
        self.work = work_of(request)
        self.prefix = prefix_of(request)
        self.tried: set[int] = set()
        self.waits_until_s: float | None = None
        """Until when (monotonic) it may wait for a replica."""
        self._desk = desk
        self._attempts_left = max_attempts
        self._lock = threading.Lock()
        self._running: list[Attempt] = []
        self._winner: Attempt | None = None
        self._over = False
        self._alarms: list[Alarm] = []

    @property
    def is_over(self) -> bool:
        """Whether nothing more will come."""
        return self._over

    @property
    def has_begun(self) -> bool:
        """Whether the first event has come."""
        return self._winner is not None

    def expect(self, alarm: Alarm) -> None:
        """Keeps an alarm that is about this request for as long as it is not over, and then cancels it."""
        with self._lock:
            if not self._over:
                self._alarms.append(alarm)
                return
        alarm.cancel()

    def attempt(self, replica: Replica) -> Attempt:
        """Takes note that the request goes to `replica`."""
        attempt = Attempt(self, replica)
        with self._lock:
            self.tried.add(replica.id)
            self._attempts_left -= 1
            self._running.append(attempt)
            if self._winner is None:
                self.served_by = replica.served_by
        return attempt

    def refused(self, attempt: Attempt) -> None:
        """The replica did not take it, which costs no attempt."""
        with self._lock:
            if attempt in self._running:
                self._running.remove(attempt)
            self._attempts_left += 1

    def accepted(self, attempt: Attempt, stream: GenerationStream) -> None:
        """The replica took it; it is aborted at once where that has become pointless."""
        with self._lock:
            attempt.stream = stream
            # It may have ended, or begun elsewhere, while the replica read the prompt.
            pointless = self._over or attempt not in self._running or self._winner not in (None, attempt)
            if pointless and attempt in self._running:
                self._running.remove(attempt)
        if pointless:
            stream.close()

    def end(self, error: BaseException) -> Wake | None:
        """Ends it with an error, whatever runs; the reader to wake."""
        with self._lock:
            if self._over:
                return None
            running, self._running, self._over = self._running, [], True
        self._forget_alarms()
        for attempt in running:
            attempt.close()
        return self.fail(error)

    def hear(self, attempt: Attempt, said: GenerationEvent | BaseException) -> Wake | None:
        """Takes what an attempt's engine says; the reader to wake. On the engine's thread."""
        if isinstance(said, BaseException):
            return self._hear_error(attempt, said)
        losers: list[Attempt] = []
        with self._lock:
            if self._over or self._winner not in (None, attempt):
                return None
            first = self._winner is None
            if first:
                losers = [other for other in self._running if other is not attempt]
                self._winner, self._running = attempt, [attempt]
                self.served_by = attempt.replica.served_by
            self._over = said.finish_reason is not None
        for loser in losers:
            loser.close()
        if first:
            self._desk.began(self, attempt.replica)
        if said.finish_reason is not None:
            self._forget_alarms()
            self._desk.finished(attempt.replica)
        return self.deliver(said)

    def _hear_error(self, attempt: Attempt, error: BaseException) -> Wake | None:
        with self._lock:
            if self._over or attempt not in self._running:
                return None
            self._running.remove(attempt)
            has_begun = self._winner is attempt
            another_runs = bool(self._running) and not has_begun
            again = not has_begun and not another_runs and isinstance(error, (*LOST, QueueFull))
            again = again and self._attempts_left > 0
            last = not another_runs and not again
            self._over |= last
        if isinstance(error, (*LOST, QueueFull, InternalError)):
            self._desk.failed(self, attempt.replica, error, again=again)
        elif isinstance(error, UserError):
            self._desk.finished(attempt.replica)
        if not last:
            return None
        self._forget_alarms()
        return self.fail(error)

    def _leave(self, _id: int) -> None:
        with self._lock:
            running, self._running, self._over = self._running, [], True
        self._forget_alarms()
        for attempt in running:
            attempt.close()
        self._desk.left(self)

    def _forget_alarms(self) -> None:
        """They hold the request: it must not stay in memory until a deadline that matters no more."""
        with self._lock:
            alarms, self._alarms = self._alarms, []
        for alarm in alarms:
            alarm.cancel()
