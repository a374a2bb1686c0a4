"""A circuit breaker: a replica that keeps failing gets no requests for a while, then one to show that it is well.

Pure: the caller gives the time. (The pattern: Nygard, "Release It!", 2nd ed. 2018, chapter 5.)
"""

from __future__ import annotations

from collections import deque
from typing import Literal

BreakerState = Literal["closed", "open", "half-open"]

_CONSECUTIVE = 5  # failures in a row that open it
_WINDOW = 20  # latest outcomes of which, from _LEAST on, half must not be failures
_LEAST = 10
_SHARE = 0.5
_FIRST_WAIT_S = 1.0
_LONGEST_WAIT_S = 30.0


class Breaker:
    """Decides whether one replica gets requests. Not thread-safe.

    Opens after five failures in a row, or when half of the last twenty requests (at least ten) have failed. After a
    second, and twice as long each time up to half a minute, it lets one request through; its success closes it.
    """

    def __init__(self) -> None:
        self._outcomes: deque[bool] = deque(maxlen=_WINDOW)
        self._in_a_row = 0
        self._wait_s = _FIRST_WAIT_S
        self._opened_s: float | None = None
        self._probed_s: float | None = None  # when the one request was let through

    def state(self, now_s: float) -> BreakerState:
        """What it is at `now_s`."""
        if self._opened_s is None:
            return "closed"
        return "open" if now_s - self._opened_s < self._wait_s else "half-open"

    def allows(self, now_s: float) -> bool:
        """Whether a request may go to the replica now. A probe of which nothing was heard is given up after a while."""
        state = self.state(now_s)
        if state != "half-open":
            return state == "closed"
        return self._probed_s is None or now_s - self._probed_s >= _LONGEST_WAIT_S

    def sent(self, now_s: float) -> None:
        """A request goes to the replica."""
        if self.state(now_s) == "half-open":
            self._probed_s = now_s

    def withdrawn(self) -> None:
        """The request was not taken after all, or left, which says nothing of the replica: the next one may go."""
        self._probed_s = None

    def succeeded(self) -> None:
        """A request was answered, or was refused for a reason of its own."""
        self._in_a_row = 0
        if self._opened_s is not None:
            if self._probed_s is None:
                return  # it was sent before this opened: of many at once some succeed also where most fail
            self._outcomes.clear()
            self._opened_s = self._probed_s = None
            self._wait_s = _FIRST_WAIT_S
        self._outcomes.append(True)

    def failed(self, now_s: float) -> None:
        """A request failed for a reason of the replica."""
        self._in_a_row += 1
        self._outcomes.append(False)
        if self._opened_s is not None:
            if self._probed_s is not None:  # the probe: wait longer; a late answer from before says nothing new
                self._wait_s = min(2 * self._wait_s, _LONGEST_WAIT_S)
                self._opened_s, self._probed_s = now_s, None
            return
        failures = self._outcomes.count(False)
        if self._in_a_row >= _CONSECUTIVE or (
            len(self._outcomes) >= _LEAST and failures >= _SHARE * len(self._outcomes)
        ):
            self._opened_s = now_s
