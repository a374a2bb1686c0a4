"""The autoscaler against simulated loads: a second a step, replicas that take their time to load."""

from __future__ import annotations

import csv
import gzip
import itertools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sihe.serving.gateway.replicas.autoscaler import Observation, ScalingState, decide, initial
from sihe.serving.gateway.replicas.config import ReplicaConfig, ScalingConfig

PHILLY = Path(__file__).parents[2] / ".." / "shared" / "data" / "traces" / "philly" / "philly.csv.gz"
TARGET = 8.0  # requests in hand a replica
SERVICE_S = 4.0  # of one request, while its replica has no more than TARGET in hand
WINDOW_S = 60.0


def config(least: int = 1, most: int = 16, **scaling: float) -> ReplicaConfig:
    values = {"down_after_s": WINDOW_S, "up_cooldown_s": 2.0, "idle_s": 30.0} | scaling
    return ReplicaConfig(min_replicas=least, max_replicas=most, scaling=ScalingConfig(**values))


@dataclass(frozen=True)
class Second:
    """One second of a simulation."""

    wanted: int
    ready: int
    in_hand: int


def simulate(config: ReplicaConfig, arrivals: Sequence[int], *, load_s: int = 10) -> list[Second]:
    """A deployment under `arrivals` (requests a second). A replica serves TARGET / SERVICE_S requests a second."""
    state, ready, loading, in_hand = initial(config), 0, [], 0.0
    seen: list[Second] = []
    last_request_s: float | None = None
    for now, arrived in enumerate(arrivals):
        ready += sum(done_at <= now for done_at in loading)
        loading = [done_at for done_at in loading if done_at > now]
        in_hand += arrived
        last_request_s = float(now) if arrived else last_request_s
        in_hand = max(0.0, in_hand - min(in_hand, TARGET * ready) / SERVICE_S)
        in_hand = 0.0 if in_hand < 0.5 and not arrived else in_hand
        observed = Observation(
            now_s=float(now),
            ready=ready,
            coming=len(loading),
            in_hand=math.ceil(in_hand),
            kv_used=min(1.0, in_hand / (2 * TARGET * ready)) if ready else 0.0,
            ttft_s=None,
            last_request_s=last_request_s,
        )
        state = decide(config, TARGET, state, observed)
        loading += [now + load_s] * max(0, state.wanted - ready - len(loading))
        ready = min(ready, state.wanted)
        loading = loading[: state.wanted - ready]
        seen.append(Second(state.wanted, ready, math.ceil(in_hand)))
    return seen


def turns(seconds: Sequence[Second]) -> int:
    """How often the wanted number changed its direction."""
    changes = [b.wanted - a.wanted for a, b in itertools.pairwise(seconds) if a.wanted != b.wanted]
    return sum((a > 0) != (b > 0) for a, b in itertools.pairwise(changes))


def steady(rate_per_s: float, seconds: int, draw: random.Random) -> list[int]:
    """Poisson arrivals."""
    return [poisson(rate_per_s, draw) for _ in range(seconds)]


def poisson(mean: float, draw: random.Random) -> int:
    left, count = math.exp(-mean), 0
    product = draw.random()
    while product > left:
        count += 1
        product *= draw.random()
    return count


def test_a_steady_load_gets_what_it_needs_and_keeps_it() -> None:
    seen = simulate(config(), steady(10.0, 900, random.Random(1)))
    needed = 10.0 * SERVICE_S / TARGET  # Little's law: 40 in hand, 5 replicas
    settled = seen[300:]
    numbers = [second.wanted for second in settled]
    assert needed <= min(numbers)
    assert max(numbers) <= needed + 2
    assert turns(settled) <= 6, "noise moves it less than once in a window"


def test_a_step_is_met_in_bounded_time() -> None:
    draw = random.Random(2)
    seen = simulate(config(), steady(1.0, 120, draw) + steady(16.0, 300, draw), load_s=10)
    need = math.ceil(16.0 * SERVICE_S / TARGET)
    met = next(now for now, second in enumerate(seen) if now >= 120 and second.ready >= need)
    assert met - 120 <= 30, "three doublings while the backlog grows, and one load"
    assert max(second.in_hand for second in seen[-60:]) < 16.0 * SERVICE_S * 1.5, "the backlog was worked off"


def test_a_spike_does_not_come_and_go() -> None:
    draw = random.Random(3)
    load = [*steady(2.0, 200, draw), 100, *steady(2.0, 400, draw)]
    seen = simulate(config(), load)
    assert turns(seen[150:]) == 1, "up once, and down once"
    assert seen[-1].wanted <= 2


