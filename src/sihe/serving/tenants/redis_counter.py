"""Rates that several server processes count together, in Redis.

One script takes everything that a request demands, or nothing: Redis runs it whole, by its own clock, so that the
processes' clocks need not agree. Buckets are hashes of a level and a time, slots are sorted sets of leases by the time
at which they end: a process that is killed gives its slots back when its leases end, and a living one prolongs its own.
(The arithmetic is that of `bucket.py`; a test compares the two on random demands.)

Redis is never in the way: it has a quarter of a second to answer, and where it does not, this process counts alone for
some seconds (each process then grants a tenant's whole rate) and says so in the log and in a metric.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from sihe.core.clock import Clock
from sihe.core.errors import ConfigError
from sihe.core.ids import new_id
from sihe.core.lazy import require
from sihe.core.telemetry import logger
from sihe.serving.tenants.ports import Decision, Demand, RateCounter

if TYPE_CHECKING:
    from redis import Redis

TIMEOUT_S = 0.25
ALONE_S = 5.0  # how long this process counts alone before it asks Redis again
LEASE_S = 60.0
_RENEW_S = LEASE_S / 3
_MAX_SETTLEMENTS = 100_000
_PREFIX = "sihe:rates"

# KEYS: meters, then slots. ARGV: number of meters, lease, seconds of a lease, then capacity, per_s, amount of each
# meter, then the limit of each slots' name. Answers: granted, then what each meter holds, then what runs.
_TAKE = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
local meters, lease, lease_s = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3])
local granted, present, running = 1, {}, {}
for i = 1, meters do
  local capacity, per_s, amount = tonumber(ARGV[3*i+1]), tonumber(ARGV[3*i+2]), tonumber(ARGV[3*i+3])
  local held = redis.call('HMGET', KEYS[i], 'amount', 'at')
  local level = capacity
  if held[1] then
    level = math.min(capacity, tonumber(held[1]) + math.max(0, now - tonumber(held[2])) * per_s)
  end
  present[i] = level
  if level < amount then granted = 0 end
end
for j = meters + 1, #KEYS do
  redis.call('ZREMRANGEBYSCORE', KEYS[j], '-inf', now)
  running[j - meters] = redis.call('ZCARD', KEYS[j])
  if running[j - meters] >= tonumber(ARGV[2*meters+3+j]) then granted = 0 end
end
if granted == 1 then
  for i = 1, meters do
    local capacity, per_s, amount = tonumber(ARGV[3*i+1]), tonumber(ARGV[3*i+2]), tonumber(ARGV[3*i+3])
    present[i] = present[i] - amount
    redis.call('HSET', KEYS[i], 'amount', string.format('%.17g', present[i]), 'at', string.format('%.17g', now))
    redis.call('EXPIRE', KEYS[i], math.ceil((capacity - present[i]) / per_s) + 60)
  end
  for j = meters + 1, #KEYS do
    redis.call('ZADD', KEYS[j], now + lease_s, lease)
    redis.call('EXPIRE', KEYS[j], math.ceil(lease_s) + 1)
    running[j - meters] = running[j - meters] + 1
  end
end
local answer = {tostring(granted)}
for _, level in ipairs(present) do answer[#answer+1] = string.format('%.17g', level) end
for _, count in ipairs(running) do answer[#answer+1] = tostring(count) end
return answer
"""

# KEYS as above. ARGV: number of meters, lease, then capacity, per_s, refund of each meter.
_SETTLE = """
local clock = redis.call('TIME')
local now = tonumber(clock[1]) + tonumber(clock[2]) / 1e6
local meters, lease = tonumber(ARGV[1]), ARGV[2]
for i = 1, meters do
  local capacity, per_s, refund = tonumber(ARGV[3*i]), tonumber(ARGV[3*i+1]), tonumber(ARGV[3*i+2])
  local held = redis.call('HMGET', KEYS[i], 'amount', 'at')
  if held[1] and refund ~= 0 then
    local level = math.min(capacity, tonumber(held[1]) + math.max(0, now - tonumber(held[2])) * per_s)
    level = math.min(capacity, level + refund)
    redis.call('HSET', KEYS[i], 'amount', string.format('%.17g', level), 'at', string.format('%.17g', now))
    redis.call('EXPIRE', KEYS[i], math.ceil((capacity - level) / per_s) + 60)
  end
end
for j = meters + 1, #KEYS do redis.call('ZREM', KEYS[j], lease) end
return 0
"""

# KEYS: slots. ARGV: seconds of a lease, lease. A lease that has ended meanwhile stays ended.
_RENEW = """
local clock = redis.call('TIME')
local until_s = tonumber(clock[1]) + tonumber(clock[2]) / 1e6 + tonumber(ARGV[1])
for j = 1, #KEYS do
  redis.call('ZADD', KEYS[j], 'XX', until_s, ARGV[2])
  redis.call('EXPIRE', KEYS[j], math.ceil(tonumber(ARGV[1])) + 1)
end
return 0
"""

_Settlement = tuple[Demand, str, dict[str, float]]


