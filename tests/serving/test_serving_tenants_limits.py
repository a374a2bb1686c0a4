"""Buckets against a simulation, counters against each other (one in a real Redis), refusals as clients see them."""

from __future__ import annotations

import math
import random
import socket
import subprocess
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sihe.core.clock import FakeClock
from sihe.core.errors import ConfigError
from sihe.serving.errors import OverLimit, QuotaExceeded, RateLimited
from sihe.serving.tenants.brakes import FAILURES, MAX_ADDRESSES, Brakes
from sihe.serving.tenants.bucket import Level, Rate, amount_at, full_in_s, taken, wait_s
from sihe.serving.tenants.counter import LocalCounter
from sihe.serving.tenants.limits import demand_of, duration, exceeded, headers, quotas_of, refusal
from sihe.serving.tenants.ports import Demand, Meter, RateCounter, Slots
from sihe.serving.tenants.redis_counter import ALONE_S, RedisCounter
from sihe.serving.tenants.types import Caller, Limits, Right, Tenant
from support.debian import ensure, free_port, wait_until

NEVER = Rate(capacity=100, per_s=1e-9)  # so slow that nothing comes back during a test


# ---- the bucket ----------------------------------------------------------------------------------------------------


steps = st.lists(st.tuples(st.floats(0, 30), st.floats(0.1, 40)), min_size=1, max_size=60)


@settings(deadline=None)
@given(st.floats(1, 100), st.floats(0.01, 20), steps)
def test_a_bucket_grants_its_capacity_and_what_flows_in_and_no_more(
    capacity: float, per_s: float, asked: list[tuple[float, float]]
) -> None:
    rate, level, now_s = Rate(capacity, per_s), None, 0.0
    granted: list[tuple[float, float]] = []
    for pause_s, amount in asked:
        now_s += pause_s
        present = amount_at(rate, level, now_s)
        wait = wait_s(rate, present, amount)
        assert (wait == 0) == (present >= amount)
        if wait == 0:
            level = taken(rate, level, amount, now_s)
            granted.append((now_s, amount))
        elif wait < math.inf:  # who waits as long as told is granted, and who comes a little earlier is not
            assert amount_at(rate, level, now_s + wait) >= amount - 1e-6 * capacity
            assert amount_at(rate, level, now_s + 0.99 * wait) < amount
        else:
            assert amount > capacity
    for start in range(len(granted)):
        for end in range(start, len(granted)):
            span_s = granted[end][0] - granted[start][0]
            assert sum(amount for _, amount in granted[start : end + 1]) <= (capacity + per_s * span_s) * (1 + 1e-9)


@settings(deadline=None)
@given(st.floats(1, 100), st.floats(0.01, 20), st.floats(0, 100), st.floats(0, 200))
def test_what_is_given_back_is_as_if_it_was_never_taken(
    capacity: float, per_s: float, estimate: float, actual: float
) -> None:
    rate = Rate(capacity, per_s)
    settled = taken(rate, taken(rate, None, estimate, 5.0), actual - estimate, 5.0)
    direct = taken(rate, None, actual, 5.0)
    assert settled.amount == pytest.approx(direct.amount, abs=1e-6)
    assert full_in_s(rate, settled.amount) == pytest.approx(actual / per_s, rel=1e-6, abs=1e-6)


def test_a_clock_that_goes_back_fills_nothing() -> None:
    rate = Rate(10, 1)
    level = taken(rate, Level(10, 100), 10, 100)
    assert amount_at(rate, level, 50) == 0
    assert taken(rate, level, 1, 50) == Level(-1, 100)


@pytest.mark.parametrize("numbers", [(0, 1), (-1, 1), (1, 0), (math.inf, 1), (1, math.inf), (math.nan, 1)])
def test_a_rate_is_positive(numbers: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="positive"):
        Rate(*numbers)


# ---- the counters --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    binary, port = ensure("redis-server", "redis-server"), free_port()
    folder = tmp_path_factory.mktemp("redis")
    arguments = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", "", "--appendonly", "no"]
    server = subprocess.Popen([binary, *arguments], stdout=subprocess.DEVNULL)
    try:
        url = f"redis://127.0.0.1:{port}/0"
        wait_until(lambda: _answers(url), "Redis' start")
        yield url
    finally:
        server.terminate()
        server.wait(30)


def _answers(url: str) -> bool:
    import redis

    try:
        with redis.Redis.from_url(url) as connection:
            return bool(connection.ping())
    except redis.ConnectionError:
        return False


