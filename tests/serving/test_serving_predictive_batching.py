"""When a batch closes, as a pure policy: simulated by its own clock, and held to its bounds by properties."""

from __future__ import annotations

import random
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sihe.serving.predictive.batching import PRIORITY_STEP_S, BatchPolicy, BatchQueue, Item


def queue(size: int = 4, delay_s: float = 0.01, *, adaptive: bool = True) -> BatchQueue:
    return BatchQueue(BatchPolicy(size, delay_s, adaptive=adaptive))


def ids(batch: object) -> list[int] | None:
    return None if batch is None else [item.id for item in batch.items]  # type: ignore[attr-defined]


def test_a_lone_request_never_waits_when_waiting_is_adaptive() -> None:
    waiting = queue()
    for number in range(20):  # one now and then, each further away than the delay
        waiting.add(Item(number, "a", 1, arrived_s=number * 1.0))
        assert ids(waiting.take(number * 1.0)) == [number]


def test_a_lone_request_waits_the_delay_when_told_to() -> None:
    waiting = queue(adaptive=False)
    waiting.add(Item(0, "a", 1, arrived_s=5.0))
    assert waiting.take(5.009) is None
    assert waiting.wake_s() == 5.01
    assert ids(waiting.take(5.01)) == [0]


def test_a_batch_that_fills_does_not_wait() -> None:
    waiting = queue(adaptive=False)
    for number in range(3):
        waiting.add(Item(number, "a", 1, arrived_s=0.0))
        assert waiting.take(0.0) is None
    waiting.add(Item(3, "a", 1, arrived_s=0.0))
    assert ids(waiting.take(0.0)) == [0, 1, 2, 3]


def test_a_batch_that_the_next_request_would_overflow_is_due() -> None:
    waiting = queue(adaptive=False)
    waiting.add(Item(0, "a", 3, arrived_s=0.0))
    waiting.add(Item(1, "a", 2, arrived_s=0.0))
    assert ids(waiting.take(0.0)) == [0]
    assert waiting.take(0.0) is None


def test_a_burst_is_waited_for_and_its_end_is_seen() -> None:
    waiting = queue(size=100, delay_s=0.02)
    now = 0.0
    for number in range(10):  # a busy model: nobody takes a batch meanwhile
        now = number * 0.001
        waiting.add(Item(number, "a", 1, arrived_s=now))
    assert waiting.take(now) is None, "the next one is expected in a millisecond"
    wake = waiting.wake_s()
    assert wake is not None
    assert now < wake < now + 0.003, "twice the mean gap, long before the delay of the first would allow more"
    assert ids(waiting.take(wake)) == list(range(10))


def test_a_pause_between_two_bursts_does_not_hide_the_second() -> None:
    waiting = queue(size=100, delay_s=0.005)
    for start in (0.0, 0.05):
        for number in range(8):
            waiting.add(Item(int(start * 1000) * 10 + number, "a", 1, arrived_s=start + number * 0.0002))
            if number == 0 and start:
                assert waiting.take(start) is None, "its companions are on their way"
        assert len(waiting.take(start + 0.005).items) == 8  # type: ignore[union-attr]


def test_a_caller_that_never_brings_company_is_not_held_back_for_long() -> None:
    waiting = queue(delay_s=0.01)
    now, held = 0.0, []
    for number in range(200):  # the next request comes a millisecond after each answer: often, and always alone
        now += 0.001
        waiting.add(Item(number, "a", 1, arrived_s=now))
        batch = waiting.take(now)
        if batch is None:
            held.append(number)
            wake = waiting.wake_s()
            assert wake is not None
            now = wake
            batch = waiting.take(now)
        assert ids(batch) == [number]
    assert 1 <= len(held) <= 15
    assert max(held) > 150, "now and then it is tried again"
    for number in range(200, 300):  # two callers: a wait is worth it again, and is made again after a while
        waiting.add(Item(2 * number, "a", 1, arrived_s=now))
        batch = waiting.take(now)
        waiting.add(Item(2 * number + 1, "a", 1, arrived_s=now + 0.0002))
        now += 0.001
        while len(waiting):
            batch = waiting.take(max(now, waiting.wake_s() or now))
    assert batch is not None
    assert len(batch.items) == 2


def test_the_door_is_open_between_two_batches_when_somebody_was_left_over() -> None:
    for adaptive in (True, False):
        waiting = queue(size=10, delay_s=0.01, adaptive=adaptive)
        waiting.add(Item(0, "a", 1, arrived_s=1.0))  # came, alone, while a batch of 50 ms was computed
        assert waiting.take(1.04, compute_s=0.05, freed_s=1.04) is None
        wake = waiting.wake_s(compute_s=0.05, freed_s=1.04)
        assert wake is not None
        assert abs(wake - 1.045) < 1e-9, "a tenth of what a batch takes"
        assert ids(waiting.take(wake, compute_s=0.05, freed_s=1.04)) == [0]
        waiting.add(Item(1, "a", 1, arrived_s=2.0, deadline_s=2.051))
        assert ids(waiting.take(2.04, compute_s=0.05, freed_s=2.04)) == [1], "there is no time for that"
    lone = queue(delay_s=0.01)
    lone.add(Item(0, "a", 1, arrived_s=3.1))
    assert ids(lone.take(3.1, compute_s=0.05, freed_s=3.0)) == [0], "the model has been idle for longer than a batch"


