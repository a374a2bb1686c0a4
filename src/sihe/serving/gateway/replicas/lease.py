"""A replica's part in one request, from the choice of the replica to the end of the answer."""

from __future__ import annotations

from collections.abc import Callable

from sihe.core.clock import Clock
from sihe.core.errors import Busy, TimedOut
from sihe.serving.gateway.replicas.answer import LOST
from sihe.serving.gateway.replicas.ports import Served
from sihe.serving.gateway.replicas.replica import Replica


class Lease:
    """Counts as in hand on its replica until `end` or `leave`. `on_lost` hears that the replica is gone, and how."""

    def __init__(
        self, replica: Replica, weight: float, clock: Clock, on_lost: Callable[[Replica, BaseException], None]
    ) -> None:
        self.replica_id = replica.id
        self.served_by = replica.served_by
        self._replica = replica
        self._weight = weight
        self._clock = clock
        self._on_lost = on_lost
        self._ended = False
        replica.ledger.take(weight, clock.monotonic_s())

    def held(self) -> Served:
        """What the replica holds. Raises `EngineClosed` where it is gone."""
        return self._replica.held()

    def end(self, error: BaseException | None = None) -> None:
        """The request has left the replica, with `error` if that is given. Only the first end counts.

        One that failed for a reason of its own, or of the model, was read: the replica does well. One that was not
        taken, or came too late, shows neither.
        """
        if isinstance(error, Busy | TimedOut):
            self.leave()
        elif self._is_first_end():
            ledger = self._replica.ledger
            if isinstance(error, LOST):
                ledger.failed(self._clock.monotonic_s())
            else:
                ledger.succeeded()
            ledger.release(self._weight)
            if isinstance(error, LOST):
                self._on_lost(self._replica, error)

    def leave(self) -> None:
        """Nobody waits for the answer any more, which shows nothing of the replica. Only the first end counts."""
        if self._is_first_end():
            self._replica.ledger.withdraw(self._weight)

    def _is_first_end(self) -> bool:
        is_first, self._ended = not self._ended, True
        return is_first