def redis_counter(url: str, clock: FakeClock | None = None, heard: list[int] | None = None) -> RedisCounter:
    clock = clock or FakeClock()
    heard = [] if heard is None else heard
    # A busy machine may take its time; what happens when Redis takes too long has tests of its own.
    return RedisCounter(url, LocalCounter(clock), clock, on_alone=lambda: heard.append(1), timeout_s=30)


@pytest.fixture(params=["local", "redis"])
def counter(request: pytest.FixtureRequest) -> Iterator[RateCounter]:
    if request.param == "local":
        yield LocalCounter(FakeClock())
        return
    opened = redis_counter(request.getfixturevalue("redis_url"))
    opened._redis.flushdb()
    yield opened
    opened.close()


def drained(counter: RateCounter) -> None:
    """Waits until settlements that are made in the background are made."""
    if isinstance(counter, RedisCounter):
        wait_until(counter._settlements.empty, "the settlements")
        counter.close()


def meter(name: str, amount: float, rate: Rate = NEVER) -> Meter:
    return Meter(name, "tokens", rate, amount)


def test_a_demand_gets_all_or_nothing(counter: RateCounter) -> None:
    both = Demand("t", (meter("a", 30), meter("b", 60)), (Slots("s", 5),))
    first = counter.take(both)
    assert first.is_granted
    assert first.present == pytest.approx((70, 40), abs=1e-3)
    assert first.running == (1,)
    second = counter.take(both)
    assert not second.is_granted
    assert second.present == pytest.approx((70, 40), abs=1e-3)
    assert second.running == (1,)
    assert counter.take(Demand("t", (meter("a", 70),))).is_granted


def test_an_empty_demand_is_met(counter: RateCounter) -> None:
    decision = counter.take(Demand("t"))
    assert decision.is_granted
    counter.settle(Demand("t"), decision.lease, {})


def test_slots_come_back_and_buckets_are_corrected(counter: RateCounter) -> None:
    demand = Demand("t", (meter("a", 40),), (Slots("s", 2),))
    decisions = [counter.take(demand) for _ in range(3)]
    assert [decision.is_granted for decision in decisions] == [True, True, False]
    counter.settle(demand, decisions[0].lease, {"a": 25.0})  # it needed 15
    counter.settle(demand, decisions[1].lease, {"a": -50.0})  # it needed 90
    drained(counter)
    after = counter.take(Demand("t", (meter("a", 0.5),), (Slots("s", 1),)))
    assert not after.is_granted
    assert after.present == pytest.approx((-5,), abs=1e-3)
    assert after.running == (0,)


def test_a_refund_fills_no_more_than_the_bucket(counter: RateCounter) -> None:
    demand = Demand("t", (meter("a", 40),))
    counter.settle(demand, counter.take(demand).lease, {"a": 1000.0})
    drained(counter)
    assert counter.take(demand).present == pytest.approx((60,), abs=1e-3)


def test_threads_together_get_what_there_is(counter: RateCounter) -> None:
    granted: list[bool] = []
    demand = Demand("t", (meter("a", 7),), (Slots("s", 1000),))

    def ask() -> None:
        granted.extend(counter.take(demand).is_granted for _ in range(10))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (sum(granted), len(granted)) == (14, 80)  # 100 // 7


def test_random_demands_are_decided_alike(redis_url: str) -> None:
    dice, local, shared = random.Random(5), LocalCounter(FakeClock()), redis_counter(redis_url)
    shared._redis.flushdb()
    open_leases: list[tuple[Demand, str, str]] = []
    for _ in range(300):
        meters = tuple(meter(name, dice.choice((1, 3.5, 20))) for name in "abc" if dice.random() < 0.6)
        demand = Demand("t", meters, (Slots("s", dice.randint(1, 6)),) if dice.random() < 0.5 else ())
        ours, theirs = local.take(demand), shared.take(demand)
        assert theirs.is_granted == ours.is_granted
        assert theirs.present == pytest.approx(ours.present, abs=1e-3)
        assert theirs.running == ours.running
        if ours.is_granted:
            open_leases.append((demand, ours.lease, theirs.lease))
        if open_leases and dice.random() < 0.7:
            done, our_lease, their_lease = open_leases.pop(dice.randrange(len(open_leases)))
            refunds = {item.name: dice.uniform(-2, item.amount) for item in done.meters}
            local.settle(done, our_lease, refunds)
            shared.settle(done, their_lease, refunds)
            drained(shared)
    shared.close()


