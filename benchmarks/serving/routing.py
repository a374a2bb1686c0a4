"""What each way of choosing a replica costs, by simulation: waits for the first token, and prefill that a cache saves.

Eight replicas work through prompts one after another at 10,000 tokens/s each; decoding is left out, since it runs
beside prefill in one batch. Arrivals are a Poisson process. Nothing depends on the machine: the seeds decide.

1. *Balance.* Prompts of very different lengths (log-normal, median 500 tokens, mean about 1,150) at 80 % load, without
   caches: blind choices, the least loaded of all, and the better of two, by requests or by tokens in hand; then with
   loads that were polled a second ago.
2. *Affinity.* 200 prefixes of 1,500 tokens, popular by Zipf's law, each prompt with 500 tokens of its own; a replica
   keeps 25 prefixes (LRU). Choices: the better of two, the prefix's home whatever its load, the home bounded by load
   (the gateway's own `choose`), and the fewest tokens of queue and prefill in all, which needs to know what is cached
   where.
"""

from __future__ import annotations

import argparse
import bisect
import random
import statistics
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from benchmarks.harness import Claim, at_most, report
from sihe.serving.gateway.replicas.balancer import Candidate, choose

REPLICAS = 8
TOKENS_PER_S = 10_000.0
LOAD = 0.8
PREFIXES, KEPT, SHARED_TOKENS, OWN_TOKENS = 200, 25, 1500, 500


@dataclass
class Replica:
    """One queue of prompts, and the prefixes in its cache."""

    free_s: float = 0.0
    ends_s: deque[float] = field(default_factory=deque)
    cached: OrderedDict[int, None] = field(default_factory=OrderedDict)
    tokens_done: float = 0.0

    def tokens_at(self, now_s: float) -> float:
        """Tokens that are still to be computed."""
        return max(0.0, self.free_s - now_s) * TOKENS_PER_S

    def requests_at(self, now_s: float) -> float:
        """Requests that are still here. Times must not go back."""
        while self.ends_s and self.ends_s[0] <= now_s:
            self.ends_s.popleft()
        return float(len(self.ends_s))

    def take(self, now_s: float, tokens: float) -> float:
        """Takes a prompt in; seconds until its first token."""
        self.free_s = max(now_s, self.free_s) + tokens / TOKENS_PER_S
        self.ends_s.append(self.free_s)
        self.tokens_done += tokens
        return self.free_s - now_s

    def finds(self, prefix: int) -> bool:
        """Whether the prefix is cached; it is from now on."""
        found = prefix in self.cached
        self.cached[prefix] = None
        self.cached.move_to_end(prefix)
        if len(self.cached) > KEPT:
            self.cached.popitem(last=False)
        return found


@dataclass(frozen=True)
class Waits:
    """Seconds: of waiting before prefill in the first simulation, to the first token in the second."""

    mean_s: float
    p50_s: float
    p99_s: float
    hit_rate: float = 0.0
    tokens: float = 0.0  # of prefill, of each request
    imbalance: float = 0.0  # the most that a replica computed, over the mean


Loads = Sequence[float]
Pick = Callable[[Loads, random.Random], int]
Route = Callable[[Sequence[Replica], float, int, bytes, random.Random], int]


def least(loads: Loads, draw: random.Random) -> int:
    """The least loaded of all; ties by chance."""
    return min(range(len(loads)), key=lambda place: (loads[place], draw.random()))


def two(loads: Loads, draw: random.Random) -> int:
    """The better of two, as the gateway chooses without a prefix."""
    return chosen(loads, None, draw)


def chosen(loads: Loads, prefix: bytes | None, draw: random.Random, *, work: float = 1.0) -> int:
    """The gateway's own choice."""
    found = choose([Candidate(place, load) for place, load in enumerate(loads)], prefix, draw, work=work)
    assert found is not None, "there are replicas"
    return found


def lengths(number: int, draw: random.Random) -> list[float]:
    """Prompts in tokens: a median of 500, few of many thousands."""
    return [min(32_000.0, max(1.0, draw.lognormvariate(6.2146, 1.3))) for _ in range(number)]


def balance(pick: Pick, *, by: str, polled_s: float = 0.0, requests: int, seed: int) -> Waits:
    """Waits before prefill when replicas are picked by their loads: `tokens` or `requests` in hand."""
    draw, chance = random.Random(seed), random.Random(seed + 100)
    sizes = lengths(requests, draw)
    rate = LOAD * REPLICAS * TOKENS_PER_S / statistics.fmean(sizes)
    replicas = [Replica() for _ in range(REPLICAS)]
    now_s, seen_s, seen, waits = 0.0, float("-inf"), [0.0] * REPLICAS, []
    for size in sizes:
        now_s += draw.expovariate(rate)
        if now_s - seen_s >= polled_s:
            seen_s = now_s
            seen = [one.tokens_at(now_s) if by == "tokens" else one.requests_at(now_s) for one in replicas]
        waits.append(replicas[pick(seen, chance)].take(now_s, size) - size / TOKENS_PER_S)
    return _waits(waits)


def affinity(route: Route, *, rate: float, requests: int, seed: int) -> Waits:
    """Times to the first token, and what was computed for it, when prompts share prefixes."""
    draw, chance = random.Random(seed), random.Random(seed + 100)
    popular = list(accumulate(1 / (place + 1) for place in range(PREFIXES)))
    replicas = [Replica() for _ in range(REPLICAS)]
    now_s, hits, times = 0.0, 0, []
    for _ in range(requests):
        now_s += draw.expovariate(rate)
        prefix = bisect.bisect_left(popular, draw.random() * popular[-1])
        replica = replicas[route(replicas, now_s, prefix, b"prefix %d %d" % (seed, prefix), chance)]
        found = replica.finds(prefix)
        hits += found
        times.append(replica.take(now_s, OWN_TOKENS + (0 if found else SHARED_TOKENS)))
    done = [replica.tokens_done for replica in replicas]
    return _waits(times, hits / requests, sum(done) / requests, max(done) / statistics.fmean(done))


