"""A replica's part in one request, from the choice of the replica to the end of the answer."""

from __future__ import annotations

from collections.abc import Callable

from sihe.core.clock import Clock
from sihe.serving.gateway.replicas.answer import LOST
from sihe.serving.gateway.replicas.ports import Served
from sihe.serving.gateway.replicas.replica import Replica


class Lease:
    """Counts as in hand on its replica until `end`. `on_lost` hears that the replica is gone."""

    def __init__(self, replica: Replica, weight: float, clock: Clock, on_lost: Callable[[], None]) -> None:
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
        """The request has left the replica, with `error` if that is given. Safe to call again.

        A request that failed for a reason of its own, or of the model, says nothing against the replica.
        """
        if self._ended:
            return
        self._ended = True
        if isinstance(error, LOST):
            self._replica.ledger.failed(self._clock.monotonic_s())
            self._on_lost()
        else:
            self._replica.ledger.succeeded()
        self._replica.ledger.release(self._weight)
