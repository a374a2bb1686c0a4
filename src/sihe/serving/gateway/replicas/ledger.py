"""The requests of one replica: how many it has in hand, how much work they are, and how they fare."""

from __future__ import annotations

import threading

from sihe.serving.gateway.replicas.balancer import Candidate
from sihe.serving.gateway.replicas.breaker import Breaker


class Ledger:
    """Counts, and decides by the breaker whether the replica gets requests. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._breaker = Breaker()
        self._outstanding = 0.0
        self._in_flight = 0

    @property
    def in_flight(self) -> int:
        """Requests that were sent and have not left."""
        return self._in_flight

    def take(self, work: float, now_s: float) -> None:
        """A request of so much `work` goes to the replica."""
        with self._lock:
            self._outstanding += work
            self._in_flight += 1
            self._breaker.sent(now_s)

    def release(self, work: float) -> None:
        """A request has left."""
        with self._lock:
            self._in_flight -= 1
            self._outstanding = self._outstanding - work if self._in_flight else 0.0  # sums of floats drift

    def withdraw(self, work: float) -> None:
        """The replica did not take the request, or nobody waited for its answer: nothing is known of how it does."""
        with self._lock:
            self._breaker.withdrawn()
        self.release(work)

    def succeeded(self) -> None:
        """A request was answered."""
        with self._lock:
            self._breaker.succeeded()

    def failed(self, now_s: float) -> None:
        """A request failed for a reason of the replica."""
        with self._lock:
            self._breaker.failed(now_s)

    def candidate(self, id: int, now_s: float) -> Candidate:
        """The replica `id` as the balancer sees it."""
        with self._lock:
            return Candidate(id, self._outstanding, self._breaker.allows(now_s))
