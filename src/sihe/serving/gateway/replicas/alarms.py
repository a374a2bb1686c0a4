"""Calls at a later time, on one thread: deadlines, late first tokens, requests that have waited too long."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable
from itertools import count


class Alarms:
    """`after` schedules a call, which must return at once and not raise. There is no cancelling: a call that has become
    pointless does nothing. The thread starts with the first call and ends with `close`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._changed = threading.Condition()
        self._calls: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._thread: threading.Thread | None = None
        self._closed = False

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        """Calls `call` in `delay_s` seconds, unless this is closed before. O(log calls)."""
        with self._changed:
            if self._closed:
                return
            heapq.heappush(self._calls, (time.monotonic() + delay_s, next(self._numbers), call))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            self._changed.notify()

    def close(self) -> None:
        """Forgets every call and ends the thread."""
        with self._changed:
            self._closed = True
            self._calls.clear()
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._calls or self._calls[0][0] > time.monotonic()):
                    self._changed.wait(self._calls[0][0] - time.monotonic() if self._calls else None)
                if self._closed:
                    return
                call = heapq.heappop(self._calls)[2]
            call()
