"""When to close a batch, and what goes into it: a pure policy over arrival times. No clock, no threads, no tensors.

Requests wait in buckets of equal shape, because only those can be computed together. A bucket's batch is due when

- it is full: the next request would exceed `max_batch_size` rows, or none can join any more;
- its oldest request has waited `max_delay_s`, or would miss its deadline by waiting longer;
- `wait` is "adaptive" and company is unlikely: by the mean gap of the last arrivals, the next one would come after the
  delay has passed, or it is overdue by twice that gap; or those who were held back of late were so in vain (a caller
  that sends its next request when it has the answer to this one comes often, and never while one waits for it).

So a lone request on an idle model goes at once, and under load batches grow by themselves: what arrives while one batch
is computed goes together into the next.

One more wait keeps that true where callers and the model share processors (or Python's lock): those who would arrive
during a batch cannot, as long as it computes. Closing the next batch with the first who comes in would shut the others
out again, and every batch would have one row while the queue in front of the door grows without end. So the door is
open between two batches, for `_OPEN_SHARE` of what a batch takes, at most the delay: from the end of the last one where
somebody was left over from it, and else, where waiting is adaptive and not in vain, from the first arrival that comes
sooner after it than a batch takes.

A priority level is worth a fixed head start, rather than strict precedence: nobody starves.
"""

from __future__ import annotations

import bisect
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from math import inf

PRIORITY_STEP_S = 0.1  # a request one level less urgent is served as if it had come so much later
_GAP_WEIGHT = 0.25  # of the newest gap in the moving mean: about the last four arrivals count
_GAIN_WEIGHT = 0.25  # of the newest wait in the moving mean of those that brought company
_MIN_GAIN = 0.2  # share of waits that must have brought company for another one
_PROBE = 32  # batches between two waits that are tried all the same: times change
_OVERDUE = 2.0  # mean gaps without an arrival after which nobody is expected any more
_PAST = -inf  # a time before all others: due at once, or never happened
_OPEN_SHARE = 0.1  # of the time of a batch: how long the door is open between two


@dataclass(frozen=True, slots=True)
class Item:
    """One waiting request. `bucket` is equal for requests that can be computed together."""

    id: int
    bucket: Hashable
    rows: int
    arrived_s: float
    deadline_s: float | None = None
    priority: int = 0

    @property
    def rank(self) -> tuple[float, int]:
        """Whose turn comes first: by arrival, later by each level of priority."""
        return self.arrived_s + max(0, self.priority - 1) * PRIORITY_STEP_S, self.id


@dataclass(frozen=True, slots=True)
class Batch:
    """Requests to compute together now, the first served first."""

    items: tuple[Item, ...]

    @property
    def rows(self) -> int:
        """Rows of all of them."""
        return sum(item.rows for item in self.items)


@dataclass(frozen=True, slots=True)
class BatchPolicy:
    """Bounds of a batch. `max_delay_s` 0 never waits."""

    max_batch_size: int
    max_delay_s: float
    adaptive: bool = True


