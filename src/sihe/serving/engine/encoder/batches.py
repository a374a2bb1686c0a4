"""Which texts go into the next batch: a pure policy. No clock, no threads, no tensors.

A batch is a number of tokens, since texts lie in it side by side without padding. Tenants take turns, the requests of
a tenant take turns, and a request gives its texts longest first: so one text waits for at most as many texts as there
are requests, however many texts those still have. There is no delay to gather company: what arrives while a batch is
computed goes together into the next one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Place:
    """One text: which request's, and which of its texts."""

    request: int
    index: int


@dataclass(slots=True)
class _Waiting:
    """Texts of one request that are not computed yet; `order` ends with the next one."""

    tenant: str
    order: list[int]
    lengths: Sequence[int] = field(repr=False)


class FairQueue:
    """Texts that wait, by request and tenant."""

    def __init__(self) -> None:
        self._requests: dict[int, _Waiting] = {}
        self._turns: deque[str] = deque()  # tenants that have requests; the next one first
        self._by_tenant: dict[str, deque[int]] = {}
        self.num_tokens = 0

    def __len__(self) -> int:
        """Requests with texts that wait."""
        return len(self._requests)

    def add(self, request: int, lengths: Sequence[int], tenant: str = "") -> None:
        """Texts of so many tokens each, at least one of them."""
        order = sorted(range(len(lengths)), key=lambda index: lengths[index])
        self._requests[request] = _Waiting(tenant, order, lengths)
        if tenant not in self._by_tenant:
            self._by_tenant[tenant] = deque()
            self._turns.append(tenant)
        self._by_tenant[tenant].append(request)
        self.num_tokens += sum(lengths)

    def remove(self, request: int) -> None:
        """Forgets what waits of a request; one that is unknown, or has nothing left, changes nothing."""
        waiting = self._requests.pop(request, None)
        if waiting is None:
            return
        self.num_tokens -= sum(waiting.lengths[index] for index in waiting.order)
        self._by_tenant[waiting.tenant].remove(request)
        self._forget_if_empty(waiting.tenant)

    def take(self, budget: int) -> list[Place]:
        """The next batch: at most `budget` tokens, or the one text whose turn it is where that alone is longer.

        A text that does not fit beside the others ends the batch, so that shorter ones do not overtake it for ever.
        """
        batch: list[Place] = []
        room = budget
        while self._turns:
            request = self._by_tenant[self._turns[0]][0]
            waiting = self._requests[request]
            length = waiting.lengths[waiting.order[-1]]
            if length > room and batch:
                break
            batch.append(Place(request, waiting.order.pop()))
            self.num_tokens -= length
            room -= length
            self._next_turn(request, waiting)
            if room <= 0:
                break
        return batch

    def _next_turn(self, request: int, waiting: _Waiting) -> None:
        requests = self._by_tenant[waiting.tenant]
        if waiting.order:
            requests.rotate(-1)
        else:
            requests.popleft()
            del self._requests[request]
        self._turns.rotate(-1)
        self._forget_if_empty(waiting.tenant)

    def _forget_if_empty(self, tenant: str) -> None:
        if not self._by_tenant[tenant]:
            del self._by_tenant[tenant]
            self._turns.remove(tenant)