@settings(deadline=None)
@given(st.floats(0, 500), st.floats(-50, 100), st.floats(1, 100), st.floats(0.05, 5))
def test_the_script_fills_buckets_as_the_function_does(
    redis_url: str, age_s: float, amount: float, capacity: float, per_s: float
) -> None:
    rate, counter = Rate(capacity, per_s), redis_counter(redis_url)
    now_s, micro_s = counter._redis.time()
    begun_s = now_s + micro_s / 1e6 - age_s
    counter._redis.hset("sihe:rates:{t}:x", mapping={"amount": repr(amount), "at": repr(begun_s)})
    said = counter.take(Demand("t", (meter("x", 0.0, rate),))).present[0]
    now_s, micro_s = counter._redis.time()
    after_s = now_s + micro_s / 1e6
    level = Level(amount, begun_s)
    assert amount_at(rate, level, begun_s + age_s) - 1e-4 <= said <= amount_at(rate, level, after_s) + 1e-4
    counter.close()


def test_a_killed_processs_slots_come_back_when_its_leases_end(redis_url: str) -> None:
    killed, living = redis_counter(redis_url), redis_counter(redis_url)
    killed._redis.flushdb()
    demand = Demand("t", (), (Slots("s", 1),))
    lease = killed.take(demand).lease
    assert not living.take(demand).is_granted
    key = "sihe:rates:{t}:s:running"
    killed._redis.zadd(key, {lease: 1.0})  # as if its end had come
    assert living.take(demand).is_granted
    killed._prolong()  # what has ended stays ended
    assert killed._redis.zcard(key) == 1
    before = dict(killed._redis.zrange(key, 0, -1, withscores=True))
    living._prolong()
    after = dict(killed._redis.zrange(key, 0, -1, withscores=True))
    assert before.keys() == after.keys()
    assert all(after[name] >= before[name] for name in after)
    killed.close()
    living.close()


def test_without_redis_each_process_counts_alone_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    heard: list[int] = []
    clock = FakeClock()
    counter = redis_counter(f"redis://:secret-word@127.0.0.1:{free_port()}/0", clock, heard)
    demand = Demand("t", (meter("a", 60),), (Slots("s", 5),))
    assert [counter.take(demand).is_granted for _ in range(2)] == [True, False]
    counter.settle(demand, "", {"a": 60.0})
    clock.advance(ALONE_S)
    assert counter.take(demand).is_granted
    assert len(heard) == 3
    said = "".join(capsys.readouterr())
    assert said.count("redis_lost") == 1  # once for an outage, not once a request
    assert "secret-word" not in said
    counter.close()


def test_a_redis_that_hangs_is_left_too() -> None:
    heard: list[int] = []
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        clock = FakeClock()
        counter = RedisCounter(url, LocalCounter(clock), clock, on_alone=lambda: heard.append(1), timeout_s=0.05)
        assert counter.take(Demand("t", (meter("a", 60),))).is_granted
        assert heard == [1]
        counter.close()


def test_redis_is_asked_again_after_an_outage(redis_url: str) -> None:
    heard: list[int] = []
    clock = FakeClock()
    counter = redis_counter(redis_url, clock, heard)
    counter._redis.flushdb()
    demand = Demand("t", (meter("a", 60),))
    counter._leave(ConnectionError("as if"))
    assert counter.take(demand).is_granted
    assert heard == [1]
    clock.advance(ALONE_S)
    assert counter.take(demand).is_granted  # Redis has not heard of the first
    assert not counter.take(demand).is_granted
    assert heard == [1]
    counter.close()


def test_an_address_of_something_else_is_named() -> None:
    with pytest.raises(ConfigError, match="redis_url"):
        redis_counter("http://127.0.0.1")


# ---- what a caller demands, and hears ------------------------------------------------------------------------------


def caller(tenant: Limits, key: Limits) -> Caller:
    return Caller(Tenant("acme", tenant), "k1", frozenset(Right), None, key)


def test_a_demand_holds_every_limit_that_is_set() -> None:
    demand = demand_of(caller(Limits(10, 1000, concurrency=3), Limits(tokens_per_min=50)), 7)
    assert {(item.name, item.amount, item.rate.capacity) for item in demand.meters} == {
        ("tenant:acme:requests", 1, 10),
        ("tenant:acme:tokens", 7, 1000),
        ("key:k1:tokens", 7, 50),
    }
    assert demand.slots == (Slots("tenant:acme", 3),)
    assert demand_of(caller(Limits(), Limits()), 7) == Demand("acme")