def test_a_caller_that_comes_soon_after_each_answer_learns_that_nobody_stands_behind_it() -> None:
    waiting, now, held = queue(delay_s=0.01), 0.0, 0
    for number in range(320):
        waiting.add(Item(number, "a", 1, arrived_s=now))
        known = {"compute_s": 0.03, "freed_s": now - 0.0001}
        if (batch := waiting.take(now, **known)) is None:
            held += 1
            batch = waiting.take(now + 0.003, **known)
        assert ids(batch) == [number]
        now += 0.04
    assert 5 <= held <= 20, "a few times at first, and then now and then"


def crowd(policy: BatchPolicy, rate: float, number: int, *, knows_when_free: bool) -> list[float]:
    """Waits of callers who share Python's lock with the model: during a batch only one in five milliseconds gets in.

    A batch takes 8 ms and a fifth of one more for each row; who is outside comes in while nothing is computed.
    """
    draws = random.Random(3)
    due: list[float] = []
    for _ in range(number):
        due.append((due[-1] if due else 0.0) + draws.expovariate(rate))
    waiting, now, freed, inside = BatchQueue(policy), 0.0, float("-inf"), 0
    waits: list[float] = []

    def let_in(until: float, most: int) -> None:
        nonlocal inside
        while inside < number and due[inside] <= until and most:
            waiting.add(Item(inside, "a", 1, arrived_s=until))
            inside, most = inside + 1, most - 1

    while len(waits) < number:
        known = {"compute_s": 0.0084} | ({"freed_s": freed} if knows_when_free else {})
        batch = waiting.take(now, **known)
        if batch is None:
            let_in(now, number)
            wake = waiting.wake_s(**known)
            now = max(now, min(time for time in (wake, due[inside] if inside < number else None) if time is not None))
            continue
        freed = now + 0.008 + 0.0002 * batch.rows
        let_in(now + 0.005, 1)
        now = freed
        waits += [now - due[item.id] for item in batch.items]
    return sorted(waits)


