"""Sends requests to replicas: to the right one, to another when that one is lost, to a second one when it is late.

A request that finds no replica while one is on its way waits here, in a queue with a bound and a longest wait; so does
one whose replica was lost before its first token. What is decided about whom is the balancer's, the breaker's and the
hedger's; this acts on it.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import count

from sihe.core.clock import Clock
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
_RECENT = 500  # waits for the first token that are kept
_RECENT_S = 60.0


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
        self._waiting: deque[RoutedStream] = deque()
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
        for answer in waiting:
            _end(answer, error)

    def close(self) -> None:
        """No request is sent again, or waits, from now on."""
        with self._lock:
            self._closed = True
            pool = self._pool
        self._alarms.close()
        self.give_up_waiting(NotReady(self._name, "it is being removed"))
        if pool is not None:
            pool.shutdown(wait=False)

    # ---- what the route asks ----------------------------------------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a replica."""
        return len(self._waiting)

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

    # ---- requests ---------------------------------------------------------------------------------------------------

    def generate(self, request: GenerationRequest, *, timeout_s: float | None = None) -> RoutedStream:
        """Starts a request, which is answered within `timeout_s` if that is given.

        Raises what is wrong with it, `QueueFull` when every replica's queue is full, and `NotReady` when there is no
        replica and none comes.
        """
        now_s = self._last_request_s = self._clock.monotonic_s()
        answer = RoutedStream(next(self._ids), request, self, now_s=now_s, max_attempts=self._config.max_attempts)
        if not self._sent(answer):
            self._wait(answer)
        limit_s = self._config.timeout_s if timeout_s is None else timeout_s
        if limit_s is not None:
            self._alarms.after(limit_s, lambda: self._expire(answer, limit_s))
        self._plan_hedge(answer)
        return answer

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
            except BaseException:
                answer.refused(attempt)
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
                raise NotReady(self._name, "it is being removed")
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

        def give_up() -> None:
            if self._forget(answer):
                _end(answer, NotReady(self._name, f"no replica came within {wait_s:g} s"))

        self._alarms.after(wait_s, give_up)

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
        if self._waiting:
            self._later(self._serve_waiting)

    def _serve_waiting(self) -> None:
        """Sends what waits, in order, as long as replicas take it."""
        while True:
            with self._lock:
                if not self._waiting or not self._replicas:
                    return
                answer = self._waiting.popleft()
            if answer.is_over:
                continue
            try:
                sent = self._sent(answer)
            except QueueFull:
                sent = False
            except Exception as error:  # noqa: BLE001 - it belongs to the one request
                _end(answer, error)
                continue
            if not sent:
                with self._lock:
                    self._waiting.appendleft(answer)
                return

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
        with self._lock:
            waits = not (self._closed or was_refused or (not self._replicas and self._why_none() is not None))
            if waits:
                self._waiting.appendleft(answer)  # it came before those that wait
        if not waits:
            _end(answer, error)
            return
        self._limit_wait(answer)
        self._on_change()

    def _expire(self, answer: RoutedStream, limit_s: float) -> None:
        if not answer.is_over:
            self._forget(answer)
            _end(answer, DeadlineExceeded(limit_s, begun=answer.has_begun))

    def _plan_hedge(self, answer: RoutedStream) -> None:
        if self._config.hedge <= 0:
            return
        with self._lock:
            self._hedger.arrived()
            delay_s = self._hedger.delay_s()
        if delay_s is not None and len(self._replicas) > 1:
            self._alarms.after(delay_s, lambda: self._hedge_later(answer))

    def _hedge_later(self, answer: RoutedStream) -> None:
        self._later(lambda: self._hedge(answer))

    def _hedge(self, answer: RoutedStream) -> None:
        if answer.is_over or answer.has_begun or answer in self._waiting:
            return
        with self._lock:
            may = self._hedger.take()
        if may:
            try:
                self._sent(answer, elsewhere=True)
            except Exception as error:  # noqa: BLE001 - the first copy runs on
                self._log.debug("hedge_refused", error=repr(error))

    def _later(self, work: Callable[[], None]) -> bool:
        """Whether `work` will be done, on a thread of the pool."""
        with self._lock:
            if self._closed:
                return False
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix=f"dispatch {self._name}")
            self._pool.submit(work)
            return True

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
        """An answer is whole."""
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