class RedisCounter:
    """A `RateCounter` in Redis at `url`; `alone` counts while it does not answer, and `on_alone` hears of it."""

    def __init__(
        self,
        url: str,
        alone: RateCounter,
        clock: Clock,
        *,
        on_alone: Callable[[], None],
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        redis = require("redis", extra="redis")
        try:
            self._redis: Redis = redis.Redis.from_url(
                url,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0),  # its own would take from the buckets again
                decode_responses=True,
            )
        except ValueError as error:
            raise ConfigError(f"tenants.redis_url: {error}", key="tenants.redis_url") from error
        self._errors: type[Exception] = redis.RedisError
        self._take = self._redis.register_script(_TAKE)
        self._settle = self._redis.register_script(_SETTLE)
        self._renew = self._redis.register_script(_RENEW)
        self._alone = alone
        self._clock = clock
        self._on_alone = on_alone
        self._log = logger("serving")
        self._alone_until_s: float | None = None
        self._settlements: queue.Queue[_Settlement | None] = queue.Queue(_MAX_SETTLEMENTS)
        self._lock = threading.Lock()
        self._leases: dict[str, Demand] = {}  # those with slots, to be prolonged
        self._thread: threading.Thread | None = None

    def take(self, demand: Demand) -> Decision:
        """Takes everything that is demanded, or nothing."""
        if not demand.meters and not demand.slots:
            return Decision(True, (), (), "")
        if self._is_alone():
            return self._take_alone(demand)
        lease = new_id("lease")
        numbers: list[Any] = [len(demand.meters), lease, LEASE_S]
        for meter in demand.meters:
            numbers += [meter.rate.capacity, meter.rate.per_s, meter.amount]
        numbers += [slots.limit for slots in demand.slots]
        try:
            said = self._take(keys=_keys(demand), args=numbers)
        except self._errors as error:
            self._leave(error)
            return self._take_alone(demand)
        self._alone_until_s = None
        split = 1 + len(demand.meters)
        granted = said[0] == "1"
        if granted and demand.slots:
            with self._lock:
                self._leases[lease] = demand
        self._start()
        return Decision(granted, tuple(map(float, said[1:split])), tuple(map(int, said[split:])), lease)

    def settle(self, demand: Demand, lease: str, refunds: dict[str, float]) -> None:
        """Frees the slots and corrects the buckets, soon, on a thread of this object's own."""
        if not lease:
            self._alone.settle(demand, lease, refunds)
            return
        with self._lock:
            self._leases.pop(lease, None)
        try:
            self._settlements.put_nowait((demand, lease, refunds))
        except queue.Full:
            self._log.warning("rate_not_settled", reason="too many wait")  # the lease ends by itself

    def close(self) -> None:
        """Ends the thread, after all settlements were made or could not be."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._settlements.put(None)
            thread.join()
        self._redis.close()

    # ---- alone ------------------------------------------------------------------------------------------------------

    def _is_alone(self) -> bool:
        until_s = self._alone_until_s
        return until_s is not None and self._clock.monotonic_s() < until_s

    def _take_alone(self, demand: Demand) -> Decision:
        self._on_alone()
        return self._alone.take(demand)  # its lease is empty: that is how `settle` knows it

    def _leave(self, error: Exception) -> None:
        if self._alone_until_s is None:
            self._log.warning("redis_lost", error=repr(error), counts="each process alone")
        self._alone_until_s = self._clock.monotonic_s() + ALONE_S

    # ---- the thread -------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        if self._thread is None:
            with self._lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="rates", daemon=True)
                    self._thread.start()

    def _run(self) -> None:
        renew_at_s = self._clock.monotonic_s() + _RENEW_S
        while True:
            try:
                settlement = self._settlements.get(timeout=max(0.0, renew_at_s - self._clock.monotonic_s()))
            except queue.Empty:
                renew_at_s = self._clock.monotonic_s() + _RENEW_S
                self._prolong()
                continue
            if settlement is None:
                return
            self._make(*settlement)
            if self._clock.monotonic_s() >= renew_at_s:
                renew_at_s = self._clock.monotonic_s() + _RENEW_S
                self._prolong()

    def _make(self, demand: Demand, lease: str, refunds: dict[str, float]) -> None:
        numbers: list[Any] = [len(demand.meters), lease]
        for meter in demand.meters:
            numbers += [meter.rate.capacity, meter.rate.per_s, refunds.get(meter.name, 0.0)]
        self._call(partial(self._settle, keys=_keys(demand), args=numbers))

    def _prolong(self) -> None:
        with self._lock:
            leases = list(self._leases.items())
        for lease, demand in leases:
            keys = _keys(demand)[len(demand.meters) :]
            if not self._call(partial(self._renew, keys=keys, args=[LEASE_S, lease])):
                return

    def _call(self, call: Callable[[], Any]) -> bool:
        if self._is_alone():
            return False
        try:
            call()
        except self._errors as error:
            self._leave(error)
            return False
        return True


def _keys(demand: Demand) -> list[str]:
    """The keys in Redis; the braces keep a tenant's on one node of a cluster."""
    head = f"{_PREFIX}:{{{demand.tenant}}}"
    meters = [f"{head}:{meter.name}" for meter in demand.meters]
    return [*meters, *(f"{head}:{slots.name}:running" for slots in demand.slots)]