def test_callers_that_the_model_shuts_out_while_it_computes_are_let_in_between_batches() -> None:
    for adaptive in (True, False):
        policy = BatchPolicy(32, 0.001, adaptive=adaptive)
        shut = crowd(policy, rate=300.0, number=1500, knows_when_free=False)
        opened = crowd(policy, rate=300.0, number=1500, knows_when_free=True)
        assert shut[len(shut) // 2] > 0.5, "the queue before the door grows: this model of a crowd shows the trouble"
        assert opened[len(opened) // 2] < 0.03
        assert opened[-1] < 0.1


def test_a_deadline_closes_a_batch_while_there_is_time_to_compute_it() -> None:
    waiting = queue(delay_s=1.0, adaptive=False)
    waiting.add(Item(0, "a", 1, arrived_s=0.0, deadline_s=0.5))
    waiting.add(Item(1, "a", 1, arrived_s=0.1))
    assert waiting.take(0.3, compute_s=0.1) is None
    assert ids(waiting.take(0.4, compute_s=0.1)) == [0, 1]


def test_what_is_too_late_is_taken_out() -> None:
    waiting = queue(adaptive=False)
    waiting.add(Item(0, "a", 1, arrived_s=0.0, deadline_s=0.002))
    waiting.add(Item(1, "a", 1, arrived_s=0.0, deadline_s=0.005))
    waiting.add(Item(2, "a", 1, arrived_s=0.0))
    assert waiting.wake_s() == 0.002
    assert [item.id for item in waiting.expire(0.002)] == [0]
    assert [item.id for item in waiting.expire(0.002)] == []
    assert ids(waiting.take(0.01)) == [1, 2]
    assert waiting.wake_s() is None


def test_shapes_are_not_mixed_and_none_is_forgotten() -> None:
    waiting = queue(adaptive=False)
    for number, bucket in enumerate("abab"):
        waiting.add(Item(number, bucket, 1, arrived_s=number * 0.001))
    assert ids(waiting.take(1.0)) == [0, 2]
    assert ids(waiting.take(1.0)) == [1, 3]


def test_urgent_requests_go_first_and_nobody_starves() -> None:
    waiting = queue(size=1)
    waiting.add(Item(0, "a", 1, arrived_s=0.0, priority=5))
    for number in range(1, 50):
        waiting.add(Item(number, "a", 1, arrived_s=number * 0.1, priority=1))
    served = [ids(waiting.take(100.0)) for _ in range(50)]
    assert served[0] == [1]
    assert served.index([0]) == 3, "four levels are four head starts of a tenth of a second"
    assert PRIORITY_STEP_S == 0.1


def test_a_request_with_more_rows_than_a_batch_goes_alone() -> None:
    waiting = queue(size=4)
    waiting.add(Item(0, "a", 9, arrived_s=0.0))
    waiting.add(Item(1, "a", 1, arrived_s=0.0))
    assert ids(waiting.take(0.0)) == [0]


@given(
    gaps=st.lists(st.floats(0, 0.05), min_size=1, max_size=40),
    rows=st.lists(st.integers(1, 6), min_size=40, max_size=40),
    compute_s=st.floats(0, 0.03),
    delay_s=st.floats(0, 0.02),
    adaptive=st.booleans(),
)
def test_one_worker_answers_everyone_in_time(
    gaps: Sequence[float], rows: Sequence[int], compute_s: float, delay_s: float, adaptive: bool
) -> None:
    """Simulated: nobody waits beyond the delay, or the open door after a batch; no batch exceeds its bound."""
    waiting = queue(size=4, delay_s=delay_s, adaptive=adaptive)
    arrivals = []
    at = 0.0
    for number, gap in enumerate(gaps):
        at += gap
        arrivals.append(Item(number, number % 2, rows[number], arrived_s=at))
    now, free_since, answered, coming = 0.0, 0.0, [], list(arrivals)
    while len(answered) < len(arrivals):
        while coming and coming[0].arrived_s <= now:
            waiting.add(coming.pop(0))
        batch = waiting.take(now, compute_s=compute_s, freed_s=free_since)
        if batch is not None:
            assert batch.rows <= 4 or len(batch.items) == 1
            assert len({item.bucket for item in batch.items}) == 1
            oldest = min(item.arrived_s for item in batch.items)
            door_s = free_since + min(delay_s, 0.1 * compute_s)
            assert free_since == now or now <= max(oldest + delay_s, door_s) + 1e-9
            answered += [item.id for item in batch.items]
            now += compute_s
            free_since = now
            continue
        wake = waiting.wake_s(compute_s=compute_s, freed_s=free_since)
        times = [time for time in (wake, coming[0].arrived_s if coming else None) if time is not None]
        assert times, "something must happen while somebody waits"
        assert min(times) > now - 1e-9
        now = max(now, min(times))
    assert sorted(answered) == list(range(len(arrivals)))


class _Machine(RuleBasedStateMachine):
    """The queue beside a plain dictionary of who waits."""

    def __init__(self) -> None:
        super().__init__()
        self.queue = queue(size=5, delay_s=0.01)
        self.waiting: dict[int, Item] = {}
        self.now = 0.0
        self.made = 0

    @rule(
        gap=st.floats(0, 0.02),
        bucket=st.sampled_from("abc"),
        rows=st.integers(1, 7),
        patience=st.none() | st.floats(0.001, 0.05),
        priority=st.integers(0, 3),
    )
    def arrive(self, gap: float, bucket: str, rows: int, patience: float | None, priority: int) -> None:
        self.now += gap
        deadline = None if patience is None else self.now + patience
        item = Item(self.made, bucket, rows, self.now, deadline, priority)
        self.made += 1
        self.queue.add(item)
        self.waiting[item.id] = item

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def leave(self, data: st.DataObject) -> None:
        id = data.draw(st.sampled_from(sorted(self.waiting)))
        assert self.queue.remove(id)
        assert not self.queue.remove(id)
        del self.waiting[id]

    @rule(gap=st.floats(0, 0.05))
    def expire(self, gap: float) -> None:
        self.now += gap
        late = {item.id for item in self.queue.expire(self.now)}
        assert late == {
            item.id for item in self.waiting.values() if item.deadline_s is not None and item.deadline_s <= self.now
        }
        for id in late:
            del self.waiting[id]

    @rule(gap=st.floats(0, 0.05))
    def take(self, gap: float) -> None:
        self.now += gap
        before = self.queue.wake_s()
        batch = self.queue.take(self.now)
        if batch is None:
            assert before is None or before > self.now or not self.waiting or before in self._deadlines()
            return
        assert batch.rows <= 5 or len(batch.items) == 1
        assert len({item.bucket for item in batch.items}) == 1
        bucket = [item for item in self.waiting.values() if item.bucket == batch.items[0].bucket]
        assert list(batch.items) == sorted(bucket, key=lambda item: item.rank)[: len(batch.items)]
        for item in batch.items:
            del self.waiting[item.id]

    def _deadlines(self) -> list[float | None]:
        return [item.deadline_s for item in self.waiting.values()]

    @invariant()
    def same_waiting(self) -> None:
        assert {item.id for item in self.queue} == set(self.waiting)
        assert len(self.queue) == len(self.waiting)
        assert (self.queue.wake_s() is None) == (not self.waiting)


TestBatchQueue = _Machine.TestCase