def _loads(replicas: Sequence[Replica], now_s: float) -> list[float]:
    return [replica.tokens_at(now_s) for replica in replicas]


def by_two(replicas: Sequence[Replica], now_s: float, _prefix: int, _key: bytes, draw: random.Random) -> int:
    """The better of two, whatever is cached."""
    return two(_loads(replicas, now_s), draw)


def by_home(replicas: Sequence[Replica], _now_s: float, _prefix: int, key: bytes, draw: random.Random) -> int:
    """The home of the prefix, whatever its load."""
    return chosen([0.0] * len(replicas), key, draw)


def by_bounded_home(replicas: Sequence[Replica], now_s: float, _prefix: int, key: bytes, draw: random.Random) -> int:
    """The home of the prefix, bounded by load."""
    return chosen(_loads(replicas, now_s), key, draw, work=float(SHARED_TOKENS + OWN_TOKENS))


def by_cost(replicas: Sequence[Replica], now_s: float, prefix: int, _key: bytes, draw: random.Random) -> int:
    """The fewest tokens of queue and of prefill together."""
    loads = _loads(replicas, now_s)
    return least(
        [load + SHARED_TOKENS * (prefix not in one.cached) for load, one in zip(loads, replicas, strict=True)], draw
    )


def _waits(seconds: list[float], hit_rate: float = 0.0, tokens: float = 0.0, imbalance: float = 0.0) -> Waits:
    seconds.sort()
    middle, last = len(seconds) // 2, int(0.99 * len(seconds))
    return Waits(statistics.fmean(seconds), seconds[middle], seconds[last], hit_rate, tokens, imbalance)


def _mean(all_of: Sequence[Waits]) -> Waits:
    names = ("mean_s", "p50_s", "p99_s", "hit_rate", "tokens", "imbalance")
    return Waits(*(statistics.fmean(getattr(one, name) for one in all_of) for name in names))


def show_balance(requests: int, seeds: int) -> dict[str, Waits]:
    """Prints the first table."""
    turn = [0]

    def in_turn(loads: Loads, _draw: random.Random) -> int:
        turn[0] += 1
        return turn[0] % len(loads)

    ways: dict[str, tuple[Pick, str, float]] = {
        "random": (lambda loads, draw: draw.randrange(len(loads)), "tokens", 0.0),
        "round robin": (in_turn, "tokens", 0.0),
        "two, by requests": (two, "requests", 0.0),
        "two, by tokens": (two, "tokens", 0.0),
        "least, by requests": (least, "requests", 0.0),
        "least, by tokens": (least, "tokens", 0.0),
        "least, by tokens, polled each second": (least, "tokens", 1.0),
        "two, by tokens, polled each second": (two, "tokens", 1.0),
    }
    found = {}
    print(f"Balance: {REPLICAS} replicas at {LOAD:.0%} load, seconds of waiting before prefill")
    for name, (pick, by, polled_s) in ways.items():
        runs = [balance(pick, by=by, polled_s=polled_s, requests=requests, seed=seed) for seed in range(1, seeds + 1)]
        found[name] = _mean(runs)
        print(f"{name:38} mean {found[name].mean_s:7.3f}   p50 {found[name].p50_s:7.3f}   p99 {found[name].p99_s:7.3f}")
    return found


def show_affinity(rate: float, requests: int, seeds: int) -> dict[str, Waits]:
    """Prints the second table for one rate of arrivals."""
    routes: dict[str, Route] = {
        "two, no affinity": by_two,
        "home, no bound": by_home,
        "home, bounded": by_bounded_home,
        "fewest tokens in all": by_cost,
    }
    found = {}
    print(f"\nAffinity: {rate:.0f} requests/s, seconds to the first token")
    for name, route in routes.items():
        runs = [affinity(route, rate=rate, requests=requests, seed=seed) for seed in range(1, seeds + 1)]
        found[name] = _mean(runs)
        print(
            f"{name:24} found {found[name].hit_rate:6.1%}   prefill {found[name].tokens:6.0f} tokens   "
            f"p50 {found[name].p50_s:8.3f}   p99 {found[name].p99_s:8.3f}   "
            f"fullest {found[name].imbalance:5.2f} x the mean"
        )
    return found


def main() -> None:
    """Both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=40_000)
    parser.add_argument("--seeds", type=int, default=6)
    given = parser.parse_args()
    even = show_balance(given.requests, given.seeds)
    show_affinity(60.0, given.requests, given.seeds)
    busy = show_affinity(80.0, given.requests, given.seeds)
    by_tokens, by_requests = even["two, by tokens"].p99_s, even["two, by requests"].p99_s
    bounded, free = busy["home, bounded"], busy["two, no affinity"]
    claims: list[Claim] = [
        at_most("p99 wait: two by tokens over two by requests", by_tokens / by_requests, unit="x", limit=0.7),
        at_most("prefill a request: bounded affinity over none", bounded.tokens / free.tokens, unit="x", limit=0.6),
        at_most("p99 to the first token at 80 requests/s, bounded affinity", bounded.p99_s, unit="s", limit=2.0),
    ]
    report(__file__, claims)


if __name__ == "__main__":
    main()
