"""Sends requests to replicas: to the right one, to another when that one is lost, to a second one when it is late.

A request that finds no replica while one is on its way waits here, in a queue with a bound and a longest wait; so does
one whose replica was lost before its first token. What is decided about whom is the balancer's, the breaker's and the
hedger's; this acts on it.
"""

from __future__ import annotations

import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from sihe.core.clock import Clock
from sihe.core.errors import UserError
from sihe.core.telemetry import logger
from sihe.serving.engine.stream import wake_readers
from sihe.serving.engine.types import GenerationRequest
from sihe.serving.errors import DeadlineExceeded, NotReady, QueueFull, StreamClosed
from sihe.serving.gateway.replicas.alarms import Alarms
from sihe.serving.gateway.replicas.answer import LOST, RoutedStream
from sihe.serving.gateway.replicas.balancer import choose
from sihe.serving.gateway.replicas.config import ReplicaConfig
from sihe.serving.gateway.replicas.hedging import Hedger
from sihe.serving.gateway.replicas.replica import Replica

_THREADS = 4  # that send requests again: tokenising a long prompt must not hold up the next one
_HEDGE_AGAIN_S = 0.05  # until a request that may not be sent twice yet is looked at again; then twice as long
_RECENT = 500  # waits for the first token that are kept
_RECENT_S = 60.0
_MAX_BLOCKED = 16  # threads that wait for a replica: each is one of the server's pool, which answers others too
_PLACES = threading.BoundedSemaphore(24)  # for them, of all deployments together: the pools have 32 and 40 threads