def test_a_saw_does_not_flap() -> None:
    """Bursts that come more often than the window is long keep their replicas."""
    draw = random.Random(4)
    load = [rate for _ in range(20) for rate in steady(12.0, 15, draw) + steady(1.0, 25, draw)]
    seen = simulate(config(), load)
    assert min(second.wanted for second in seen[100:]) >= 5, "the next burst finds them all"
    assert turns(seen[100:]) <= 5, "17 bursts"


def test_to_zero_and_back() -> None:
    draw = random.Random(5)
    load = steady(4.0, 60, draw) + [0] * 120 + [3] + [0] * 20
    seen = simulate(config(least=0), load, load_s=5)
    asleep = next(now for now, second in enumerate(seen) if second.wanted == 0)
    assert 60 + 30 <= asleep <= 60 + 30 + WINDOW_S + 10
    assert all(second.wanted == 0 for second in seen[asleep:180])
    assert seen[180].wanted == 1, "the first request wakes it at once"
    assert seen[-1].in_hand == 0


def test_what_is_coming_is_not_asked_for_again() -> None:
    """A load of a minute: the wanted number rises with the backlog, not with each look at it."""
    seen = simulate(config(up_cooldown_s=5.0), [0] * 5 + [20] + [0] * 50, load_s=50)
    assert max(second.wanted for second in seen) == math.ceil(20 / TARGET)


def test_a_full_cache_and_late_first_tokens_ask_for_more() -> None:
    scaled = config(target_ttft_s=1.0)
    state = ScalingState(2)
    calm = Observation(now_s=100.0, ready=2, coming=0, in_hand=16, kv_used=0.5, ttft_s=0.9, last_request_s=100.0)
    assert decide(scaled, TARGET, state, calm).wanted == 2
    state = decide(scaled, TARGET, state, replace(calm, now_s=90.0))
    full = Observation(now_s=100.0, ready=2, coming=0, in_hand=10, kv_used=1.0, ttft_s=0.9, last_request_s=100.0)
    assert decide(scaled, TARGET, state, full).wanted == 3
    late = Observation(now_s=100.0, ready=2, coming=0, in_hand=10, kv_used=0.5, ttft_s=9.0, last_request_s=100.0)
    assert decide(scaled, TARGET, state, late).wanted == 4


@given(
    rates=st.lists(st.integers(0, 60), min_size=1, max_size=80),
    least=st.integers(0, 3),
    more=st.integers(0, 6),
    load_s=st.integers(0, 15),
)
def test_never_outside_its_bounds(rates: list[int], least: int, more: int, load_s: int) -> None:
    most = max(1, least + more)
    seen = simulate(config(least=least, most=most), rates, load_s=load_s)
    assert all(least <= second.wanted <= most for second in seen)
    for before, after in itertools.pairwise(seen):
        assert after.wanted <= max(1, 2 * before.wanted), "at most doubled at once"


@pytest.mark.skipif(not PHILLY.is_file(), reason="no traces beside this checkout")
@pytest.mark.parametrize("cluster", range(3))
def test_real_arrivals_change_it_seldom(cluster: int) -> None:
    """Arrivals of the Philly trace, its busiest virtual clusters, a minute there taken as a second here."""
    by_minute = arrivals_by_minute()
    name = sorted(by_minute, key=lambda key: -sum(by_minute[key].values()))[cluster]
    minutes = by_minute[name]
    start = min(minutes)
    load = [5 * minutes.get(start + minute, 0) for minute in range(4000)]
    seen = simulate(config(), load, load_s=20)
    hours = len(load) / 3600
    assert turns(seen) / hours <= 3600 / WINDOW_S, "no more than one change of direction a window"
    offered = [sum(load[max(0, now - 30) : now + 1]) / 31 * SERVICE_S for now in range(len(load))]
    starved = sum(second.ready * TARGET * 4 < work for second, work in zip(seen, offered, strict=True))
    assert starved <= 0.02 * len(load), "seldom less than a quarter of what half a minute asked for"


def arrivals_by_minute() -> dict[str, dict[int, int]]:
    found: dict[str, dict[int, int]] = {}
    parse: Callable[[str], float] = float
    with gzip.open(PHILLY, "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            at = row["timestamp"]
            minute = int(parse(at) // 60) if at.replace(".", "").isdigit() else _minute(at)
            minutes = found.setdefault(row["cluster"], {})
            minutes[minute] = minutes.get(minute, 0) + 1
    return found


def _minute(text: str) -> int:
    from datetime import datetime

    return int(datetime.fromisoformat(text).timestamp() // 60)