class BatchQueue:
    """The requests that wait, and the decision about the next batch. Not thread-safe: its owner holds a lock."""

    def __init__(self, policy: BatchPolicy) -> None:
        self.policy = policy
        self._buckets: dict[Hashable, list[Item]] = {}  # each in the order of service
        self._items: dict[int, Item] = {}
        self._gap_s = float("inf")
        self._last_arrival_s: float | None = None
        self._held: dict[Hashable, int] = {}  # how many there were in a bucket when it was first held back
        self._gain = 1.0
        self._taken = 0

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Item]:
        return iter(self._items.values())

    def add(self, item: Item) -> None:
        """Takes in a request. Arrivals come in the order of their times."""
        self._note_arrival(item.arrived_s)
        self.put_back(item)

    def put_back(self, item: Item) -> None:
        """Takes in the rest of a request of which a part was computed: nobody has arrived."""
        self._items[item.id] = item
        bisect.insort(self._buckets.setdefault(item.bucket, []), item, key=_rank)

    def remove(self, id: int) -> bool:
        """Forgets a request whose caller is gone; whether it still waited."""
        item = self._items.pop(id, None)
        if item is None:
            return False
        waiting = self._buckets[item.bucket]
        del waiting[bisect.bisect_left(waiting, item.rank, key=_rank)]
        if not waiting:
            del self._buckets[item.bucket]
            self._held.pop(item.bucket, None)
        return True

    def expire(self, now_s: float) -> list[Item]:
        """Takes out every request whose deadline has passed, so that no time is spent on it."""
        late = [item for item in self._items.values() if item.deadline_s is not None and item.deadline_s <= now_s]
        for item in late:
            self.remove(item.id)
        return late

    def take(self, now_s: float, *, compute_s: float = 0.0, freed_s: float = _PAST) -> Batch | None:
        """The batch to compute now, removed from the queue; None while it pays to wait, or nothing waits.

        `compute_s` is what a batch is expected to take: a request with a deadline is not held back beyond what is left.
        `freed_s` is when whoever asks has ended its last batch.
        """
        due = [waiting for waiting in self._buckets.values() if self._due_s(waiting, compute_s, freed_s) <= now_s]
        if not due:
            for bucket, waiting in self._buckets.items():
                self._held.setdefault(bucket, len(waiting))
            return None
        chosen = self._fill(min(due, key=lambda waiting: waiting[0].rank))
        self._note_taken(chosen)
        for item in chosen:
            self.remove(item.id)
        return Batch(tuple(chosen))

    def wake_s(self, *, compute_s: float = 0.0, freed_s: float = _PAST) -> float | None:
        """The time at which `take` or `expire` has something to do if nobody else arrives; None: never."""
        times = [self._due_s(waiting, compute_s, freed_s) for waiting in self._buckets.values()]
        deadline_s = self.deadline_s()
        return min(times if deadline_s is None else [*times, deadline_s], default=None)

    def deadline_s(self) -> float | None:
        """The earliest deadline of those that wait; None: nobody has one."""
        return min((item.deadline_s for item in self._items.values() if item.deadline_s is not None), default=None)

    # ---- the decision -----------------------------------------------------------------------------------------------

    def _due_s(self, waiting: list[Item], compute_s: float, freed_s: float) -> float:
        """When this bucket's batch should close at the latest; minus infinity: at once."""
        policy = self.policy
        chosen = self._fill(waiting)
        if len(chosen) < len(waiting) or sum(item.rows for item in chosen) >= policy.max_batch_size:
            return _PAST
        oldest_s = min(item.arrived_s for item in waiting)
        latest_s = min((item.deadline_s for item in waiting if item.deadline_s is not None), default=inf) - compute_s
        opening_s = min(policy.max_delay_s, _OPEN_SHARE * compute_s)
        open_s = freed_s + opening_s if oldest_s <= freed_s else _PAST
        limit_s = oldest_s + policy.max_delay_s
        if policy.adaptive:
            assert self._last_arrival_s is not None, "somebody has arrived"
            is_in_vain = self._gain < _MIN_GAIN and self._taken % _PROBE != 0
            is_unlikely = self._last_arrival_s + self._gap_s > limit_s
            expected_s = self._last_arrival_s + _OVERDUE * self._gap_s
            limit_s = _PAST if is_in_vain or is_unlikely else min(limit_s, expected_s)
            if freed_s < oldest_s < freed_s + compute_s and not is_in_vain:
                open_s = oldest_s + opening_s
        return min(latest_s, max(open_s, limit_s))

    def _fill(self, waiting: list[Item]) -> list[Item]:
        """The first requests of a bucket whose rows fit; the first of all goes even if it alone has too many."""
        chosen: list[Item] = []
        rows = 0
        for item in waiting:
            if chosen and rows + item.rows > self.policy.max_batch_size:
                break
            chosen.append(item)
            rows += item.rows
        return chosen

    def _note_arrival(self, now_s: float) -> None:
        if self._last_arrival_s is not None:
            # A silence counts as two delays at most, so that one pause between two bursts does not hide the second.
            gap_s = min(max(0.0, now_s - self._last_arrival_s), 2 * self.policy.max_delay_s)
            known_s = self._gap_s if self._gap_s != float("inf") else gap_s
            self._gap_s = known_s + _GAP_WEIGHT * (gap_s - known_s)
        self._last_arrival_s = now_s

    def _note_taken(self, chosen: list[Item]) -> None:
        """Learns whether holding this batch back has brought anybody."""
        self._taken += 1
        held = self._held.pop(chosen[0].bucket, None)
        if held is not None:
            self._gain += _GAIN_WEIGHT * ((len(chosen) > held) - self._gain)


def _rank(item: Item) -> tuple[float, int]:
    return item.rank