class Dispatcher:
    """The requests of one route. Thread-safe.

    `why_none` says why there is no replica, or None when one is on its way; `on_change` hears that a request waits or
    that a replica failed.
    """

    def __init__(
        self,
        name: str,
        config: ReplicaConfig,
        *,
        clock: Clock,
        why_none: Callable[[], NotReady | None],
        on_change: Callable[[], None],
    ) -> None:
        self._name = name
        self._config = config
        self._clock = clock
        self._why_none = why_none
        self._on_change = on_change
        self._log = logger("serving").bind(deployment=name)
        self._replicas: tuple[Replica, ...] = ()  # replaced whole, so that requests read it without a lock
        self._ids = count()
        self._random = random.Random()
        self._lock = threading.Lock()
        self._opened = threading.Condition(self._lock)
        self._openings = 0  # grows whenever there may be a place: who puts a request back looks whether it has
        self._waiting: deque[RoutedStream] = deque()
        self._blocked = 0  # threads in `obtain` that wait
        self._waits_s: deque[tuple[float, float]] = deque(maxlen=_RECENT)  # (when, time to the first token)
        self._hedger = Hedger(config.hedge)
        self._last_request_s: float | None = None
        self._alarms = Alarms(f"alarms {name}")
        self._pool: ThreadPoolExecutor | None = None
        self._closed = False

    # ---- what the route says ----------------------------------------------------------------------------------------

    def configure(self, config: ReplicaConfig) -> None:
        """Takes new limits."""
        with self._lock:
            if config.hedge != self._config.hedge:
                self._hedger = Hedger(config.hedge)
            self._config = config

    def open_to(self, replicas: Sequence[Replica]) -> None:
        """New requests go to these from now on, and those that wait do too."""
        self._replicas = tuple(replicas)
        self._serve_waiting_soon()

    def give_up_waiting(self, error: Exception) -> None:
        """Ends every request that waits."""
        with self._lock:
            waiting, self._waiting = list(self._waiting), deque()
            self._openings += 1
            self._opened.notify_all()
        for answer in waiting:
            _end(answer, error)

    def stop(self) -> None:
        """No request is sent again, or waits, from now on. What runs goes on, and its deadline with it."""
        with self._lock:
            self._closed = True
            pool = self._pool
        self.give_up_waiting(self._removed())
        if pool is not None:
            pool.shutdown(wait=False)

    def close(self) -> None:
        """The same, and no deadline holds any more: when every stream has ended."""
        self.stop()
        self._alarms.close()

    # ---- what the route asks ----------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a replica."""
        return len(self._waiting) + self._blocked

    @property
    def last_request_s(self) -> float | None:
        """When the last request came."""
        return self._last_request_s

    def ttft_s(self) -> float | None:
        """The 95th percentile of the times to the first token in the last minute."""
        oldest_s = self._clock.monotonic_s() - _RECENT_S
        with self._lock:
            waits = sorted(wait_s for at_s, wait_s in self._waits_s if at_s >= oldest_s)
        return waits[min(len(waits) - 1, int(0.95 * len(waits)))] if waits else None

    def pick(self, *, prefix: bytes | None = None, work: float = 1.0, avoid: frozenset[int] = frozenset()) -> Replica:
        """The replica for a request. Raises `NotReady` when there is none beside those to `avoid`."""
        now_s = self._clock.monotonic_s()
        there = {replica.id: replica for replica in self._replicas if replica.id not in avoid and replica.is_serving}
        chosen = choose(
            [replica.ledger.candidate(replica.id, now_s) for replica in there.values()], prefix, self._random, work=work
        )
        if chosen is None:
            raise self._why_none() or NotReady(self._name, "its replicas are on their way")
        return there[chosen]

    def obtain(
        self,
        *,
        work: float = 1.0,
        avoid: frozenset[int] = frozenset(),
        block: bool = True,
        until_s: float | None = None,
    ) -> Replica:
        """The same; where none is there and one is on its way, the thread waits for it, for at most `wait_s`, and not
        beyond `until_s` on the system's monotonic clock.

        Raises `NotReady` when none comes, where it must not `block`, and where sixteen threads wait already, or
        twenty-four for all deployments of this process.
        """
        self._last_request_s = self._clock.monotonic_s()
        own_s = float("inf") if until_s is None else until_s
        until_s = min(time.monotonic() + self._config.wait_s, own_s)
        while True:
            seen = self._openings
            try:
                return self.pick(work=work, avoid=avoid)
            except NotReady as error:
                reason = self._why_none() or (self._removed() if self._closed else None)
                if reason is not None:
                    raise reason from None
                if not block or not self._may_block(until_s):
                    raise error from None
            try:
                self._on_change()  # it may be asleep
                self._wait_for_opening(seen, until_s)
            finally:
                with self._lock:
                    self._blocked -= 1
                _PLACES.release()

    def _wait_for_opening(self, seen: int, until_s: float) -> None:
        with self._lock:
            self._opened.wait_for(lambda: self._openings != seen, until_s - time.monotonic())

    def _may_block(self, until_s: float) -> bool:
        """Whether one thread more may wait, which is counted then."""
        with self._lock:
            if self._closed or self._blocked >= _MAX_BLOCKED or time.monotonic() >= until_s:
                return False
            if not _PLACES.acquire(blocking=False):
                return False
            self._blocked += 1
            return True

    # ---- requests ---------------------------------------------------------------------------------------------------

    def generate(self, request: GenerationRequest, *, timeout_s: float | None = None) -> RoutedStream:
        """Starts a request, which is answered within `timeout_s`, its own limit, and within the deployment's.

        Raises what is wrong with it, `QueueFull` when every replica's queue is full, `NotReady` when there is no
        replica and none comes, and `DeadlineExceeded` where no time is left.
        """
        now_s = self._last_request_s = self._clock.monotonic_s()
        if timeout_s is not None and timeout_s <= 0:
            raise DeadlineExceeded(timeout_s, begun=False, is_own=True)
        answer = RoutedStream(next(self._ids), request, self, now_s=now_s, max_attempts=self._config.max_attempts)
        self._limit(answer, timeout_s)  # first: reading the prompt takes of the time, too
        try:
            if not self._sent(answer):
                self._wait(answer)
        except BaseException:
            answer.close()  # lets go of its deadline
            raise
        self._plan_hedge(answer)
        return answer

    def _limit(self, answer: RoutedStream, own_s: float | None) -> None:
        general_s = self._config.timeout_s
        is_own = own_s is not None and (general_s is None or own_s <= general_s)
        limit_s = own_s if is_own else general_s
        if limit_s is not None:
            answer.expect(self._alarms.after(limit_s, lambda: self._expire(answer, limit_s, is_own=is_own)))

    def _sent(self, answer: RoutedStream, *, elsewhere: bool = False) -> bool:
        """Whether a replica took it: first those that it was not on, and then, unless it must go `elsewhere`, any.

        Raises what is wrong with the request, and `QueueFull`.
        """
        refusing: set[int] = set()
        full: list[QueueFull] = []
        while (replica := self._next(answer, refusing, elsewhere=elsewhere)) is not None:
            refusing.add(replica.id)
            attempt = answer.attempt(replica)
            try:
                stream = replica.submit(
                    answer.request,
                    answer.work,
                    self._clock.monotonic_s(),
                    on_done=self._serve_waiting_soon,
                    relay=attempt.relay,
                )
            except QueueFull as error:
                answer.refused(attempt)
                full.append(error)
            except LOST as error:
                answer.refused(attempt)
                self._note_failure(replica, error)
            except BaseException as error:
                answer.refused(attempt)
                if isinstance(error, UserError):
                    self.finished(replica)  # which has read it and found it wrong: it does well
                raise
            else:
                answer.accepted(attempt, stream)
                return True
        if full:
            raise min(full, key=lambda error: error.retry_after_s)
        return False

    def _next(self, answer: RoutedStream, refusing: set[int], *, elsewhere: bool) -> Replica | None:
        for avoid in (answer.tried | refusing, answer.tried if elsewhere else refusing):
            try:
                return self.pick(prefix=answer.prefix, work=answer.work, avoid=frozenset(avoid))
            except NotReady:
                continue
        return None

    def _wait(self, answer: RoutedStream) -> None:
        """Puts a request that has just come into the queue. Raises `NotReady`, `QueueFull`."""
        reason = self._why_none()
        if reason is not None:
            raise reason
        with self._lock:
            if self._closed:
                raise self._removed()
            waiting = len(self._waiting)
            if waiting < self._config.max_waiting:
                self._waiting.append(answer)
        if waiting >= self._config.max_waiting:
            raise QueueFull(waiting, retry_after_s=max(1.0, min(60.0, self._config.wait_s)))
        self._limit_wait(answer)
        self._serve_waiting_soon()  # a replica may have come between the two
        self._on_change()

    def _limit_wait(self, answer: RoutedStream) -> None:
        wait_s = self._config.wait_s
        answer.waits_until_s = time.monotonic() + wait_s
        answer.expect(self._alarms.after(wait_s, lambda: self._give_up(answer)))

    def _give_up(self, answer: RoutedStream) -> None:
        until_s = answer.waits_until_s
        # It may have been sent since, and wait anew: then this alarm is not the one that counts.
        if until_s is not None and time.monotonic() >= until_s and self._forget(answer):
            _end(answer, self._too_late())

    def _forget(self, answer: RoutedStream) -> bool:
        """Takes a request out of the queue; whether it was there."""
        with self._lock:
            try:
                self._waiting.remove(answer)
            except ValueError:
                return False
            return True

    def _serve_waiting_soon(self) -> None:
        """On another thread, as this one may be an engine's."""
        with self._lock:
            self._openings += 1
            self._opened.notify_all()
            waits = bool(self._waiting)
        if waits:
            self._later(self._serve_waiting)

    def _serve_waiting(self) -> None:
        """Sends what waits, in order, as long as replicas take it."""
        while True:
            with self._lock:
                if not self._waiting or not self._replicas:
                    return
                answer, seen = self._waiting.popleft(), self._openings
            if answer.is_over:
                continue
            try:
                sent = self._sent(answer)
            except QueueFull:
                sent = False
            except Exception as error:  # noqa: BLE001 - it belongs to the one request
                _end(answer, error)
                continue
            if not sent and not self._put_back(answer, seen):
                return

    def _put_back(self, answer: RoutedStream, seen: int) -> bool:
        """Lets a request wait on that was taken out of the queue; whether a place may have become free meanwhile.

        Whoever looked for it in the queue at that time did not find it: what they would have done is done here.
        """
        with self._lock:
            is_closed = self._closed
            is_late = answer.waits_until_s is not None and time.monotonic() >= answer.waits_until_s
            waits = not (is_closed or is_late or answer.is_over)
            if waits:
                self._waiting.appendleft(answer)
            may_be_free = self._openings != seen
        if not waits:
            _end(answer, self._removed() if is_closed else self._too_late())
        return may_be_free

    def _again(self, answer: RoutedStream, error: BaseException) -> None:
        """Sends a request whose replica was lost to another one, now or when there is one."""
        if answer.is_over:
            return
        was_refused = isinstance(error, QueueFull)  # asking the same replica again would be refused again
        try:
            if self._sent(answer, elsewhere=was_refused):
                return
        except QueueFull:
            pass  # the replicas that are left are full: it waits for the first place
        except Exception as refusal:  # noqa: BLE001 - it belongs to the one request
            _end(answer, refusal)
            return
        is_hopeless = was_refused or (not self._replicas and self._why_none() is not None)
        self._limit_wait(answer)
        with self._lock:
            waits = not (self._closed or is_hopeless or answer.is_over)
            if waits:
                self._waiting.appendleft(answer)  # it came before those that wait
        if not waits:
            _end(answer, error)
            return
        self._later(self._serve_waiting)  # a replica may have come between the two
        self._on_change()

    def _expire(self, answer: RoutedStream, limit_s: float, *, is_own: bool) -> None:
        if not answer.is_over:
            self._forget(answer)
            _end(answer, DeadlineExceeded(limit_s, begun=answer.has_begun, is_own=is_own))

    def _plan_hedge(self, answer: RoutedStream) -> None:
        if self._config.hedge <= 0:
            return
        with self._lock:
            self._hedger.arrived()
            delay_s = self._hedger.delay_s()
        if delay_s is not None and len(self._replicas) > 1:
            self._look_after(answer, delay_s)

    def _look_after(self, answer: RoutedStream, delay_s: float) -> None:
        """Sees after `delay_s` whether the answer is late."""

        def look() -> None:
            self._later(lambda: self._hedge(answer, delay_s))

        answer.expect(self._alarms.after(delay_s, look))

    def _hedge(self, answer: RoutedStream, waited_s: float) -> None:
        with self._lock:
            is_late = not (answer.is_over or answer.has_begun or answer in self._waiting)
            may = is_late and self._hedger.take()
        if is_late and not may:  # others have used up what may be sent twice
            self._look_after(answer, max(2 * waited_s, _HEDGE_AGAIN_S))
        if may:
            try:
                self._sent(answer, elsewhere=True)
            except Exception as error:  # noqa: BLE001 - the first copy runs on
                self._log.debug("hedge_refused", error=repr(error))

    def _later(self, work: Callable[[], None]) -> bool:
        """Whether `work` will be done, on a thread of the pool."""

        def done() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 - the pool would keep it to itself
                self._log.error("dispatch_failed", error=repr(error), exc_info=error)

        with self._lock:
            if self._closed:
                return False
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"dispatch {self._name}")
            self._pool.submit(done)
            return True

    def _removed(self) -> NotReady:
        return NotReady(self._name, "it is being removed")

    def _too_late(self) -> NotReady:
        return NotReady(self._name, f"no replica came within {self._config.wait_s:g} s")

    def _note_failure(self, replica: Replica, error: BaseException) -> None:
        replica.ledger.failed(self._clock.monotonic_s())
        self._log.warning("replica_failed", replica=replica.id, version=replica.version.version, error=repr(error))
        self._on_change()

    # ---- what answers say (`answer.Desk`) ---------------------------------------------------------------------------

    def began(self, answer: RoutedStream, replica: Replica) -> None:
        """The first event has come."""
        now_s = self._clock.monotonic_s()
        with self._lock:
            self._hedger.answered(now_s - answer.began_s)
            self._waits_s.append((now_s, now_s - answer.began_s))

    def finished(self, replica: Replica) -> None:
        """An answer is whole, or the request was found wrong by it."""
        replica.ledger.succeeded()

    def failed(self, answer: RoutedStream, replica: Replica, error: BaseException, *, again: bool) -> None:
        """A replica failed; with `again` the request is sent to another."""
        if not isinstance(error, QueueFull):
            self._note_failure(replica, error)
        if again and not self._later(lambda: self._again(answer, error)):
            _end(answer, error)

    def left(self, answer: RoutedStream) -> None:
        """The reader has closed the stream."""
        self._forget(answer)


def _end(answer: RoutedStream, error: BaseException) -> None:
    if isinstance(error, StreamClosed):
        return
    wake = answer.end(error)
    wake_readers([wake] if wake else [])
