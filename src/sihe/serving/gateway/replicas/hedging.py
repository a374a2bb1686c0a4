"""When a request is sent to a second replica because its first token is late. Pure: the caller gives the numbers.

A request is late when it has waited longer than 95 of 100 of the recent ones have; the first of the two copies to
answer wins and the other is aborted. A budget bounds the extra load whatever happens: in an overload everything is
late, and hedging would make it worse. (Dean and Barroso, "The Tail at Scale", CACM 56(2), 2013.)
"""

from __future__ import annotations

from collections import deque

_WINDOW = 200  # recent waits that are looked at
_LEAST = 20  # of them, before anything is called late
_QUANTILE = 0.95
_BURST = 1.0  # hedges that may be saved up


class Hedger:
    """Decides for one deployment. `share` of its requests may be sent twice; not thread-safe."""

    def __init__(self, share: float) -> None:
        self.share = share
        self._waits_s: deque[float] = deque(maxlen=_WINDOW)
        self._budget = 0.0

    def arrived(self) -> None:
        """A request has come."""
        self._budget = min(_BURST, self._budget + self.share)

    def answered(self, wait_s: float) -> None:
        """A request's first token came after `wait_s`."""
        self._waits_s.append(wait_s)

    def delay_s(self) -> float | None:
        """How long a first token may take before a second copy is worth it; None while too little is known."""
        if self.share <= 0 or len(self._waits_s) < _LEAST:
            return None
        ordered = sorted(self._waits_s)
        return ordered[min(len(ordered) - 1, int(_QUANTILE * len(ordered)))]

    def take(self) -> bool:
        """Whether a second copy may be sent now; if so it is counted."""
        # The sum of shares such as 0.05 is not exact.
        if self._budget < 1.0 - 1e-9:
            return False
        self._budget -= 1.0
        return True
