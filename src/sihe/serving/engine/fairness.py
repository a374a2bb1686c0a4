"""Whose turn it is among the tenants of an engine. Pure policy.

Each tenant has a counter of the service that it has had: one for a token of a prompt that was computed for it, two for
a token of an answer. Whoever has had least is next. A tenant that begins to wait again is lifted to the least counter
of those that wait, so that nobody saves up a claim while being away. (Sheng et al., "Fairness in Serving Large Language
Models", OSDI 2024, arXiv:2401.00588, algorithm 2 and its weights; what the cache answers is no service, and what is
computed a second time after a preemption is not charged twice.)

Sequences of one tenant go in order of arrival. A lower `priority` goes before everything with a higher one; fairness
holds among equals. What was preempted goes before what has not begun.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

PROMPT_WEIGHT = 1
ANSWER_WEIGHT = 2


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sequence stands: its tenant, its priority, and its number in order of arrival."""

    id: int
    tenant: str
    priority: int
    arrival: int

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller keeps its memory longer."""
        return (self.priority, self.arrival)


class ServiceCounters:
    """What each tenant has had. `begin` and `end` bracket the time in which one of its sequences waits to be read."""

    def __init__(self) -> None:
        self._served: dict[str, float] = {}
        self._waiting: Counter[str] = Counter()
        self._last = 0.0  # the counter of who last ceased to wait

    def begin(self, tenant: str) -> None:
        """A sequence of `tenant` begins to wait."""
        if not self._waiting[tenant]:
            floor = min((self._served[other] for other in self._waiting if self._waiting[other]), default=self._last)
            self._served[tenant] = max(self._served.get(tenant, 0.0), floor)
        self._waiting[tenant] += 1

    def end(self, tenant: str) -> None:
        """A sequence of `tenant` waits no longer."""
        self._waiting[tenant] -= 1
        if not self._waiting[tenant]:
            del self._waiting[tenant]
            self._last = self._served[tenant]
            self._prune()

    def charge(self, tenant: str, service: float) -> None:
        """`tenant` has had `service`."""
        self._served[tenant] = self._served.get(tenant, 0.0) + service

    def served(self, tenant: str) -> float:
        """What `tenant` has had, counted from a floor that all share."""
        return self._served.get(tenant, 0.0)

    def _prune(self) -> None:
        """Forgets tenants whose counter would be lifted anyway, so that the names of the past do not pile up."""
        if len(self._served) > 2 * len(self._waiting) + 64:
            floor = min((self._served[tenant] for tenant in self._waiting), default=self._last)
            kept = {tenant: had for tenant, had in self._served.items() if tenant in self._waiting or had > floor}
            self._served = kept


@dataclass(slots=True)
class _Class:
    """The sequences of one priority that wait."""

    preempted: OrderedDict[int, Place] = field(default_factory=OrderedDict)
    by_tenant: dict[str, OrderedDict[int, Place]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.preempted or self.by_tenant)


class FairQueue:
    """Sequences that wait for a place in the batch. Adding and removing are O(1), looking is O(tenants)."""

    def __init__(self, counters: ServiceCounters) -> None:
        self._counters = counters
        self._classes: dict[int, _Class] = {}
        self._places: dict[int, Place] = {}

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, id: int) -> bool:
        return id in self._places

    def add(self, place: Place) -> None:
        """Puts a sequence behind those of its tenant."""
        self._places[place.id] = place
        waiting = self._classes.setdefault(place.priority, _Class())
        waiting.by_tenant.setdefault(place.tenant, OrderedDict())[place.id] = place
        self._counters.begin(place.tenant)

    def put_back(self, place: Place) -> None:
        """Puts a sequence that was preempted before all that wait with its priority."""
        self._places[place.id] = place
        preempted = self._classes.setdefault(place.priority, _Class()).preempted
        preempted[place.id] = place
        preempted.move_to_end(place.id, last=False)
        self._counters.begin(place.tenant)

    def remove(self, id: int) -> bool:
        """Takes a sequence out; whether it was there."""
        place = self._places.pop(id, None)
        if place is None:
            return False
        waiting = self._classes[place.priority]
        if waiting.preempted.pop(id, None) is None:
            own = waiting.by_tenant[place.tenant]
            del own[id]
            if not own:
                del waiting.by_tenant[place.tenant]
        if not waiting:
            del self._classes[place.priority]
        self._counters.end(place.tenant)
        return True

    def first_priority(self) -> int | None:
        """The lowest number that waits; None where nobody does."""
        return min(self._classes, default=None)

    def is_preempted(self, id: int) -> bool:
        """Whether a sequence that waits has run before."""
        return id in self._classes[self._places[id].priority].preempted

    def in_order(self) -> Iterator[Place]:
        """The sequences in the order in which they are to begin, as the counters stand. Not to be changed meanwhile."""
        for priority in sorted(self._classes):
            waiting = self._classes[priority]
            yield from waiting.preempted.values()
            for own in sorted(waiting.by_tenant.values(), key=self._turn):
                yield from own.values()

    def _turn(self, own: OrderedDict[int, Place]) -> tuple[float, int]:
        first = next(iter(own.values()))
        return self._counters.served(first.tenant), first.arrival
