"""How often an address may show a wrong key. Pure but for the lock.

Keys that Sihe makes cannot be guessed at any speed; those of `server.api_keys` are whatever somebody wrote there. So an
address that fails too often is told to wait, and until then only keys of the first kind open anything for it: many
clients may share the address (a proxy, an office), and one of them with an old key must not lock the others out.
"""

from __future__ import annotations

import ipaddress
import threading
from collections import OrderedDict

from sihe.core.clock import Clock
from sihe.serving.tenants.bucket import Level, Rate, amount_at, taken, wait_s

FAILURES = Rate(capacity=20, per_s=20 / 60)  # a person who mistypes never gets there, a list of passwords does at once
MAX_ADDRESSES = 10_000
_IPV6_PREFIX = 64  # what one subscriber has at least (RFC 6177): its addresses count as one


class Brakes:
    """Remembers who failed lately, for as many addresses as `MAX_ADDRESSES`; the oldest are forgotten first."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._levels: OrderedDict[str, Level] = OrderedDict()

    def wait_s(self, address: str) -> float:
        """How long an address must wait before its next guess counts; 0 for one that may."""
        with self._lock:
            level = self._levels.get(_source(address))
        return 0.0 if level is None else wait_s(FAILURES, amount_at(FAILURES, level, self._clock.monotonic_s()), 1)

    def failed(self, address: str) -> None:
        """Counts a wrong key."""
        source, now_s = _source(address), self._clock.monotonic_s()
        with self._lock:
            level = self._levels.pop(source, None)
            if amount_at(FAILURES, level, now_s) >= 1:  # guesses while it waits do not make the wait longer
                level = taken(FAILURES, level, 1, now_s)
            assert level is not None
            self._levels[source] = level
            if len(self._levels) > MAX_ADDRESSES:
                self._levels.popitem(last=False)


def _source(address: str) -> str:
    """What counts as one address."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:64]
    if isinstance(parsed, ipaddress.IPv6Address):
        if parsed.ipv4_mapped is not None:
            return str(parsed.ipv4_mapped)
        return str(ipaddress.ip_network((parsed, _IPV6_PREFIX), strict=False))
    return str(parsed)
