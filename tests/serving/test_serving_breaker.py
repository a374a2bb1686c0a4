"""The circuit breaker, by the clock that the test turns."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from sihe.serving.gateway.replicas.breaker import Breaker


def test_five_failures_in_a_row_open_it_and_one_success_closes_it() -> None:
    breaker = Breaker()
    for _ in range(4):
        breaker.failed(0.0)
    assert breaker.allows(0.0)
    breaker.failed(0.0)
    assert not breaker.allows(0.9)
    assert breaker.state(1.0) == "half-open"
    assert breaker.allows(1.0)
    breaker.sent(1.0)
    assert not breaker.allows(1.1), "one probe at a time"
    breaker.succeeded()
    assert breaker.state(1.2) == "closed"


def test_each_probe_that_fails_doubles_the_wait_up_to_half_a_minute() -> None:
    breaker = Breaker()
    for _ in range(5):
        breaker.failed(0.0)
    now_s, waits = 0.0, []
    for _ in range(7):
        start_s = now_s
        while not breaker.allows(now_s):
            now_s += 0.25
        waits.append(now_s - start_s)
        breaker.sent(now_s)
        breaker.failed(now_s)
    assert waits == [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0]


def test_half_of_the_last_requests_open_it() -> None:
    breaker, outcomes = Breaker(), 0
    while breaker.allows(0.0):
        outcomes += 1
        breaker.failed(0.0) if outcomes % 2 else breaker.succeeded()
    assert outcomes == 11, "the first failure from ten outcomes on"


def test_a_probe_of_which_nothing_is_heard_does_not_lock_it_for_good() -> None:
    breaker = Breaker()
    for _ in range(5):
        breaker.failed(0.0)
    breaker.sent(2.0)
    assert not breaker.allows(31.0)
    assert breaker.allows(32.0)


def test_answers_from_before_it_opened_neither_close_it_nor_make_it_wait_longer() -> None:
    breaker = Breaker()
    for _ in range(5):
        breaker.failed(0.0)
    breaker.succeeded()
    assert breaker.state(0.5) == "open", "of many at once some succeed also where most fail"
    breaker.failed(1.5)
    assert breaker.allows(1.5)
    breaker.sent(1.5)
    breaker.succeeded()
    assert breaker.state(1.5) == "closed"


def test_a_probe_that_was_not_taken_leaves_its_turn_to_the_next() -> None:
    breaker = Breaker()
    for _ in range(5):
        breaker.failed(0.0)
    breaker.sent(1.0)
    breaker.withdrawn()
    assert breaker.allows(1.1)


@given(st.lists(st.sampled_from(["ok", "bad", "wait"]), max_size=200))
def test_it_can_always_close_again(events: list[str]) -> None:
    breaker, now_s = Breaker(), 0.0
    for event in events:
        if event == "wait":
            now_s += 1.0
        elif breaker.allows(now_s):
            breaker.sent(now_s)
            breaker.succeeded() if event == "ok" else breaker.failed(now_s)
    now_s += 31.0
    assert breaker.allows(now_s)
    breaker.sent(now_s)
    breaker.succeeded()
    assert breaker.state(now_s) == "closed"
