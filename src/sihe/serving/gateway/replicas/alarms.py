"""Calls at a later time, on one thread: deadlines, late first tokens, requests that have waited too long."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable
from itertools import count

from sihe.core.telemetry import logger

_FEW = 64  # cancelled calls that may stay in the queue before it is rebuilt


class Alarm:
    """A call that `Alarms.after` has scheduled. `cancel` lets go of it, and of all that it holds, at once."""

    __slots__ = ("_alarms", "call")

    def __init__(self, alarms: Alarms, call: Callable[[], None]) -> None:
        self._alarms = alarms
        self.call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """It will not be called, unless it is at this moment. Safe to call again, and after the call."""
        self._alarms._cancel(self)


class Alarms:
    """`after` schedules a call, which must return at once. The thread starts with the first call, ends with `close`."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._log = logger("serving")
        self._changed = threading.Condition()
        self._calls: list[tuple[float, int, Alarm]] = []
        self._cancelled = 0  # of those in the queue
        self._numbers = count()
        self._thread: threading.Thread | None = None
        self._closed = False

    def __len__(self) -> int:
        """How many calls the queue has, cancelled ones among them."""
        return len(self._calls)

    def after(self, delay_s: float, call: Callable[[], None]) -> Alarm:
        """Calls `call` in `delay_s` seconds, unless it is cancelled or this is closed before. O(log calls)."""
        alarm = Alarm(self, call)
        with self._changed:
            if self._closed:
                alarm.call = None
                return alarm
            heapq.heappush(self._calls, (time.monotonic() + delay_s, next(self._numbers), alarm))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
            elif self._calls[0][2] is alarm:  # else the thread wakes early enough
                self._changed.notify()
        return alarm

    def close(self) -> None:
        """Forgets every call and ends the thread."""
        with self._changed:
            self._closed = True
            self._calls.clear()
            self._changed.notify()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _cancel(self, alarm: Alarm) -> None:
        with self._changed:
            if alarm.call is None:
                return
            alarm.call = None
            self._cancelled += 1
            if self._cancelled > _FEW and 2 * self._cancelled > len(self._calls):  # amortised O(1)
                self._calls = [entry for entry in self._calls if entry[2].call is not None]
                heapq.heapify(self._calls)
                self._cancelled = 0

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._closed and (not self._calls or self._calls[0][0] > time.monotonic()):
                    self._changed.wait(max(0.0, self._calls[0][0] - time.monotonic()) if self._calls else None)
                if self._closed:
                    return
                alarm = heapq.heappop(self._calls)[2]
                call, alarm.call = alarm.call, None
                self._cancelled -= call is None
            if call is None:
                continue
            try:
                call()
            except Exception as error:  # noqa: BLE001 - one call that fails must not end all deadlines
                self._log.error("alarm_failed", alarms=self._name, error=repr(error), exc_info=error)