def test_a_refusal_names_what_takes_longest() -> None:
    clock = FakeClock()
    counter = LocalCounter(clock)
    demand = demand_of(caller(Limits(requests_per_min=60, tokens_per_min=600), Limits()), 500)
    granted = counter.take(demand)
    assert refusal(demand, granted) is None
    assert headers(demand, granted) == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "600",
        "x-ratelimit-remaining-tokens": "100",
        "x-ratelimit-reset-tokens": "50s",
    }
    error = refusal(demand, counter.take(demand))
    assert isinstance(error, RateLimited)
    assert error.counts == "tokens"
    assert error.retry_after_s == pytest.approx(40)  # 400 tokens are missing, 10 come a second
    assert error.headers["x-ratelimit-remaining-tokens"] == "100"
    clock.advance(40)
    assert counter.take(demand).is_granted


def test_a_request_that_can_never_pass_is_told_so() -> None:
    demand = demand_of(caller(Limits(tokens_per_min=100), Limits()), 101)
    error = refusal(demand, LocalCounter(FakeClock()).take(demand))
    assert isinstance(error, OverLimit)
    assert (error.limit, error.actual) == (100, 101)


def test_too_many_at_once() -> None:
    counter = LocalCounter(FakeClock())
    demand = demand_of(caller(Limits(concurrency=1), Limits()), 5)
    counter.take(demand)
    error = refusal(demand, counter.take(demand))
    assert isinstance(error, RateLimited)
    assert error.counts == "concurrency"


@pytest.mark.parametrize(
    ("now", "month_ends"),
    [
        (datetime(2026, 12, 31, 23, 59, 30, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)),
        (datetime(2028, 2, 29, 1, 0, tzinfo=UTC), datetime(2028, 3, 1, tzinfo=UTC)),
    ],
)
def test_quotas_end_with_their_day_and_month(now: datetime, month_ends: datetime) -> None:
    day, month = quotas_of(caller(Limits(tokens_per_day=5, tokens_per_month=9), Limits()), now)
    assert (day.since, month.since) == (now.date(), now.date().replace(day=1))
    assert month.until == month_ends
    assert timedelta() < day.until - now <= timedelta(days=1)
    error = exceeded(day, 4, 2, now)
    assert isinstance(error, QuotaExceeded)
    assert error.retry_after_s == (day.until - now).total_seconds()
    assert ("x-should-retry" in error.headers) == (error.retry_after_s > 60)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.0161, "17ms"), (1, "1s"), (1.2, "2s"), (59.5, "1m0s"), (360, "6m0s"), (3723, "1h2m3s")],
)
def test_times_are_written_as_openai_does(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# ---- who fails too often -------------------------------------------------------------------------------------------


def test_an_address_that_fails_too_often_waits_and_others_do_not() -> None:
    clock = FakeClock()
    brakes = Brakes(clock)
    for _ in range(100):
        brakes.failed("192.0.2.1")
    assert brakes.wait_s("192.0.2.1") == pytest.approx(1 / FAILURES.per_s)
    assert brakes.wait_s("192.0.2.2") == 0
    clock.advance(1 / FAILURES.per_s)
    assert brakes.wait_s("192.0.2.1") == 0


def test_an_ipv6_subscriber_is_one_address() -> None:
    brakes = Brakes(FakeClock())
    for host in range(100):
        brakes.failed(f"2001:db8::{host:x}")
    assert brakes.wait_s("2001:db8::ffff:ffff") > 0
    assert brakes.wait_s("2001:db8:0:1::1") == 0
    for _ in range(100):
        brakes.failed("::ffff:192.0.2.7")
    assert brakes.wait_s("192.0.2.7") > 0


def test_memory_of_failures_is_bounded() -> None:
    brakes = Brakes(FakeClock())
    for number in range(MAX_ADDRESSES + 500):
        brakes.failed(f"host {number}")
    assert len(brakes._levels) == MAX_ADDRESSES


# ---- what is remembered ----------------------------------------------------------------------------------------------


def test_a_name_of_which_nothing_runs_is_forgotten() -> None:
    counter = LocalCounter(FakeClock())
    for number in range(100):
        demand = Demand("t", (), (Slots(f"key:{number}", 1),))
        granted, refused = counter.take(demand), counter.take(demand)
        assert (granted.is_granted, granted.running, refused.is_granted, refused.running) == (True, (1,), False, (1,))
        counter.settle(demand, "", {})
    assert counter._running == {}
