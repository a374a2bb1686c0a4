"""How many requests of callers are in hand in this process, for whoever must step back while there are any."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Presence:
    """Thread-safe. Who watches hears of each request before it starts, and must return at once and never raise."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._in_hand = 0
        self._on_arrival: tuple[Callable[[], None], ...] = ()
        self._on_idle: tuple[Callable[[], None], ...] = ()

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for an answer."""
        return self._in_hand == 0

    def enter(self) -> None:
        """A request of a caller comes."""
        with self._lock:
            self._in_hand += 1
        for heard in self._on_arrival:
            heard()

    def leave(self) -> None:
        """It has ended, however it did."""
        with self._lock:
            self._in_hand -= 1
            idle = self._in_hand == 0
        if idle:
            for heard in self._on_idle:
                heard()

    def watch(self, on_arrival: Callable[[], None], on_idle: Callable[[], None]) -> Callable[[], None]:
        """Calls the two from now on, until what this returns is called."""
        with self._lock:
            self._on_arrival = (*self._on_arrival, on_arrival)
            self._on_idle = (*self._on_idle, on_idle)

        def stop() -> None:
            with self._lock:
                self._on_arrival = tuple(heard for heard in self._on_arrival if heard is not on_arrival)
                self._on_idle = tuple(heard for heard in self._on_idle if heard is not on_idle)

        return stop
